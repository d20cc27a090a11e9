"""The integer program: one candidate of each group, the lowest sum of scores, costs within limits.

minimise   sum over g, c of score[g, c] x[g, c]
subject to sum over c of x[g, c] = 1 for every group g,
           fixed[k] + sum over g, c of cost[k, g, c] x[g, c] <= limit[k] for every limited cost k,
           x binary.

This is the multiple-choice knapsack problem with several limits. It is solved exactly by enumerating everything near
the bound of the linear relaxation (:mod:`layersmith.search.core`). Where too much is near the bound, HiGHS branches and
cuts. Either way, the answer is recomputed in exact integers. With unrelated costs whose limits all bind, no solver may
prove the optimum; then the best solution within a node limit is returned, with the bound that was reached.

The parent scores 0 and nothing scores less, so it is the answer whenever it fits. Of solutions with equal scores, the
enumeration takes the one with the fewest changes.

Source: arXiv 2411.19146 (the program); Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004).

Why not a library alone: on programs of 80 layers, this enumeration is 6 to 17 times faster than HiGHS and 9 to 18 times
faster than CP-SAT, with equal scores wherever they prove the optimum. For models of 9 layers all three are alike.
Refinement and the frontier solve hundreds of programs. docs/log.md has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.costs.budget import COST_WORDS, is_throughput
from layersmith.errors import Infeasible
from layersmith.search.core import GivesUp, best_near_bound
from layersmith.search.program import (
    MOST_NODES,
    Program,
    branched,
    nearest,
    not_dominated,
    relax,
    rows_of,
    without_idle_rows,
)
from layersmith.units import format_cost


@dataclass(frozen=True)
class Candidate:
    """One alternative for a group: its score (0 or more, lower is better) and its costs.

    Attributes:
        key: Its name.
        score: Its score.
        costs: Cost by name.
        is_parent: Whether it is the parent's subblock.
        changes: Number of subblocks that differ from the parent; among equal scores, the fewest changes win.
    """

    key: str
    score: float
    costs: Mapping[str, float]
    is_parent: bool = False
    changes: int = 1


@dataclass(frozen=True)
class Group:
    """Candidates, exactly one of which is chosen."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class ProgramSolution:
    """A solution of the program.

    Attributes:
        chosen: Key of the chosen candidate of each group, in the order of the groups.
        score: Sum of their scores.
        costs: Sums of their costs, with the fixed costs.
        bound: No solution within the limits has a lower score.
    """

    chosen: tuple[str, ...]
    score: float
    costs: dict[str, float]
    bound: float

    @property
    def proven_optimal(self) -> bool:
        """Whether no solution within the limits has a lower score."""
        return self.bound >= self.score


class Solver:
    """Solves the program for one set of limits after another.

    Args:
        groups: Groups of at least one candidate each.
        fixed: Costs outside the groups.
        parent_costs: Costs of the whole parent, for error messages.
        whole_of: Maps a cost and its sum over parts to the cost of the whole child, for error messages; default: the
            sum.

    Raises:
        ValueError: A score is negative or not finite.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        fixed: Mapping[str, float],
        parent_costs: Mapping[str, float] | None = None,
        whole_of: Callable[[str, float], float] = lambda cost, total: total,
    ):
        for group in groups:
            for candidate in group.candidates:
                if not (math.isfinite(candidate.score) and candidate.score >= 0):
                    raise ValueError(f"{group.name}: {candidate.key} has score {candidate.score}")
        self.groups, self.fixed, self.parent_costs, self._whole_of = groups, fixed, parent_costs, whole_of
        unchanged = [next((i for i, c in enumerate(g.candidates) if c.is_parent), None) for g in groups]
        self._parent = [i for i in unchanged if i is not None] if None not in unchanged else None
        self._not_dominated: dict[tuple[str, ...], list[np.ndarray]] = {}

    def solve(self, limits: Mapping[str, float]) -> ProgramSolution:
        """The best solution within the limits.

        Raises:
            Infeasible: No solution is within the limits; the message states the smallest possible child.
        """
        if self._parent is not None and score_of(self.groups, self._parent) == 0 and self._fits(self._parent, limits):
            return self._solution(self._parent, math.inf)
        self._refuse_unreachable(limits)
        program = self.program(limits)
        columns, bound = _without_loss(program), math.inf
        if columns is None:
            columns, bound = _best(program)
        if columns is None:
            raise Infeasible(self._together(limits))
        chosen = [int(i) for i in program.index[columns]]
        if not self._fits(chosen, limits):
            raise RuntimeError("the solver returned a solution that is not within the limits")
        return self._solution(chosen, bound)

    def reachable(self, limits: Mapping[str, float]) -> None:
        """Check that some solution is within the limits.

        Raises:
            Infeasible: No solution is within the limits.
        """
        if self._parent is not None and self._fits(self._parent, limits):
            return
        self._refuse_unreachable(limits)
        program = self.program(limits)
        if len(program.room) > 1 and branched(program, np.zeros_like(program.score)).columns is None:
            raise Infeasible(self._together(limits))

    def least(self, cost: str, limits: Mapping[str, float]) -> float:
        """The least total of a cost within limits on other costs; an upper bound of it if the node limit is reached.

        Raises:
            Infeasible: No solution is within the limits.
        """
        if not limits:
            return self._least_sum(cost)
        most = self.fixed.get(cost, 0) + sum(max(c.costs[cost] for c in g.candidates) for g in self.groups)
        program = self.program({**limits, cost: most})
        pairs = zip(program.group, program.index, strict=True)
        objective = np.array([float(self.groups[g].candidates[i].costs[cost]) for g, i in pairs])
        result = branched(program, objective, nodes=MOST_NODES)
        if result.columns is None and result.bound < math.inf:
            result = branched(program, objective)
        if result.columns is None:
            raise Infeasible(f"Infeasible: {', '.join(_words(name) for name in limits)} cannot be met together.")
        return total_of(self.groups, [int(i) for i in program.index[result.columns]], self.fixed, cost)

    def program(self, limits: Mapping[str, float]) -> Program:
        """The candidates as columns, without dominated ones, and the limits that may bind as rows."""
        names = tuple(limits)
        if names not in self._not_dominated:
            self._not_dominated[names] = [_not_dominated(group, names) for group in self.groups]
        places = [(g, int(i)) for g, kept in enumerate(self._not_dominated[names]) for i in kept]
        candidates = [self.groups[g].candidates[i] for g, i in places]
        group = np.array([g for g, _ in places])
        values = [[c.costs[name] for c in candidates] for name in names]
        cost, room, tolerance = rows_of(values, [limits[name] - self.fixed.get(name, 0) for name in names])
        most = np.zeros((len(self.groups), len(names)))
        if names:
            np.maximum.at(most, group, cost.T)
        cost, room, tolerance = without_idle_rows(cost, room, tolerance, most.sum(0) + tolerance)
        return Program(
            group=group,
            index=np.array([i for _, i in places]),
            score=np.array([c.score for c in candidates], dtype=np.float64),
            changes=np.array([0 if c.is_parent else c.changes for c in candidates], dtype=np.float64),
            cost=cost,
            room=room,
            tolerance=tolerance,
        )

    def _fits(self, chosen: Sequence[int], limits: Mapping[str, float]) -> bool:
        return within(self.groups, chosen, limits, self.fixed)

    def _least_sum(self, cost: str) -> float:
        return self.fixed.get(cost, 0) + sum(min(c.costs[cost] for c in g.candidates) for g in self.groups)

    def _solution(self, chosen: Sequence[int], bound: float) -> ProgramSolution:
        groups = self.groups
        names = groups[0].candidates[0].costs if groups else self.fixed
        score = score_of(groups, chosen)
        return ProgramSolution(
            chosen=tuple(g.candidates[i].key for g, i in zip(groups, chosen, strict=True)),
            score=score,
            costs={cost: total_of(groups, chosen, self.fixed, cost) for cost in names},
            bound=min(bound, score),
        )

    # ------------------------------------------------------------------------------------------ messages

    def _refuse_unreachable(self, limits: Mapping[str, float]) -> None:
        for cost, limit in limits.items():
            outside, least = self.fixed.get(cost, 0), self._least_sum(cost)
            if least > limit:
                parts = f", of which {self._amount(cost, outside)} outside the layers" if outside else ""
                if is_throughput(cost):  # whose parts do not add up
                    parts = ""
                raise Infeasible(
                    f"Infeasible: {_words(cost)} {self._amount(cost, limit)}. The {_extreme(cost)} child of this "
                    f"library has {self._amount(cost, least)}{parts}. Raise the budget, or allow more in the recipe's "
                    "library (narrower FFNs, no-ops)."
                )

    def _together(self, limits: Mapping[str, float]) -> str:
        possible = []
        for cost in limits:
            try:
                least = self.least(cost, {name: limit for name, limit in limits.items() if name != cost})
            except Infeasible:
                continue
            possible.append(f"{_words(cost)} can be {self._amount(cost, least)} at {_bound(cost)}")
        least_words = f" With the other limits kept, {', '.join(possible)}." if possible else ""
        return f"Infeasible: each limit can be met, but not all together.{least_words} Raise one of them."

    def _amount(self, cost: str, value: float) -> str:
        whole = (self.parent_costs or {}).get(cost)
        value = self._whole_of(cost, value)
        text = f"{value:g}" if ":" in cost else format_cost(cost, value)
        if is_throughput(cost):  # the throughput is one over this cost
            value, whole = whole or 0.0, value
        return f"{value / whole:.2f}x ({text})" if whole else text


def _without_loss(program: Program) -> np.ndarray | None:
    """The solution with score 0 and the fewest changes; None if no such solution is within the limits."""
    free = np.flatnonzero(program.score == 0)
    if len(np.unique(program.group[free])) < program.num_groups:
        return None
    part = program.only(free)
    if (part.least(part.cost).sum(1) > part.room + part.tolerance).any():
        return None
    columns = branched(part, part.changes).columns
    return None if columns is None else free[columns]


def _best(program: Program) -> tuple[np.ndarray | None, float]:
    """The columns of the best solution, and a bound on the score of any; infinite if the solution is proven optimal."""
    relaxed = relax(program)
    if relaxed is None:
        return None, math.inf
    try:
        return best_near_bound(program, relaxed), math.inf
    except GivesUp:
        result = nearest(program, relaxed)
    if result.columns is None:
        return None, math.inf
    score = math.fsum(program.score[result.columns])
    if score < relaxed.bound - 1e-6 * max(1e-300, score):
        raise RuntimeError(f"the solver's sum of scores {score!r} is below the relaxation's bound {relaxed.bound!r}")
    return result.columns, result.bound if result.bound < score else math.inf


def _not_dominated(group: Group, names: Sequence[str]) -> np.ndarray:
    candidates = group.candidates
    return not_dominated(
        np.array([c.score for c in candidates], dtype=np.float64),
        np.array([0 if c.is_parent else c.changes for c in candidates], dtype=np.float64),
        np.array([[float(c.costs[name]) for c in candidates] for name in names]).reshape(len(names), len(candidates)),
        np.array([c.is_parent for c in candidates]),
    )


# ---------------------------------------------------------------------------------------------- exact arithmetic


def score_of(groups: Sequence[Group], chosen: Sequence[int]) -> float:
    """Sum of the scores of the chosen candidates."""
    return math.fsum(g.candidates[i].score for g, i in zip(groups, chosen, strict=True))


def total_of(groups: Sequence[Group], chosen: Sequence[int], fixed: Mapping[str, float], cost: str) -> float:
    """Total of a cost: exact for whole numbers, rounded once for others."""
    values = [g.candidates[i].costs[cost] for g, i in zip(groups, chosen, strict=True)]
    if all(isinstance(value, int) for value in values):
        return fixed.get(cost, 0) + sum(values)
    return math.fsum([fixed.get(cost, 0), *values])


def within(
    groups: Sequence[Group], chosen: Sequence[int], limits: Mapping[str, float], fixed: Mapping[str, float]
) -> bool:
    """Whether a solution is within all limits; whole-number costs are compared exactly."""
    return all(
        total <= limit + (0 if isinstance(total, int) else 1e-9 * abs(limit))
        for cost, limit in limits.items()
        for total in (total_of(groups, chosen, fixed, cost),)
    )


def _words(cost: str) -> str:
    return COST_WORDS.get(cost) or cost.removeprefix("rule:").replace("_", " ")


def _extreme(cost: str) -> str:
    return "fastest" if cost.endswith("_seconds") else "smallest"


def _bound(cost: str) -> str:
    return "most" if is_throughput(cost) else "least"
