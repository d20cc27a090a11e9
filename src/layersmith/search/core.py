"""The optimum of the integer program by enumerating all solutions near its linear bound.

By duality the score of every solution within the limits is

    bound + sum over its columns of their waste + sum over limits of multiplier * what is left of the limit,

all terms at least 0. Solutions whose terms sum to at most a gap are few while the gap is small. So all of them are
enumerated, for a gap that grows until there is one within the limits: then the best of them is the optimum, and that is
the proof. Enumeration is by halves: partial solutions of either half of the groups whose wastes are within the gap, and
pairs of them that leave of each limit no more than the gap allows, found by sorting one limited cost and bucketing
others.

Source: the two ideas are Horowitz and Sahni, "Computing Partitions with Applications to the Knapsack Problem" (1974),
and the core of Balas and Zemel, "An Algorithm for Large Zero-One Knapsack Problems" (1980).

Shapes: G groups, N columns, K limited costs, S partial solutions of a half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.search.program import Floats, Program, Relaxation

# The solutions to be enumerated first, and how many times more in each further round.
_FIRST, _MORE = 3e3, 6.0
# Partial solutions of a half, and pairs, at which enumeration gives up.
_MOST_STATES, _MOST_PAIRS = 4_000_000, 300_000_000
_CHUNK = 1_000_000
_BINS = 256
# Scores this near, as a share of the largest, are equal.
_EQUAL = 1e-13


class GivesUp(Exception):
    """Too many solutions are near the bound."""


def best_near_bound(program: Program, relaxed: Relaxation) -> np.ndarray | None:
    """Columns ``[G]`` of the solution with the least score, and of equals the fewest changes; None if none fits.

    Raises:
        GivesUp: the enumeration would be too large.
    """
    scale = float(program.score.max()) or 1.0
    groups = [np.flatnonzero(program.group == g) for g in range(program.num_groups)]
    widest = float(sum(relaxed.waste[own].max() for own in groups))
    # Larger gaps have nothing more: all columns, and all that could be left of the limits.
    left = program.room - program.least(program.cost).sum(1)
    widest += float(relaxed.multipliers @ np.maximum(left, 0)) + _EQUAL * scale
    target = _FIRST
    while True:
        gap = _gap_for(relaxed, groups, target, widest, scale)
        found = _within(program, relaxed, groups, gap, scale)
        if found is not None or gap >= widest:
            return found
        target *= _MORE


def _gap_for(relaxed: Relaxation, groups: Sequence[np.ndarray], target: float, widest: float, scale: float) -> float:
    """A gap within which about so many solutions have the sum of their wastes."""
    low, high = 1e-12 * scale, widest
    if _count(relaxed, groups, high) <= target:
        return high
    for _ in range(20):
        middle = math.sqrt(low * high)
        if _count(relaxed, groups, middle) > target:
            high = middle
        else:
            low = middle
    return high


def _count(relaxed: Relaxation, groups: Sequence[np.ndarray], gap: float) -> float:
    """About how many solutions have wastes that sum to at most the gap."""
    counts = np.zeros(_BINS + 1)
    counts[0] = 1.0
    for own in groups:
        wastes = relaxed.waste[own]
        steps = np.rint(wastes[wastes <= gap] / gap * _BINS).astype(int)
        if len(steps) > 1:
            more = np.zeros(_BINS + 1)
            for step in steps:
                more[step:] += counts[: _BINS + 1 - step]
            counts = more
    return float(counts.sum())


@dataclass(eq=False)
class _Half:
    """All partial solutions of some groups whose wastes sum to at most the gap, least waste first.

    Attributes:
        waste, score, changes: ``[S]``.
        cost: ``[K, S]``.
        steps: for each group the partial solution that was gone on from, and the column that was added.
    """

    waste: Floats
    score: Floats
    changes: Floats
    cost: Floats
    steps: list[tuple[np.ndarray, np.ndarray]]

    def columns(self, state: int) -> list[int]:
        found = []
        for came_from, column in reversed(self.steps):
            found.append(int(column[state]))
            state = int(came_from[state])
        return found


def _half(program: Program, relaxed: Relaxation, groups: Sequence[np.ndarray], gap: float) -> _Half:
    half = _Half(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((len(program.room), 1)), [])
    for own in groups:
        counts = [int(np.searchsorted(half.waste, gap - relaxed.waste[j], side="right")) for j in own]
        if sum(counts) > _MOST_STATES:
            raise GivesUp
        came_from = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        column = np.repeat(own.astype(np.int32), counts)
        score, changes = (
            half.score[came_from] + program.score[column],
            half.changes[came_from] + program.changes[column],
        )
        cost = half.cost[:, came_from] + program.cost[:, column]
        kept = _not_beaten(score, changes, cost)
        waste = half.waste[came_from] + relaxed.waste[column]
        kept = kept[np.argsort(waste[kept], kind="stable")]
        half = _Half(
            waste[kept], score[kept], changes[kept], cost[:, kept], [*half.steps, (came_from[kept], column[kept])]
        )
    return half


def _not_beaten(score: Floats, changes: Floats, cost: Floats) -> np.ndarray:
    """Partial solutions for which no other costs as little in everything and scores less; all there is to find fast.

    With one limited cost these are all that matter; with more, the best of those with equal costs.
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
    if len(score) < 20_000:
        return np.arange(len(score))
    order = np.lexsort((changes, score, *cost))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (cost[:, order[1:]] != cost[:, order[:-1]]).any(0)
    return order[first]


def _within(
    program: Program, relaxed: Relaxation, groups: Sequence[np.ndarray], gap: float, scale: float
) -> np.ndarray | None:
    """The best solution within the limits and the gap, or None."""
    near = [own[relaxed.waste[own] <= gap] for own in groups]
    alone = [int(own[0]) for own in near if len(own) == 1]
    open_groups = sorted(
        (own for own in near if len(own) > 1), key=lambda own: float(np.exp(-3 * relaxed.waste[own] / gap).sum())
    )
    one, other = (_half(program, relaxed, open_groups[at::2], gap) for at in (0, 1))
    room = program.room - program.cost[:, alone].sum(1)
    pair = _best_pair(one, other, room, program.tolerance, relaxed.multipliers, gap, _EQUAL * scale)
    if pair is None:
        return None
    columns = [*alone, *one.columns(pair[0]), *other.columns(pair[1])]
    return np.array(sorted(columns, key=lambda column: int(program.group[column])))


def _best_pair(
    one: _Half, other: _Half, room: Floats, tolerance: Floats, multipliers: Floats, gap: float, equal: float
) -> tuple[int, int] | None:
    """The pair of partial solutions with the least waste, what is left of the limits included."""
    if len(one.waste) > len(other.waste):
        pair = _best_pair(other, one, room, tolerance, multipliers, gap, equal)
        return None if pair is None else (pair[1], pair[0])
    # What a partial solution leaves to the other, and how far below that the other may stay.
    leaves = room[:, None] - one.cost
    active = [k for k in range(len(room)) if multipliers[k] > 0]
    margin = {k: tolerance[k] + 1e-8 * float(np.ptp(other.cost[k])) for k in active}
    span = {k: gap / multipliers[k] + 2 * margin[k] for k in active}
    selectivity = {k: float(np.ptp(other.cost[k])) / span[k] for k in active}
    by_use = sorted((k for k in active if selectivity[k] > 2), key=lambda k: -selectivity[k])
    ranges, order = _ranges(other, leaves, by_use, span, margin)
    other_waste, other_cost, other_changes = other.waste[order], other.cost[:, order], other.changes[order]
    best: tuple[float, float, int, int] | None = None
    most = gap
    if sum(int(np.maximum(high - low, 0).sum()) for low, high in ranges) > _MOST_PAIRS:
        raise GivesUp
    for low, high in ranges:
        counts = np.maximum(high - low, 0)
        ends = np.cumsum(counts)
        start = 0
        while start < len(counts):
            done = int(ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
            own = counts[start:end]
            total = int(own.sum())
            a = np.repeat(np.arange(start, end), own)
            b = np.arange(total) - np.repeat(np.cumsum(own) - own, own) + np.repeat(low[start:end], own)
            start = end
            waste = one.waste[a] + other_waste[b]
            for k in range(-1, len(room)):
                if k >= 0:
                    left = leaves[k][a] - other_cost[k][b]
                    waste = waste + multipliers[k] * left
                    fits = (left >= -tolerance[k]) & (waste <= most + equal)
                else:
                    fits = waste <= most + equal
                a, b, waste = a[fits], b[fits], waste[fits]
            if len(a):
                least = float(waste.min())
                near = np.flatnonzero(waste <= least + equal)
                changes = one.changes[a[near]] + other_changes[b[near]]
                at = near[int(np.argmin(changes))]
                found = (least, float(changes.min()), int(a[at]), int(order[b[at]]))
                if best is None or found[0] < best[0] - equal or found[1] < best[1]:
                    best, most = found, min(most, least)
    return None if best is None else (best[2], best[3])


def _ranges(
    other: _Half, leaves: Floats, by_use: Sequence[int], span: dict[int, float], margin: dict[int, float]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Where in an order of the other half's partial solutions those lie that may go with each of the one's.

    They are sorted by the cost that tells most, within buckets of the two next, each as wide as what may be left; so
    the partners of a solution lie in two neighbouring buckets of each.
    """
    count = len(other.waste)
    if not by_use:
        everything = np.zeros(leaves.shape[1], dtype=np.int64)
        return [(everything, everything + count)], np.arange(count)
    first, *rest = by_use
    rest = rest[:2] if count * leaves.shape[1] > 10 * _CHUNK else []
    low_value, width = float(other.cost[first].min()), float(np.ptp(other.cost[first])) or 1.0
    buckets = np.zeros(count, dtype=np.int64)
    wanted = [np.zeros(leaves.shape[1], dtype=np.int64)]
    for k in rest:
        base = float(other.cost[k].min())
        own = np.floor((other.cost[k] - base) / span[k]).astype(np.int64)
        number = int(own.max()) + 2
        buckets = buckets * number + own
        top = np.floor((leaves[k] + margin[k] - base) / span[k])
        nearest = [np.where((top - d >= 0) & (top - d < number - 1), top - d, number - 1) for d in (0, 1)]
        wanted = [before * number + one.astype(np.int64) for before in wanted for one in nearest]
    known, rank = np.unique(buckets, return_inverse=True)
    key = 4.0 * rank + (other.cost[first] - low_value) / width
    order = np.argsort(key, kind="stable")
    key = key[order]
    high = np.clip((leaves[first] + margin[first] - low_value) / width, -1, 1.5)
    low = np.clip((leaves[first] + margin[first] - span[first] - low_value) / width, -1, 1.5)
    ranges = []
    for bucket in wanted:
        at = np.minimum(np.searchsorted(known, bucket), len(known) - 1)
        start = np.searchsorted(key, 4.0 * at + low - 1e-9)
        end = np.searchsorted(key, 4.0 * at + high + 1e-9, side="right")
        ranges.append((start, np.where(known[at] == bucket, end, start)))
    return ranges, order
