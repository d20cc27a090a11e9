"""The integer program: one candidate of each group, the sum of scores least, costs within limits.

minimise   sum over g, c of score[g, c] x[g, c]
subject to sum over c of x[g, c] = 1 for every group g,
           fixed[k] + sum over g, c of cost[k, g, c] x[g, c] <= limit[k] for every limited cost k,
           x binary.

Source: arXiv 2411.19146, section 4.3. HiGHS solves it; its answer is recomputed in exact integers and compared.

The parent scores 0 and nothing scores less, so it is the answer whenever it fits. Of choices with equal scores the one
with fewer changes is taken: the program is solved again for it, with the sum of scores held at its optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layersmith.errors import Infeasible
from layersmith.search.budget import format_bytes, format_count

if TYPE_CHECKING:
    import numpy as np

# HiGHS calls a row satisfied within 1e-6. A choice that is over its limit by less is cut off and the program is
# solved again; this many cuts are never needed in practice.
_MOST_CUTS = 200
# HiGHS stops when the absolute gap is under 1e-6, which SciPy gives no way to change; with the largest score at this
# value the gap is 1e-11 of it.
_OBJECTIVE_SCALE = 1e5


@dataclass(frozen=True)
class Candidate:
    """One alternative for a group: its score (0 or more, lower is better) and its costs."""

    key: str
    score: float
    costs: Mapping[str, int]
    is_parent: bool = False


@dataclass(frozen=True)
class Group:
    """The candidates of which one is chosen."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Solution:
    """The choice.

    Attributes:
        chosen: key of the candidate of each group, in the order of the groups.
        score: sum of its scores.
        costs: sums of its costs, what is fixed included.
        proven_optimal: whether no choice within the limits has a lower score.
    """

    chosen: tuple[str, ...]
    score: float
    costs: dict[str, int]
    proven_optimal: bool


def solve(
    groups: Sequence[Group],
    limits: Mapping[str, int],
    fixed: Mapping[str, int],
    *,
    parent_costs: Mapping[str, int] | None = None,
) -> Solution:
    """The best choice within the limits.

    Args:
        groups: at least one candidate each.
        limits: cost to its upper limit.
        fixed: costs outside the groups.
        parent_costs: of the whole parent, for the words of errors.

    Raises:
        Infeasible: no choice is within the limits; the message says what the smallest is.
        ValueError: a score that is negative or not a number.
    """
    for group in groups:
        for candidate in group.candidates:
            if not (math.isfinite(candidate.score) and candidate.score >= 0):
                raise ValueError(f"{group.name}: {candidate.key} has score {candidate.score}")
    unchanged = [next((i for i, c in enumerate(g.candidates) if c.is_parent), None) for g in groups]
    if None not in unchanged:
        parent = [i for i in unchanged if i is not None]
        if _score(groups, parent) == 0 and within(groups, parent, limits, fixed):
            return _solution(groups, parent, fixed, True)
    _refuse_unreachable(groups, limits, fixed, parent_costs)
    kept = [_not_dominated(group, list(limits)) for group in groups]
    program = _Program(groups, kept, limits, fixed)
    chosen = program.best()
    if chosen is None:
        raise Infeasible(_together(program, limits, parent_costs))
    chosen = program.fewest_changes(chosen)
    return _solution(groups, chosen, fixed, True)


# ---------------------------------------------------------------------------------------------- exact arithmetic


def _score(groups: Sequence[Group], chosen: Sequence[int]) -> float:
    return math.fsum(g.candidates[i].score for g, i in zip(groups, chosen, strict=True))


def _total(groups: Sequence[Group], chosen: Sequence[int], fixed: Mapping[str, int], cost: str) -> int:
    return fixed.get(cost, 0) + sum(g.candidates[i].costs[cost] for g, i in zip(groups, chosen, strict=True))


def within(groups: Sequence[Group], chosen: Sequence[int], limits: Mapping[str, int], fixed: Mapping[str, int]) -> bool:
    """Whether a choice is within all limits, in exact integers."""
    return all(_total(groups, chosen, fixed, cost) <= limit for cost, limit in limits.items())


def _solution(groups: Sequence[Group], chosen: Sequence[int], fixed: Mapping[str, int], proven: bool) -> Solution:
    names = groups[0].candidates[0].costs if groups else fixed
    return Solution(
        tuple(g.candidates[i].key for g, i in zip(groups, chosen, strict=True)),
        _score(groups, chosen),
        {cost: _total(groups, chosen, fixed, cost) for cost in names},
        proven,
    )


def _not_dominated(group: Group, costs: Sequence[str]) -> list[int]:
    """Candidates that no other of the group is at least as good as in everything that counts.

    Of equals the first is kept. The parent always is: among equal scores the fewest changes are wanted.
    """
    kept = []
    for i, own in enumerate(group.candidates):
        own_values = (own.score, *(own.costs[c] for c in costs))
        for j, other in enumerate(group.candidates):
            values = (other.score, *(other.costs[c] for c in costs))
            if own.is_parent or i == j or any(a > b for a, b in zip(values, own_values, strict=True)):
                continue
            if values != own_values or other.is_parent or j < i:
                break
        else:
            kept.append(i)
    return kept


# ---------------------------------------------------------------------------------------------- the program


class _Program:
    """The program for HiGHS, over the candidates that are kept."""

    def __init__(
        self, groups: Sequence[Group], kept: list[list[int]], limits: Mapping[str, int], fixed: Mapping[str, int]
    ):
        import numpy as np

        self.groups, self.limits, self.fixed = groups, limits, fixed
        self.columns = [(g, i) for g, members in enumerate(kept) for i in members]
        self.scores = np.array([groups[g].candidates[i].score for g, i in self.columns])
        self.changes = np.array([0.0 if groups[g].candidates[i].is_parent else 1.0 for g, i in self.columns])
        self.cuts: list[list[int]] = []

    def costs_of(self, cost: str) -> np.ndarray:
        import numpy as np

        return np.array([float(self.groups[g].candidates[i].costs[cost]) for g, i in self.columns])

    def best(self) -> list[int] | None:
        """The choice with the least sum of scores, or None if there is none within the limits."""
        scale = (float(self.scores.max()) or 1.0) / _OBJECTIVE_SCALE
        chosen, value = self._solve(self.scores / scale, self.limits)
        if chosen is None:
            return None
        recomputed = _score(self.groups, chosen)
        solvers = value * scale
        if abs(recomputed - solvers) > 1e-6 * max(1.0, abs(recomputed)):
            raise RuntimeError(f"the solver says the scores sum to {solvers!r}, but they sum to {recomputed!r}")
        return chosen

    def fewest_changes(self, chosen: list[int]) -> list[int]:
        """A choice with the same sum of scores and fewest changes to the parent."""
        bound = _score(self.groups, chosen)
        again, _ = self._solve(self.changes, self.limits, score_limit=bound)
        if again is None or _score(self.groups, again) > bound:  # equal within rounding is not equal
            return chosen
        return again

    def least(self, cost: str) -> int | None:
        """The least total of one cost with all other limits kept."""
        values = self.costs_of(cost)
        limits = {name: limit for name, limit in self.limits.items() if name != cost}
        chosen, _ = self._solve(values / (values.max() or 1.0), limits)
        return None if chosen is None else _total(self.groups, chosen, self.fixed, cost)

    def _solve(
        self, objective: np.ndarray, limits: Mapping[str, int], score_limit: float | None = None
    ) -> tuple[list[int] | None, float]:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        n = len(self.columns)
        one_each = csr_array(
            (np.ones(n), (np.array([g for g, _ in self.columns]), np.arange(n))), shape=(len(self.groups), n)
        )
        rows: list[Any] = [one_each]
        lower, upper = [np.ones(len(self.groups))], [np.ones(len(self.groups))]

        def at_most(row: np.ndarray, bound: float) -> None:
            rows.append(csr_array(row[None, :]))
            lower.append(np.array([-np.inf]))
            upper.append(np.array([bound]))

        for cost, limit in limits.items():
            room = limit - self.fixed.get(cost, 0)
            # In units of their greatest common divisor, costs are as small as they can be while they stay whole.
            values = [self.groups[g].candidates[i].costs[cost] for g, i in self.columns]
            unit = math.gcd(*values) or 1
            scale = float(max(1, room // unit))
            at_most(np.array([v // unit / scale for v in values]), (room // unit) / scale)
        if score_limit is not None:
            scale = score_limit or 1.0
            at_most(self.scores / scale, score_limit / scale)
        for _ in range(_MOST_CUTS):
            answer = milp(
                objective,
                integrality=np.ones(n),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(vstack(rows), np.concatenate(lower), np.concatenate(upper)),
                options={"mip_rel_gap": 0.0},
            )
            if answer.x is None:
                return None, math.inf
            picked = np.flatnonzero(answer.x > 0.5)
            chosen = [-1] * len(self.groups)
            for column in picked:
                group, index = self.columns[column]
                chosen[group] = index
            if -1 in chosen:
                raise RuntimeError("the solver left a group without a candidate")
            if within(self.groups, chosen, limits, self.fixed):
                return chosen, float(answer.fun)
            # Over a limit by less than the solver's tolerance: not this choice.
            cut = np.zeros(n)
            cut[picked] = 1.0
            at_most(cut, len(picked) - 1.0)
        raise RuntimeError(f"no choice within the limits after {_MOST_CUTS} cuts")


# ---------------------------------------------------------------------------------------------- what to say


def _refuse_unreachable(
    groups: Sequence[Group],
    limits: Mapping[str, int],
    fixed: Mapping[str, int],
    parent_costs: Mapping[str, int] | None,
) -> None:
    for cost, limit in limits.items():
        least = fixed.get(cost, 0) + sum(min(c.costs[cost] for c in g.candidates) for g in groups)
        if least > limit:
            outside = fixed.get(cost, 0)
            parts = f", of which {_amount(cost, outside, parent_costs)} outside the layers" if outside else ""
            raise Infeasible(
                f"Infeasible: {cost.replace('_', ' ')} {_amount(cost, limit, parent_costs)}. The smallest child this "
                f"library can give is {_amount(cost, least, parent_costs)}{parts}. Raise the budget, or allow more in "
                "the recipe's library (narrower FFNs, no-ops)."
            )


def _together(program: _Program, limits: Mapping[str, int], parent_costs: Mapping[str, int] | None) -> str:
    said = []
    for cost in limits:
        least = program.least(cost)
        if least is not None:
            said.append(f"{cost.replace('_', ' ')} can be {_amount(cost, least, parent_costs)} at least")
    return (
        "Infeasible: each limit can be met, but not all together. With the others kept, "
        + ", ".join(said)
        + ". Raise one of them."
    )


def _amount(cost: str, value: int, parent_costs: Mapping[str, int] | None) -> str:
    text = format_bytes(value) if cost.endswith("bytes") else format_count(value)
    whole = (parent_costs or {}).get(cost)
    return f"{value / whole:.2f}x ({text})" if whole else text
