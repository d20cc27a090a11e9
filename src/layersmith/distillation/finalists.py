"""Several solutions for one budget, different by construction: each is the best that differs enough from those before.

Two solutions differ in a subblock if they chose other alternatives there. That a new one differs from the old ones is
one more limit each in the search's own integer program, so the rules of the search hold for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from layersmith.search.problem import SearchProblem, Solution

_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Finalist:
    """A solution that was tried.

    Attributes:
        number: 0 for the run's own solution, then by the sum of scores.
        score: that sum.
        parameters: of the child.
        tokens: it was distilled for.
        kl: to the parent after that, on the scoring rows, in nats a token.
    """

    number: int
    score: float
    parameters: int
    tokens: int
    kl: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def diverse_solutions(
    problem: SearchProblem, first: Solution, count: int, distance: int | None = None
) -> list[Solution]:
    """Up to ``count`` solutions within a budget and rules.

    Args:
        problem: The search problem to solve.
        first: one of them, such as the run's own, which was bettered by running whole models.
        count: of solutions.
        distance: subblocks in which any two differ at least; default: a tenth of all.

    Returns:
        The first, then the others by their sums of scores; fewer than ``count`` where no others are left.
    """
    places = len(problem.by_place)
    least = distance or max(1, math.ceil(_LEAST_SHARE * places))
    found = [first]
    while len(found) < count:
        following = problem.best_by(problem.losses, [(own.alternatives, least, places) for own in found])
        if following is None:
            break
        found.append(following)
    return found
