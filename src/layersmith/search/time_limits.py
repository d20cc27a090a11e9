"""Solve within limits of time that are checked with a stopwatch.

The program adds up times of parts, but a whole child takes more or less than the sum of its parts, and the machine may
run at another speed than when the parts were timed. So each solution is timed as a whole child. If it exceeds a limit,
or its predicted time was wrong, the times are corrected by that measurement and the program is solved again.
"""

from __future__ import annotations

from dataclasses import dataclass

from layersmith.costs.stopwatch import Stopwatch, check
from layersmith.costs.times import SOLUTION, Check, Times, costs_of
from layersmith.errors import Infeasible
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

# A child may exceed a limit by this share, since timings are noisy. A lower share would refuse children within limits.
TOLERANCE = 0.01
# If the predicted time was off by more than this share, the corrected program may have a better solution.
_CLOSE = 0.02
# Each try times one child, which may take half of the recipe's ``costs.seconds``.
_TRIES = 4


@dataclass(frozen=True)
class TimedSolution:
    """A solution that was timed as a whole child.

    Attributes:
        solution: The best solution that was timed within the limits; if none was, the one that exceeds them least.
        problem: The search problem with the corrected times.
        times: The corrected times, with one check for each child that was timed.
        overrun: By what share of a limit the child exceeds it, for the worst limit; 0 or less if it is within all.
    """

    solution: Solution
    problem: SearchProblem
    times: Times
    overrun: float


def solve_within(problem: SearchProblem, times: Times, stopwatch: Stopwatch) -> TimedSolution:
    """Solve a problem, time the solution, correct the times, and solve again until a solution is within its limits.

    Args:
        problem: The search problem, with its limits; its costs are replaced by those of the times.
        times: Times of all alternatives, as measured part by part.
        stopwatch: Times whole children of the same parent.

    Raises:
        Infeasible: No solution is within the limits according to the times before any correction.
    """
    tried: list[TimedSolution] = []
    for _ in range(_TRIES):
        try:
            problem = problem.with_times(times)
            solution = problem.best()
        except Infeasible:
            if not tried:
                raise
            break
        if any(solution.alternatives == other.solution.alternatives for other in tried):
            break
        measured = time_solution(solution, times, stopwatch)
        times = times.checked(measured).at_speed_of(measured, problem.alternatives)
        overrun, error = _against_limits(solution, measured, times)
        tried.append(TimedSolution(solution, problem, times, overrun))
        if overrun <= TOLERANCE and error <= _CLOSE:
            break
    within = [timed for timed in tried if timed.overrun <= TOLERANCE]
    best = (
        min(within, key=lambda timed: timed.solution.score) if within else min(tried, key=lambda timed: timed.overrun)
    )
    # The solution's costs are stated by the final times, which include all corrections.
    problem = problem.with_times(times)
    solution = problem.of(best.solution.alternatives, best.solution.proven_optimal)
    return TimedSolution(solution, problem, times, best.overrun)


def overrun_of(solution: Solution, times: Times, stopwatch: Stopwatch) -> float:
    """Time a solution as a whole child; by what share it exceeds the worst of its limits (0 or less if within all)."""
    return _against_limits(solution, time_solution(solution, times, stopwatch), times)[0]


def time_solution(solution: Solution, times: Times, stopwatch: Stopwatch) -> Check:
    """Time a solution as a whole child, interleaved with its parent."""
    fraction = solution.costs["parameters"] / solution.parent_costs["parameters"]
    return check(stopwatch, times, {SOLUTION: (solution.alternatives, fraction)}, stopwatch.recipe)[0]


def _against_limits(solution: Solution, measured: Check, times: Times) -> tuple[float, float]:
    """The largest overrun of a limit, and the largest error of a predicted time, both as shares.

    Both are relative to the parent as it was timed in the same rounds, which cancels the speed of the machine.
    """
    child, parent = (costs_of(timing, times.workload) for timing in (measured.whole, measured.parent))
    limits = [limit for limit in solution.asked if limit.cost in child]
    if not limits:
        return 0.0, 0.0
    overrun = max(child[limit.cost] / limit.resolve(parent[limit.base]) - 1 for limit in limits)
    errors = []
    for limit in limits:
        predicted = solution.costs[limit.cost] / solution.parent_costs[limit.cost]
        errors.append(abs(child[limit.cost] / parent[limit.cost] / predicted - 1))
    return overrun, max(errors)
