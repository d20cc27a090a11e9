"""A solution within limits of time that holds against the clock.

The program sees sums of parts. So its solution is timed as a whole model; where the sum was wrong, or the machine is
not as fast as it was when the parts were timed, times are corrected by what was seen and the program is solved again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layersmith.costs.times import Check, Times, costs_of
from layersmith.errors import Infeasible
from layersmith.search.problem import Solution, Space

# Of a limit: what a child may be over it, and by how much the sum may miss it, before the search goes on.
TOLERANCE, CLOSE = 0.01, 0.02
_TRIES = 4


@dataclass(frozen=True)
class Settled:
    """What came of it.

    Attributes:
        times: with the checks.
        space: with those times.
        solution: the best that was seen to hold; if none was, the one that is over its limits by least.
        over: by what share it is over a limit; 0 or less if it holds.
    """

    times: Times
    space: Space
    solution: Solution
    over: float


def settle(times: Times, space_of: Callable[[Times], Space], watch: Callable[[Times, Solution], Check]) -> Settled:
    """Solve, time, correct, until the solution holds.

    Args:
        times: as they were measured.
        space_of: of all solutions, with some times.
        watch: times a solution.

    Raises:
        Infeasible: no solution is within the limits by the times as they are known then.
    """
    tried: list[Settled] = []
    for _ in range(_TRIES):
        try:
            space = space_of(times)
            solution = space.best()
        except Infeasible:
            if not tried:
                raise
            break
        if any(solution.alternatives == other.solution.alternatives for other in tried):
            break
        seen = watch(times, solution)
        times = times.checked(seen).at_speed_of(seen, space.alternatives)
        over, off = compared(solution, seen, times)
        tried.append(Settled(times, space, solution, over))
        if over <= TOLERANCE and off <= CLOSE:
            break
    holding = [own for own in tried if own.over <= TOLERANCE]
    best = min(holding, key=lambda own: own.solution.score) if holding else min(tried, key=lambda own: own.over)
    # All was learnt by the end; the solution is told in those terms.
    space = space_of(times)
    return Settled(times, space, space.of(best.solution.alternatives, best.solution.proven_optimal), best.over)


def compared(solution: Solution, seen: Check, times: Times) -> tuple[float, float]:
    """By what share a solution that was timed is over a limit, and how far the sum was from what was seen.

    Both are told beside the parent as it was timed then.
    """
    measured, beside = (costs_of(timing, times.workload) for timing in (seen.whole, seen.parent))
    over = off = 0.0
    limits = [limit for limit in solution.budget.limits if limit.cost in measured]
    if limits:
        over = max(measured[x.cost] / x.resolve(beside[x.cost]) - 1 for x in limits)
        said = {x.cost: solution.costs[x.cost] / solution.parent_costs[x.cost] for x in limits}
        off = max(abs(measured[cost] / beside[cost] / share - 1) for cost, share in said.items())
    return over, off
