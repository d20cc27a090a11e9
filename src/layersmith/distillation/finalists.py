"""Several different solutions for one budget: each is the best that differs enough from the earlier ones.

Two solutions differ in a subblock if they have other alternatives there. The difference to each earlier solution is one
more constraint of the search's integer program, so the rules of the search hold for all solutions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

# Default share of the subblocks in which two solutions differ: fewer try nearly the same child twice, more cost score.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Finalist:
    """A solution that was distilled for a short while.

    Attributes:
        number: 0 for the run's solution; the others are in the order of their scores.
        score: Sum of the scores of its alternatives.
        parameters: Number of parameters of the child.
        tokens: Number of training tokens.
        kl: KL divergence to the parent afterwards, on the scoring rows, in nats a token.
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
        first: The first solution, such as the run's refined one.
        count: Number of solutions.
        distance: Minimum number of subblocks in which two solutions differ; default: a tenth of all.

    Returns:
        The first, then the others in the order of their scores; fewer than ``count`` if there are no more.
    """
    places = len(problem.by_place)
    least = distance or max(1, math.ceil(_LEAST_SHARE * places))
    solutions = [first]
    while len(solutions) < count:
        following = problem.best_by(problem.losses, [(solution.alternatives, least, places) for solution in solutions])
        if following is None:
            break
        solutions.append(following)
    return solutions
