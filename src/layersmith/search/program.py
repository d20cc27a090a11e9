"""The integer program as arrays, its linear relaxation, and branch and cut by HiGHS.

Shapes: G groups, N columns (candidates that no other candidate of their group dominates), K limited costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

Floats = npt.NDArray[np.float64]

# Whole numbers up to here, and sums of them, are exact in float64.
_EXACT = 2**53
# HiGHS accepts rows that are violated by less than 1e-6. A solution that exceeds a limit by less is cut off and the
# program is solved again, at most this many times, which is never reached in practice.
_MOST_CUTS = 200
# HiGHS stops when the absolute gap is under 1e-6, which SciPy cannot change. With the largest objective at this value,
# the gap is 1e-11 of it.
_OBJECTIVE_SCALE = 1e5
# Node limit of branching, so that a search ends in about a minute; and the node limit of a first search for any good
# solution, which excludes columns whose waste exceeds the distance of that solution from the bound.
MOST_NODES, FIRST_NODES = 10_000, 200


@dataclass(frozen=True, eq=False)
class Program:
    """The candidates of all groups as columns, without dominated ones.

    Attributes:
        group: Group of each column, ``[N]``, ascending.
        index: Index of the candidate in its group, ``[N]``.
        score: Scores of at least 0, ``[N]``.
        changes: Numbers of subblocks that differ from the parent's, ``[N]``.
        cost: Costs, ``[K, N]``; whole numbers are in units of their greatest common divisor.
        room: Limit of the sum over groups of each cost, ``[K]``.
        tolerance: Tolerance of each limit, ``[K]``; 0 where sums are exact.
    """

    group: np.ndarray
    index: np.ndarray
    score: Floats
    changes: Floats
    cost: Floats
    room: Floats
    tolerance: Floats

    @property
    def num_groups(self) -> int:
        return int(self.group[-1]) + 1

    def only(self, columns: np.ndarray) -> Program:
        return Program(
            self.group[columns], self.index[columns], self.score[columns], self.changes[columns],
            self.cost[:, columns], self.room, self.tolerance,
        )  # fmt: skip

    def least(self, values: Floats) -> Floats:
        """``[..., G]``, the least of values ``[..., N]`` in each group."""
        return np.minimum.reduceat(values, np.searchsorted(self.group, np.arange(self.num_groups)), axis=-1)

    def is_within(self, columns: np.ndarray) -> bool:
        """Whether one column of each group is within all limits."""
        return bool((self.cost[:, columns].sum(1) <= self.room + self.tolerance).all())


def rows_of(values: Sequence[Sequence[float]], rooms: Sequence[float]) -> tuple[Floats, Floats, Floats]:
    """Cost ``[K, N]``, room and tolerance ``[K]`` of the limits; whole numbers stay whole."""
    cost, room, tolerance = np.empty((len(values), len(values[0]) if values else 0)), [], []
    for k, (row, row_room) in enumerate(zip(values, rooms, strict=True)):
        is_exact = False
        if all(isinstance(v, int) for v in row):
            unit = math.gcd(*(int(v) for v in row)) or 1
            cost[k] = whole = [int(v) // unit for v in row]
            room.append(float(math.floor(Fraction(row_room) / unit)))
            is_exact = max(whole, default=0) * 1000 < _EXACT
        else:
            cost[k] = row
            room.append(float(row_room))
        tolerance.append(0.0 if is_exact else 1e-9 * max(abs(room[-1]), float(np.abs(cost[k]).max(initial=0.0))))
    return cost, np.array(room), np.array(tolerance)


def without_idle_rows(cost: Floats, room: Floats, tolerance: Floats, most: Floats) -> tuple[Floats, Floats, Floats]:
    """Without limits that always hold (``most`` are the greatest sums), and the looser of two on equal costs."""
    kept: list[int] = []
    for k in np.argsort(room, kind="stable"):
        if most[k] > room[k] and not any(np.array_equal(cost[k], cost[j]) for j in kept):
            kept.append(int(k))
    kept.sort()
    return cost[kept], room[kept], tolerance[kept]


def not_dominated(score: Floats, changes: Floats, cost: Floats, is_parent: np.ndarray) -> np.ndarray:
    """Indices of candidates ``[n]`` that no other dominates; of equal ones the first, and always the parent.

    The parent is kept because the fewest changes win among equal scores.
    """
    values = np.concatenate([score[None], changes[None], cost])
    at_least_as_good = (values[:, :, None] <= values[:, None, :]).all(0)
    equal = at_least_as_good & at_least_as_good.T
    first = np.arange(len(score))[:, None] < np.arange(len(score))
    dominated = (at_least_as_good & (~equal | first)).any(0)
    return np.flatnonzero(~dominated | is_parent)


# ---------------------------------------------------------------------------------------------- the relaxation


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The optimum of the linear relaxation, with bounds for every column.

    Attributes:
        bound: No solution has a lower score.
        multipliers: ``[K]``, the score that one unit of each limited cost is worth.
        waste: ``[N]``, a lower bound on how far any solution with this column is above the bound. The score of a
            solution is the bound, plus the wastes of its columns, plus for each limit its multiplier times its slack.
    """

    bound: float
    multipliers: Floats
    waste: Floats


def relax(program: Program) -> Relaxation | None:
    """Solve the linear relaxation; None if even that is infeasible."""
    scale = float(program.score.max()) or 1.0
    multipliers = _multipliers(program, scale) if len(program.room) else np.zeros(0)
    if multipliers is None:
        return None
    reduced = program.score + multipliers @ program.cost
    least = program.least(reduced)
    bound = float(math.fsum(least) - multipliers @ program.room)
    return Relaxation(bound, multipliers, reduced - least[program.group])


def _multipliers(program: Program, scale: float) -> Floats | None:
    """``[K]``, the duals of the limits. Any values of at least 0 give a bound; these give the best."""
    units = np.maximum(np.abs(program.cost).max(1), 1e-300)
    answer = linprog(
        program.score / scale, A_ub=program.cost / units[:, None], b_ub=program.room / units, A_eq=_one_each(program),
        b_eq=np.ones(program.num_groups), method="highs",
    )  # fmt: skip
    if answer.status == 2:
        return None
    if answer.status != 0:
        raise RuntimeError(f"the linear relaxation could not be solved: {answer.message}")
    multipliers = np.maximum(-answer.ineqlin.marginals, 0.0) * scale / units
    multipliers[multipliers * units < 1e-12 * scale] = 0.0
    return multipliers


def _one_each(program: Program) -> Any:
    """``[G, N]``, sparse: the columns of each group, of which exactly one is taken."""
    n = len(program.group)
    return csr_array((np.ones(n), (program.group, np.arange(n))))


# ---------------------------------------------------------------------------------------------- HiGHS


@dataclass(frozen=True, eq=False)
class Branched:
    """The result of branch and cut.

    Attributes:
        columns: The column of each group, ``[G]``; None without a solution.
        bound: No solution has a lower sum; infinite if no solution is within the limits.
    """

    columns: np.ndarray | None
    bound: float


def nearest(program: Program, relaxed: Relaxation) -> Branched:
    """The solution with the lowest score within the node limits, and the bound that was reached."""
    first = branched(program, program.score, nodes=FIRST_NODES)
    if first.columns is None:
        return branched(program, program.score)
    least = math.fsum(program.score[first.columns])
    near = np.flatnonzero(relaxed.waste <= least - relaxed.bound + 1e-9 * float(program.score.max()))
    second = branched(program.only(near), program.score[near], nodes=MOST_NODES)
    bound = min(least, max(second.bound, first.bound, relaxed.bound))
    if second.columns is None or math.fsum(program.score[near[second.columns]]) > least:
        return Branched(first.columns, bound)
    return Branched(near[second.columns], bound)


def branched(program: Program, objective: Floats, nodes: int | None = None) -> Branched:
    """One column of each group with the lowest sum of an objective ``[N]`` within the limits, by HiGHS.

    Args:
        program: The program; its scores are not used.
        objective: ``[N]``, the values to sum.
        nodes: Node limit, at which the best solution so far is returned.
    """
    n = len(program.score)
    units = np.maximum(1.0, np.abs(program.room))
    rows: list[Any] = [_one_each(program), csr_array(program.cost / units[:, None])]
    lower = [np.ones(program.num_groups), np.full(len(units), -np.inf)]
    upper = [np.ones(program.num_groups), program.room / units]
    scale = (float(np.abs(objective).max()) or 1.0) / _OBJECTIVE_SCALE
    for _ in range(_MOST_CUTS):
        answer = milp(
            objective / scale,
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack(rows), np.concatenate(lower), np.concatenate(upper)),
            options={"mip_rel_gap": 0.0} | ({} if nodes is None else {"node_limit": nodes}),
        )
        ended = nodes is not None and answer.status not in (0, 2)
        if answer.x is None:
            if answer.status != 2 and not ended:
                raise RuntimeError(f"the integer program could not be solved: {answer.message}")
            return Branched(None, -math.inf if ended else math.inf)
        picked = np.flatnonzero(answer.x > 0.5)
        if not np.array_equal(program.group[picked], np.arange(program.num_groups)):
            raise RuntimeError("the solver left a group without a candidate")
        if program.is_within(picked):
            total = math.fsum(objective[picked])
            known = answer.mip_dual_bound * scale if ended and answer.mip_dual_bound is not None else -math.inf
            return Branched(picked, known if ended else total)
        cut = np.zeros(n)
        cut[picked] = 1.0
        rows.append(csr_array(cut[None]))
        lower.append(np.array([-np.inf]))
        upper.append(np.array([len(picked) - 1.0]))
    raise RuntimeError(f"no solution within the limits after {_MOST_CUTS} cuts")
