"""The optimum of the integer program, by enumerating every solution near its linear bound.

By duality, the score of every solution within the limits is

    bound + sum over its columns of their waste + sum over limits of multiplier * unused part of the limit,

where all terms are at least 0. Few solutions have terms that sum to less than a small gap, so all of them are
enumerated. The gap grows until one of them is within the limits; the best of these is then proven optimal.

The groups are divided into two halves. For each half, all partial solutions are listed whose wastes sum to at most the
gap. Then pairs of partial solutions are combined whose unused limits also fit into the gap; sorting one limited cost
finds them without trying all pairs.

Source: enumeration by halves is Horowitz and Sahni, "Computing Partitions with Applications to the Knapsack Problem"
(1974); the core near the bound is Balas and Zemel, "An Algorithm for Large Zero-One Knapsack Problems" (1980).

Shapes: G groups, N columns, K limited costs, S partial solutions of a half, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.search.program import Floats, Program, Relaxation

# The first gap admits about _FIRST solutions, and each further one _MORE times as many. A small first gap is cheap and
# often enough; small steps repeat work, and large ones overshoot.
_FIRST, _MORE = 3e3, 6.0
# Enumeration gives up above these sizes, which bound its memory and time; then HiGHS branches and cuts.
_MOST_STATES, _MOST_PAIRS = 4_000_000, 300_000_000
# Pairs that are held in memory at once.
_CHUNK = 1_000_000
# Wastes are rounded to this many steps of the gap when solutions are counted; only the choice of the gap depends on it.
_BINS = 256
# Scores that differ by less than this share of the largest are equal: rounding of float64 sums is below it.
_EQUAL = 1e-13


class GivesUp(Exception):
    """Too many solutions are near the bound."""


def best_near_bound(program: Program, relaxed: Relaxation) -> np.ndarray | None:
    """Columns ``[G]`` of the solution with the lowest score, and of equal ones the fewest changes; None if none fits.

    Raises:
        GivesUp: The enumeration would be too large.
    """
    enumeration = _Enumeration(program, relaxed)
    widest = enumeration.widest_gap()
    target = _FIRST
    while True:
        gap = enumeration.gap_for(target, widest)
        columns = enumeration.best_within(gap)
        if columns is not None or gap >= widest:
            return columns
        target *= _MORE


@dataclass(eq=False)
class _Half:
    """All partial solutions of some groups whose wastes sum to at most the gap, least waste first.

    Attributes:
        waste: ``[S]``.
        score: ``[S]``.
        changes: ``[S]``.
        cost: ``[K, S]``.
        steps: For each group, which partial solution of the groups before was extended, and by which column.
    """

    waste: Floats
    score: Floats
    changes: Floats
    cost: Floats
    steps: list[tuple[np.ndarray, np.ndarray]]

    def columns(self, state: int) -> list[int]:
        """The columns of one partial solution."""
        columns = []
        for extended, column in reversed(self.steps):
            columns.append(int(column[state]))
            state = int(extended[state])
        return columns


class _Enumeration:
    """One program, its relaxation, and its columns by group."""

    def __init__(self, program: Program, relaxed: Relaxation):
        self.program, self.relaxed = program, relaxed
        self.groups = [np.flatnonzero(program.group == g) for g in range(program.num_groups)]
        self.scale = float(program.score.max()) or 1.0
        self.equal = _EQUAL * self.scale

    def widest_gap(self) -> float:
        """The gap that admits every solution: the largest wastes, and limits that are not used at all."""
        program, relaxed = self.program, self.relaxed
        wastes = sum(relaxed.waste[columns].max() for columns in self.groups)
        unused = program.room - program.least(program.cost).sum(1)
        return float(wastes) + float(relaxed.multipliers @ np.maximum(unused, 0)) + self.equal

    def gap_for(self, target: float, widest: float) -> float:
        """A gap that about ``target`` solutions' wastes fit into, by bisection."""
        low, high = 1e-12 * self.scale, widest
        if self._count(high) <= target:
            return high
        for _ in range(20):
            middle = math.sqrt(low * high)
            if self._count(middle) > target:
                high = middle
            else:
                low = middle
        return high

    def _count(self, gap: float) -> float:
        """About how many solutions have wastes that sum to at most the gap."""
        counts = np.zeros(_BINS + 1)
        counts[0] = 1.0
        for columns in self.groups:  # many candidates make infinitely many solutions, which is more than any target
            wastes = self.relaxed.waste[columns]
            steps = np.rint(wastes[wastes <= gap] / gap * _BINS).astype(int)
            if len(steps) > 1:
                extended = np.zeros(_BINS + 1)
                with np.errstate(over="ignore"):
                    for step in steps:
                        extended[step:] += counts[: _BINS + 1 - step]
                counts = extended
        return float(counts.sum())

    def best_within(self, gap: float) -> np.ndarray | None:
        """The best solution within the limits and the gap, or None."""
        program, waste = self.program, self.relaxed.waste
        near = [columns[waste[columns] <= gap] for columns in self.groups]
        settled = [int(columns[0]) for columns in near if len(columns) == 1]
        undecided = sorted(
            (columns for columns in near if len(columns) > 1),
            key=lambda columns: float(np.exp(-3 * waste[columns] / gap).sum()),
        )
        one, other = (self._half(undecided[start::2], gap) for start in (0, 1))
        swapped = len(one.waste) > len(other.waste)
        room = program.room - program.cost[:, settled].sum(1)
        pair = self._best_pair(*((other, one) if swapped else (one, other)), room, gap)
        if pair is None:
            return None
        first, second = pair[::-1] if swapped else pair
        columns = [*settled, *one.columns(first), *other.columns(second)]
        return np.array(sorted(columns, key=lambda column: int(program.group[column])))

    def _half(self, groups: Sequence[np.ndarray], gap: float) -> _Half:
        program, relaxed = self.program, self.relaxed
        half = _Half(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((len(program.room), 1)), [])
        for columns in groups:
            counts = [int(np.searchsorted(half.waste, gap - relaxed.waste[j], side="right")) for j in columns]
            if sum(counts) > _MOST_STATES:
                raise GivesUp
            extended = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
            column = np.repeat(columns.astype(np.int32), counts)
            score = half.score[extended] + program.score[column]
            changes = half.changes[extended] + program.changes[column]
            cost = half.cost[:, extended] + program.cost[:, column]
            waste = half.waste[extended] + relaxed.waste[column]
            kept = _without_dominated(score, changes, cost)
            kept = kept[np.argsort(waste[kept], kind="stable")]
            steps = [*half.steps, (extended[kept], column[kept])]
            half = _Half(waste[kept], score[kept], changes[kept], cost[:, kept], steps)
        return half

    def _best_pair(self, one: _Half, other: _Half, room: Floats, gap: float) -> tuple[int, int] | None:
        """The pair of partial solutions with the least waste, the unused parts of the limits included."""
        multipliers, tolerance = self.relaxed.multipliers, self.program.tolerance
        allowance = room[:, None] - one.cost  # what each partial solution leaves to the other half
        order, low, high = self._ranges(other, allowance, gap)
        best: tuple[float, float, int, int] | None = None
        most = gap
        for a, b in _chunks(low, high):
            b = order[b]
            waste = one.waste[a] + other.waste[b]
            fits = waste <= most + self.equal
            a, b, waste = a[fits], b[fits], waste[fits]
            for k in range(len(room)):
                unused = allowance[k][a] - other.cost[k][b]
                waste = waste + multipliers[k] * unused
                fits = (unused >= -tolerance[k]) & (waste <= most + self.equal)
                a, b, waste = a[fits], b[fits], waste[fits]
            if len(a):
                least = float(waste.min())
                near = np.flatnonzero(waste <= least + self.equal)
                changes = one.changes[a[near]] + other.changes[b[near]]
                chosen = near[int(np.argmin(changes))]
                if best is None or least < best[0] - self.equal or float(changes.min()) < best[1]:
                    best = least, float(changes.min()), int(a[chosen]), int(b[chosen])
                    most = min(most, least)
        return None if best is None else (best[2], best[3])

    def _ranges(self, other: _Half, allowance: Floats, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An order ``[S]`` of a half, and for each partial solution of the other half the range of its partners in it.

        The order is that of the limited cost for which the gap leaves the narrowest range.
        """
        multipliers, tolerance = self.relaxed.multipliers, self.program.tolerance
        count, partners = len(other.waste), allowance.shape[1]
        widths = {k: float(np.ptp(other.cost[k])) for k in range(len(multipliers)) if multipliers[k] > 0}
        margins = {k: tolerance[k] + 1e-8 * width for k, width in widths.items()}
        spans = {k: gap / multipliers[k] + 2 * margins[k] for k in widths}
        k = max(widths, key=lambda k: widths[k] / spans[k], default=None)
        if k is None or widths[k] <= 2 * spans[k]:
            order, low = np.arange(count), np.zeros(partners, dtype=np.int64)
            high = low + count
        else:
            order = np.argsort(other.cost[k], kind="stable")
            cost, top = other.cost[k][order], allowance[k] + margins[k]
            low, high = np.searchsorted(cost, top - spans[k]), np.searchsorted(cost, top, side="right")
        if int(np.maximum(high - low, 0).sum()) > _MOST_PAIRS:
            raise GivesUp
        return order, low, high


def _chunks(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of each index and every place in its range, as many at a time as memory allows."""
    counts = np.maximum(high - low, 0)
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        sizes = counts[start:end]
        first = np.repeat(np.arange(start, end), sizes)
        second = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield first, second + np.repeat(low[start:end], sizes)
        start = end


def _without_dominated(score: Floats, changes: Floats, cost: Floats) -> np.ndarray:
    """Indices of partial solutions without those that another one dominates in score and every cost.

    With one limited cost, all dominated ones are removed; with more, only those of equal costs, which is fast.
    """
    if len(cost) == 1:
        order = np.lexsort((changes, score))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        order = np.lexsort((rank, cost[0]))
        rank = rank[order]
        kept = np.ones(len(order), dtype=bool)
        kept[1:] = rank[1:] < np.minimum.accumulate(rank)[:-1]
        return order[kept]
    if len(score) < 20_000:  # sorting takes longer than it saves
        return np.arange(len(score))
    order = np.lexsort((changes, score, *cost))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (cost[:, order[1:]] != cost[:, order[:-1]]).any(0)
    return order[first]
