"""Nested solutions: one for each of several budgets, each of which is a part of the one for the next larger budget.

For every subblock g a chain of alternatives (c_1, ..., c_S) is chosen, c_1 for the largest budget, where each is within
the one before it (:meth:`~layersmith.library.alternative.Alternative.is_within`):

    minimise   sum over g of score[g, c_1] + ... + score[g, c_S]
    subject to the limits of every budget s on the costs of all c_s.

With chains as candidates and S times as many limits, this is the program of :mod:`layersmith.search.solve`, so the same
solver finds the optimum and proves it. The sum for single budgets is a lower bound: the difference is what nesting
costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layersmith.costs.budget import Limits
from layersmith.errors import UsageError
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution
from layersmith.search.solve import Candidate, Group, Solver

# Chains are compared in pairs to remove dominated ones. A library of 14 alternatives has 560 chains of three budgets
# and 2,380 of four.
_MOST_CHAINS = 4_000


@dataclass(frozen=True)
class Nested:
    """Nested solutions, from the largest budget to the smallest.

    Attributes:
        solutions: The nested solutions.
        alone: The best solution for each budget by itself.
        bound: No nested solutions have a lower sum of scores.
        proven_optimal: Whether that is the sum of these.
    """

    solutions: tuple[Solution, ...]
    alone: tuple[Solution, ...]
    bound: float
    proven_optimal: bool

    @property
    def score(self) -> float:
        """The sum of the scores of all solutions."""
        return math.fsum(solution.score for solution in self.solutions)


def nested(problem: SearchProblem, budgets: Sequence[Limits]) -> Nested:
    """The nested solutions with the lowest sum of scores.

    Args:
        problem: The search problem, without number formats; its limits are not used.
        budgets: Limits of each size, from the largest size to the smallest.

    Raises:
        Infeasible: No child of the library is within one of the budgets.
        UsageError: A limit on time, or too many budgets.
    """
    if any(limits.has_times for limits in budgets):
        raise UsageError("nested sizes can have limits on parameters and memory, not on time.")
    problems = [problem.within(limits) for limits in budgets]
    alone = tuple(of_size.best() for of_size in problems)
    single = problem.solver()
    chains = [_chains(members, len(budgets)) for members in problem.members]
    limits = [of_size.limits | of_size.rule_limits for of_size in problems]
    groups = [_group(group, of_group, limits) for group, of_group in zip(single.groups, chains, strict=True)]
    fixed = {_of_size(s, name): single.fixed.get(name, 0) for s, of_size in enumerate(limits) for name in of_size}
    result = Solver(groups, fixed).solve(
        {_of_size(s, n): x for s, of_size in enumerate(limits) for n, x in of_size.items()}
    )
    chosen = [tuple(map(int, key.split())) for key in result.chosen]
    solutions = []
    for s, of_size in enumerate(problems):
        pairs = zip(problem.members, chosen, strict=True)
        alternatives = sorted(
            (a for members, chain in pairs for a in members[chain[s]]), key=lambda a: (a.layer, a.subblock)
        )
        solution = of_size.of(alternatives)
        solutions.append(dataclasses.replace(solution, bound=alone[s].bound))
    return Nested(tuple(solutions), alone, result.bound, result.proven_optimal)


def _of_size(size: int, cost: str) -> str:
    """The name of a cost of one of the nested children."""
    return f"{cost} of size {size}"


def _chains(members: Sequence[tuple], length: int) -> list[tuple[int, ...]]:
    """Numbers of candidates, each of which is within the one before it."""
    numbers = range(len(members))
    below = [
        [k for k in numbers if all(a.is_within(b) for a, b in zip(members[k], members[larger], strict=True))]
        for larger in numbers
    ]
    chains: list[tuple[int, ...]] = [(k,) for k in numbers]
    for _ in range(length - 1):
        chains = [(*chain, k) for chain in chains for k in below[chain[-1]]]
        if len(chains) > _MOST_CHAINS:
            raise UsageError(
                f"{length} nested sizes are too many for {len(members)} alternatives of a subblock: give fewer sizes."
            )
    return chains


def _group(group: Group, chains: Sequence[tuple[int, ...]], limits: Sequence[Mapping[str, float]]) -> Group:
    """The group whose candidates are chains."""
    candidates = []
    for chain in chains:
        of_size = [group.candidates[k] for k in chain]
        candidates.append(
            Candidate(
                key=" ".join(map(str, chain)),
                score=math.fsum(c.score for c in of_size),
                costs={_of_size(s, name): c.costs[name] for s, c in enumerate(of_size) for name in limits[s]},
                is_parent=all(c.is_parent for c in of_size),
                changes=sum(c.changes for c in of_size),
            )
        )
    return Group(group.name, tuple(candidates))
