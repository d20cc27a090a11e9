"""A choice within limits of time that holds against the clock.

The program sees sums of parts. So its choice is timed as a whole model; where the sum was wrong, or the machine is not
as fast as it was when the parts were timed, times are corrected by what was seen and the program is solved again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layersmith.costs.times import Check, Times, costs_of
from layersmith.errors import Infeasible
from layersmith.search.problem import Choice, Space

# Of a limit: what a child may be over it, and by how much the sum may miss it, before the search goes on.
TOLERANCE, CLOSE = 0.01, 0.02
_TRIES = 4


@dataclass(frozen=True)
class Settled:
    """What came of it.

    Attributes:
        times: with the checks.
        space: with those times.
        choice: the best that was seen to hold; if none was, the one that is over its limits by least.
        over: by what share it is over a limit; 0 or less if it holds.
    """

    times: Times
    space: Space
    choice: Choice
    over: float


def settle(times: Times, space_of: Callable[[Times], Space], watch: Callable[[Times, Choice], Check]) -> Settled:
    """Solve, time, correct, until the choice holds.

    Args:
        times: as they were measured.
        space_of: of all choices, with some times.
        watch: times a choice.

    Raises:
        Infeasible: no choice is within the limits by the times as they are known then.
    """
    tried: list[Settled] = []
    for _ in range(_TRIES):
        try:
            space = space_of(times)
            choice = space.best()
        except Infeasible:
            if not tried:
                raise
            break
        if any(choice.alternatives == other.choice.alternatives for other in tried):
            break
        seen = watch(times, choice)
        times = times.checked(seen).at_speed_of(seen, space.alternatives)
        over, off = compared(choice, seen, times)
        tried.append(Settled(times, space, choice, over))
        if over <= TOLERANCE and off <= CLOSE:
            break
    holding = [own for own in tried if own.over <= TOLERANCE]
    best = min(holding, key=lambda own: own.choice.score) if holding else min(tried, key=lambda own: own.over)
    # All was learnt by the end; the choice is told in those terms.
    space = space_of(times)
    return Settled(times, space, space.of(best.choice.alternatives, best.choice.proven_optimal), best.over)


def compared(choice: Choice, seen: Check, times: Times) -> tuple[float, float]:
    """By what share a choice that was timed is over a limit, and how far the sum was from what was seen.

    Both are told beside the parent as it was timed then.
    """
    measured, beside = (costs_of(timing, times.workload) for timing in (seen.whole, seen.parent))
    over = off = 0.0
    limits = [limit for limit in choice.budget.limits if limit.cost in measured]
    if limits:
        over = max(measured[x.cost] / x.resolve(beside[x.cost]) - 1 for x in limits)
        said = {x.cost: choice.costs[x.cost] / choice.parent_costs[x.cost] for x in limits}
        off = max(abs(measured[cost] / beside[cost] / share - 1) for cost, share in said.items())
    return over, off
