"""The integer program: one candidate of each group, the sum of scores least, costs within limits.

minimise   sum over g, c of score[g, c] x[g, c]
subject to sum over c of x[g, c] = 1 for every group g,
           fixed[k] + sum over g, c of cost[k, g, c] x[g, c] <= limit[k] for every limited cost k,
           x binary.

Source: arXiv 2411.19146, section 4.3. The optimum is found by enumerating everything near the bound of the linear
relaxation (:mod:`layersmith.search.core`), which is exact and fast where layers are many; where too much is near the
bound, HiGHS branches and cuts. Either way the answer is recomputed in exact integers. Costs that have nothing to do
with each other, with limits that all bind, can be beyond any solver: after so many nodes the best solution that was
found is given, with the bound that was reached.

The parent scores 0 and nothing scores less, so it is the answer whenever it fits. Of solutions with equal scores the
one with fewer changes is taken.
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
    Floats,
    Program,
    Relaxation,
    branched,
    by_branch_and_cut,
    columns_near,
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
        key: names it.
        changes: in how many subblocks it differs from the parent; of equal scores the fewest are wanted.
    """

    key: str
    score: float
    costs: Mapping[str, float]
    is_parent: bool = False
    changes: int = 1


@dataclass(frozen=True)
class Group:
    """The candidates of which one is chosen."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class ProgramSolution:
    """The solution.

    Attributes:
        chosen: key of the candidate of each group, in the order of the groups.
        score: sum of its scores.
        costs: sums of its costs, what is fixed included.
        bound: no solution within the limits has a lower score.
    """

    chosen: tuple[str, ...]
    score: float
    costs: dict[str, float]
    bound: float

    @property
    def proven_optimal(self) -> bool:
        """Whether no solution within the limits has a lower score."""
        return self.bound >= self.score


def solve(
    groups: Sequence[Group],
    limits: Mapping[str, float],
    fixed: Mapping[str, float],
    *,
    parent_costs: Mapping[str, float] | None = None,
) -> ProgramSolution:
    """The best solution within the limits.

    Args:
        groups: at least one candidate each.
        limits: cost to its upper limit.
        fixed: costs outside the groups.
        parent_costs: of the whole parent, for the words of errors.

    Raises:
        Infeasible: no solution is within the limits; the message says what the smallest is.
        ValueError: a score that is negative or not a number.
    """
    return Solver(groups, fixed, parent_costs).solve(limits)


class Solver:
    """Answers one budget after another; what one took to find helps the next.

    Args:
        groups: at least one candidate each.
        fixed: costs outside the groups.
        parent_costs: of the whole parent, for the words of errors.
        whole_of: what a total of a cost stands for, for the words of errors; default: itself.
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
        self._kept: dict[tuple[str, ...], list[np.ndarray]] = {}
        self._multipliers: dict[str, float] = {}

    def solve(self, limits: Mapping[str, float]) -> ProgramSolution:
        """The best solution within the limits; see :func:`solve`."""
        groups = self.groups
        parent = self._parent
        if parent is not None and score_of(groups, parent) == 0 and within(groups, parent, limits, self.fixed):
            return self._solution(parent, math.inf)
        self._refuse_unreachable(limits)
        program, names = self._program(limits)
        columns, bound = self._without_loss(program), math.inf
        if columns is None:
            columns, bound = self._best(program, names)
        if columns is None:
            raise Infeasible(self._together(limits))
        chosen = [int(i) for i in program.index[columns]]
        if not within(groups, chosen, limits, self.fixed):
            raise RuntimeError("the solution that was found is not within the limits")
        return self._solution(chosen, bound)

    def reachable(self, limits: Mapping[str, float]) -> None:
        """Raises: Infeasible: no solution is within the limits."""
        if self._parent is not None and within(self.groups, self._parent, limits, self.fixed):
            return
        self._refuse_unreachable(limits)
        program, _ = self._program(limits)
        if len(program.room) > 1 and by_branch_and_cut(program, np.zeros_like(program.score)) is None:
            raise Infeasible(self._together(limits))

    def least(self, cost: str, limits: Mapping[str, float]) -> float:
        """The least total of a cost within limits on others, as far as it is found in so many nodes.

        Raises:
            Infeasible: no solution is within the limits.
        """
        fixed = self.fixed.get(cost, 0)
        if not limits:
            return fixed + sum(min(c.costs[cost] for c in g.candidates) for g in self.groups)
        most = fixed + sum(max(c.costs[cost] for c in g.candidates) for g in self.groups)
        program, _ = self._program({**limits, cost: most})
        objective = self._column_costs(program, cost)
        found = branched(program, objective, nodes=MOST_NODES)
        columns = found.columns
        if columns is None and found.bound < math.inf:
            columns = by_branch_and_cut(program, objective)
        if columns is None:
            raise Infeasible(f"Infeasible: {', '.join(_words(name) for name in limits)} cannot be met together.")
        return total_of(self.groups, [int(i) for i in program.index[columns]], self.fixed, cost)

    # ------------------------------------------------------------------------------------------ the program

    def _program(self, limits: Mapping[str, float]) -> tuple[Program, list[str]]:
        """The program, and a name for each of its rows."""
        names = tuple(limits)
        if names not in self._kept:
            self._kept[names] = [_kept(group, names) for group in self.groups]
        places = [(g, int(i)) for g, own in enumerate(self._kept[names]) for i in own]
        candidates = [self.groups[g].candidates[i] for g, i in places]
        group = np.array([g for g, _ in places])
        values = [[c.costs[name] for c in candidates] for name in names]
        cost, room, tolerance = rows_of(values, [limits[name] - self.fixed.get(name, 0) for name in names])
        most = np.zeros((len(self.groups), len(names)))
        np.maximum.at(most, group, cost.T) if len(names) else None
        rows = without_idle_rows(cost, room, tolerance, most.sum(0) + tolerance)
        kept_names = [names[int(np.flatnonzero((cost == row).all(1))[0])] for row in rows[0]]
        program = Program(
            group,
            np.array([i for _, i in places]),
            np.array([c.score for c in candidates], dtype=np.float64),
            np.array([0 if c.is_parent else c.changes for c in candidates], dtype=np.float64),
            *rows,
        )
        return program, kept_names

    def _without_loss(self, program: Program) -> np.ndarray | None:
        """Of solutions that lose nothing the one with fewest changes, if there is one within the limits."""
        free = np.flatnonzero(program.score == 0)
        own = program.group[free]
        if len(np.unique(own)) < program.num_groups:
            return None
        part = program.only(free)
        if (part.least(part.cost).sum(1) > part.room + part.tolerance).any():
            return None
        found = by_branch_and_cut(part, part.changes)
        return None if found is None else free[found]

    def _best(self, program: Program, names: Sequence[str]) -> tuple[np.ndarray | None, float]:
        """The columns of the best solution, and the bound; infinite where it is proven to be the best."""
        start = np.array([self._multipliers.get(name, math.nan) for name in names])
        relaxed = relax(program, None if np.isnan(start).any() else start)
        if relaxed is None:
            return None, math.inf
        self._multipliers |= dict(zip(names, relaxed.multipliers.tolist(), strict=True))
        try:
            return best_near_bound(program, relaxed), math.inf
        except GivesUp:
            return _by_highs(program, relaxed)

    def _solution(self, chosen: Sequence[int], bound: float) -> ProgramSolution:
        groups = self.groups
        names = groups[0].candidates[0].costs if groups else self.fixed
        score = score_of(groups, chosen)
        return ProgramSolution(
            tuple(g.candidates[i].key for g, i in zip(groups, chosen, strict=True)),
            score,
            {cost: total_of(groups, chosen, self.fixed, cost) for cost in names},
            min(bound, score),
        )

    # ------------------------------------------------------------------------------------------ what to say

    def _refuse_unreachable(self, limits: Mapping[str, float]) -> None:
        for cost, limit in limits.items():
            outside = self.fixed.get(cost, 0)
            least = outside + sum(min(c.costs[cost] for c in g.candidates) for g in self.groups)
            if least > limit:
                parts = f", of which {self._amount(cost, outside)} outside the layers" if outside else ""
                if is_throughput(cost):  # whose parts do not add up
                    parts = ""
                raise Infeasible(
                    f"Infeasible: {_words(cost)} {self._amount(cost, limit)}. The {_extreme(cost)} child this library "
                    f"can give is {self._amount(cost, least)}{parts}. Raise the budget, or allow more in the recipe's "
                    "library (narrower FFNs, no-ops)."
                )

    def _together(self, limits: Mapping[str, float]) -> str:
        said = []
        for cost in limits:
            try:
                least = self.least(cost, {name: limit for name, limit in limits.items() if name != cost})
            except Infeasible:
                continue
            said.append(f"{_words(cost)} can be {self._amount(cost, least)} at {_bound(cost)}")
        possible = f" With the others kept, {', '.join(said)}." if said else ""
        return f"Infeasible: each limit can be met, but not all together.{possible} Raise one of them."

    def _column_costs(self, program: Program, cost: str) -> Floats:
        pairs = zip(program.group, program.index, strict=True)
        return np.array([float(self.groups[g].candidates[i].costs[cost]) for g, i in pairs])

    def _amount(self, cost: str, value: float) -> str:
        whole = (self.parent_costs or {}).get(cost)
        value = self._whole_of(cost, value)
        text = f"{value:g}" if ":" in cost else format_cost(cost, value)
        if is_throughput(cost):  # one over the cost is what people mean
            value, whole = whole or 0.0, value
        return f"{value / whole:.2f}x ({text})" if whole else text


def _by_highs(program: Program, relaxed: Relaxation) -> tuple[np.ndarray | None, float]:
    """The best solution, and of equals the one with fewest changes (the program is solved again for that); and a bound
    on the score of any, infinite where the solution is proven to be the best."""
    found = nearest(program, relaxed)
    best = found.columns
    if best is None:
        return None, math.inf
    least = math.fsum(program.score[best])
    if least < relaxed.bound - 1e-6 * max(1e-300, least):
        raise RuntimeError(f"the solver says the scores sum to {least!r}, which is below {relaxed.bound!r}")
    if found.bound < least:
        return best, found.bound
    near = columns_near(program, relaxed, least)
    again = by_branch_and_cut(program.only(near), program.changes[near], score_limit=least, nodes=MOST_NODES)
    if again is None or math.fsum(program.score[near[again]]) > least:  # equal within rounding is not equal
        return best, math.inf
    return near[again], math.inf


def _kept(group: Group, names: Sequence[str]) -> np.ndarray:
    own = group.candidates
    return not_dominated(
        np.array([c.score for c in own], dtype=np.float64),
        np.array([0 if c.is_parent else c.changes for c in own], dtype=np.float64),
        np.array([[float(c.costs[name]) for c in own] for name in names]).reshape(len(names), len(own)),
        np.array([c.is_parent for c in own]),
    )


# ---------------------------------------------------------------------------------------------- exact arithmetic


def score_of(groups: Sequence[Group], chosen: Sequence[int]) -> float:
    return math.fsum(g.candidates[i].score for g, i in zip(groups, chosen, strict=True))


def total_of(groups: Sequence[Group], chosen: Sequence[int], fixed: Mapping[str, float], cost: str) -> float:
    """Exact for whole numbers, rounded once for others."""
    own = [g.candidates[i].costs[cost] for g, i in zip(groups, chosen, strict=True)]
    if all(isinstance(value, int) for value in own):
        return fixed.get(cost, 0) + sum(own)
    return math.fsum([fixed.get(cost, 0), *own])


def within(
    groups: Sequence[Group], chosen: Sequence[int], limits: Mapping[str, float], fixed: Mapping[str, float]
) -> bool:
    """Whether a solution is within all limits; costs that are whole numbers in exact integers."""
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
