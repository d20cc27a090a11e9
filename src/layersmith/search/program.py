"""The integer program as arrays, its linear relaxation, and HiGHS where enumeration gives up.

Shapes: G groups, N columns (candidates that are left, by group), K limited costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

# Whole numbers up to here, and sums of them, are exact in float64.
_EXACT = 2**53
# HiGHS calls a row satisfied within 1e-6; a solution that is over a limit by less is cut off and the program is solved
# again. So many cuts are never needed in practice.
_MOST_CUTS = 200
# HiGHS stops when the absolute gap is under 1e-6, which SciPy gives no way to change; with the largest objective at
# this value the gap is 1e-11 of it.
_OBJECTIVE_SCALE = 1e5
# Nodes at which branching stops, so that a search ends in about a minute, and those that first find some solution: what
# is further above the bound than it is in no better one.
MOST_NODES, FIRST_NODES = 10_000, 200
# Columns of each group with which a relaxation starts that has multipliers from a neighbour.
_FIRST_COLUMNS = 4


@dataclass(frozen=True, eq=False)
class Program:
    """Columns of candidates that no other of their group is at least as good as in everything.

    Attributes:
        group: ``[N]``, ascending.
        index: ``[N]``, of the candidate in its group.
        score: ``[N]``, 0 or more.
        changes: ``[N]``, how many subblocks differ from the parent's.
        cost: ``[K, N]``, in units of their greatest common divisor where they are whole numbers.
        room: ``[K]``, what the groups may take of each.
        tolerance: ``[K]``, 0 where sums are exact.
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


def rows_of(values: Sequence[Sequence[float]], rooms: Sequence[float]) -> tuple[Floats, Floats, Floats]:
    """Costs, room and tolerance of every limit, from numbers as they are given; whole ones stay whole."""
    cost, room, tolerance = np.empty((len(values), len(values[0]) if values else 0)), [], []
    for k, (row, own_room) in enumerate(zip(values, rooms, strict=True)):
        if all(isinstance(v, int) for v in row):
            unit = math.gcd(*(int(v) for v in row)) or 1
            whole = [int(v) // unit for v in row]
            own = Fraction(own_room) / unit
            cost[k] = whole
            room.append(float(math.floor(own)))
            exact = max(whole, default=0) * 1000 < _EXACT
        else:
            cost[k] = row
            room.append(float(own_room))
            exact = False
        tolerance.append(0.0 if exact else 1e-9 * max(abs(room[-1]), float(np.abs(cost[k]).max(initial=0.0))))
    return cost, np.array(room), np.array(tolerance)


def without_idle_rows(cost: Floats, room: Floats, tolerance: Floats, most: Floats) -> tuple[Floats, Floats, Floats]:
    """Without limits that always hold (``most``, the greatest sums), and the looser of two on equal costs."""
    kept: list[int] = []
    for k in np.argsort(room, kind="stable"):
        if most[k] > room[k] and not any(np.array_equal(cost[k], cost[j]) for j in kept):
            kept.append(int(k))
    kept.sort()
    return cost[kept], room[kept], tolerance[kept]


def not_dominated(score: Floats, changes: Floats, cost: Floats, is_parent: np.ndarray) -> np.ndarray:
    """Indices of candidates ``[n]`` that no other is at least as good as; of equals the first, and always the parent.

    The parent stays because among equal scores the fewest changes are wanted.
    """
    values = np.concatenate([score[None], changes[None], cost])
    at_least_as_good = (values[:, :, None] <= values[:, None, :]).all(0)
    equal = at_least_as_good & at_least_as_good.T
    first = np.arange(len(score))[:, None] < np.arange(len(score))
    beaten = (at_least_as_good & (~equal | first)).any(0)
    return np.flatnonzero(~beaten | is_parent)


# ---------------------------------------------------------------------------------------------- the relaxation


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The optimum of the linear relaxation, and what it says of every column.

    Attributes:
        bound: no solution has a lower score.
        multipliers: ``[K]``, what a unit of each limited cost is worth.
        waste: ``[N]``, by how much any solution with this column is above the bound, at least. The score of a solution
            is the bound, the wastes of its columns, and for each limit its multiplier times what is left of it.
    """

    bound: float
    multipliers: Floats
    waste: Floats


def relax(program: Program, start: Floats | None = None) -> Relaxation | None:
    """Solve the relaxation; None if even it has no solution.

    Args:
        program: what to solve.
        start: multipliers of a neighbouring program; then columns are added to a few as they prove useful.
    """
    scale = float(program.score.max()) or 1.0
    if start is None:
        found = _linear(program, scale)
        return None if found is None else _relaxation(program, found)
    reduced = program.score + start @ program.cost
    reduced -= program.least(reduced)[program.group]
    order = np.lexsort((reduced, program.group))
    rank = np.arange(len(order)) - np.searchsorted(program.group, program.group[order])
    used = np.zeros(len(program.score), dtype=bool)
    used[order[rank < _FIRST_COLUMNS]] = True
    used |= (program.cost == program.least(program.cost)[:, program.group]).any(0)
    while True:
        columns = np.flatnonzero(used)
        found = _linear(program.only(columns), scale)
        if found is None:
            return relax(program)
        whole = _relaxation(program, found)
        reduced = program.score + whole.multipliers @ program.cost
        within = np.full(program.num_groups, np.inf)
        np.minimum.at(within, program.group[columns], reduced[columns])
        missing = reduced < within[program.group] - 1e-9 * scale
        if not missing.any():
            return whole
        used |= missing


def _relaxation(program: Program, multipliers: Floats) -> Relaxation:
    """Any multipliers give a bound; those of the linear program give the best."""
    reduced = program.score + multipliers @ program.cost
    least = program.least(reduced)
    return Relaxation(float(math.fsum(least) - multipliers @ program.room), multipliers, reduced - least[program.group])


def _linear(program: Program, scale: float) -> Floats | None:
    """Multipliers ``[K]`` at the optimum of the relaxation."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    n = len(program.score)
    if not len(program.room):
        return np.zeros(0)
    one_each = csr_array((np.ones(n), (program.group, np.arange(n))))
    units = np.maximum(np.abs(program.cost).max(1), 1e-300)
    answer = linprog(
        program.score / scale, A_ub=program.cost / units[:, None], b_ub=program.room / units, A_eq=one_each,
        b_eq=np.ones(program.num_groups), method="highs",
    )  # fmt: skip
    if answer.status == 2:
        return None
    if answer.status != 0:
        raise RuntimeError(f"the linear relaxation could not be solved: {answer.message}")
    multipliers = np.maximum(-answer.ineqlin.marginals, 0.0) * scale / units
    multipliers[multipliers * units < 1e-12 * scale] = 0.0
    return multipliers


# ---------------------------------------------------------------------------------------------- HiGHS


@dataclass(frozen=True, eq=False)
class Branched:
    """What branching found.

    Attributes:
        columns: ``[G]``; None if nothing was found.
        bound: no solution has a lower sum; infinite where none fits.
    """

    columns: np.ndarray | None
    bound: float


def columns_near(program: Program, relaxed: Relaxation, score: float) -> np.ndarray:
    """The columns that a solution with at most this score can have: others waste more than it is above the bound."""
    return np.flatnonzero(relaxed.waste <= score - relaxed.bound + 1e-9 * float(program.score.max()))


def nearest(program: Program, relaxed: Relaxation) -> Branched:
    """The solution with the least score as far as it is found in so many nodes, and the bound that was reached."""
    first = branched(program, program.score, nodes=FIRST_NODES)
    if first.columns is None:
        return branched(program, program.score)
    least = math.fsum(program.score[first.columns])
    near = columns_near(program, relaxed, least)
    again = branched(program.only(near), program.score[near], nodes=MOST_NODES)
    bound = min(least, max(again.bound, first.bound, relaxed.bound))
    if again.columns is None or math.fsum(program.score[near[again.columns]]) > least:
        return Branched(first.columns, bound)
    return Branched(near[again.columns], bound)


def by_branch_and_cut(
    program: Program, objective: Floats, score_limit: float | None = None, nodes: int | None = None
) -> np.ndarray | None:
    """The columns ``[G]`` with the least sum of an objective ``[N]``, or None if no solution fits; by HiGHS."""
    return branched(program, objective, score_limit, nodes).columns


def branched(
    program: Program, objective: Floats, score_limit: float | None = None, nodes: int | None = None
) -> Branched:
    """As :func:`by_branch_and_cut`, with the bound.

    Args:
        program: whose solutions are looked at.
        objective: ``[N]``, its sum is to be least.
        score_limit: the sum of scores is at most this.
        nodes: at most so many are looked at; then the best solution until there is returned.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    n = len(program.score)
    rows: list[Any] = [csr_array((np.ones(n), (program.group, np.arange(n))))]
    lower, upper = [np.ones(program.num_groups)], [np.ones(program.num_groups)]

    def at_most(row: Floats, bound: float) -> None:
        rows.append(csr_array(row[None, :]))
        lower.append(np.array([-np.inf]))
        upper.append(np.array([bound]))

    for row, room in zip(program.cost, program.room, strict=True):
        unit = max(1.0, abs(room))
        at_most(row / unit, room / unit)
    if score_limit is not None:
        unit = score_limit or 1.0
        at_most(program.score / unit, score_limit / unit)
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
        if (program.cost[:, picked].sum(1) <= program.room + program.tolerance).all():
            total = math.fsum(objective[picked])
            known = answer.mip_dual_bound * scale if ended and answer.mip_dual_bound is not None else -math.inf
            return Branched(picked, known if ended else total)
        cut = np.zeros(n)
        cut[picked] = 1.0
        at_most(cut, len(picked) - 1.0)
    raise RuntimeError(f"no solution within the limits after {_MOST_CUTS} cuts")
