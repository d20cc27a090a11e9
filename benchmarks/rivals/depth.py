"""Depth: whole layers by block influence, and attentions and FFNs by an evolutionary search.

Sources: Men et al., "ShortGPT" (arXiv 2403.03853): the influence of a layer is 1 - E[cos(x, y)] of its input and
output, and the layers of least influence are removed. Sieberling et al., "EvoPress" (arXiv 2410.14649): attentions and
FFNs are removed separately; a generation mutates its parent by switching removed and kept subblocks of one type, so
that sizes stay; offspring are compared by KL on more and more tokens, and fewer of them stay.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.rivals.activations import Activations
from benchmarks.rivals.problem import Choice, Problem, Shape
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library

State = TypeVar("State")


def block_influence(problem: Problem, seen: Activations, parameters: float) -> Choice:
    shapes = problem.whole
    for i in sorted(seen.cosine, key=lambda i: -seen.cosine[i]):
        if problem.sizes.of(problem, shapes) <= parameters:
            break
        shapes[i] = (0, 0)
    return Choice.of(problem, {}, shapes)


@dataclass(frozen=True)
class Evolution:
    """How much a search does.

    Attributes:
        offspring: Children of a generation.
        stages: Rows on which the remaining ones are compared, and how many go on.
        tokens: Work after which the search ends.
        start: Random first candidates.
    """

    offspring: int = 16
    stages: tuple[tuple[int, int], ...] = ((1, 4), (4, 1))
    tokens: float = 250_000
    start: int = 16


def evolve(
    problem: Problem,
    library: Library,
    candidates: Sequence[State],
    mutate: Callable[[State, random.Random], State],
    children: Callable[[State], list[Alternative]],
    how: Evolution,
) -> State:
    """The fittest state; the parent of a generation takes part in its last stage."""
    rng, rows, end, at = random.Random(problem.seed), len(problem.all_rows), problem.work.tokens + how.tokens, 0

    def select(states: Sequence[State], num_rows: int, keep: int) -> list[State]:
        nonlocal at
        numbers = [(at + k) % rows for k in range(min(num_rows, rows))]
        at += num_rows
        losses = problem.divergences(library, [children(s) for s in states], numbers)
        ranked = sorted(range(len(states)), key=lambda k: losses[k])
        return [states[k] for k in ranked[:keep]]

    (best,) = select(list(candidates), how.stages[-1][0], 1)
    while problem.work.tokens < end:
        pool = [mutate(best, rng) for _ in range(how.offspring)]
        for number, (num_rows, keep) in enumerate(how.stages, 1):
            pool = select([*pool, best] if number == len(how.stages) else pool, num_rows, keep)
        best = pool[0]
    return best


Removed = tuple[frozenset[int], frozenset[int]]  # attentions and FFNs


def evopress(problem: Problem, parameters: float, how: Evolution | None = None) -> Choice:
    how = how or Evolution()
    rng, layers = random.Random(problem.seed), range(len(problem.layers))
    counts = removal_counts(problem, parameters)

    def shapes(state: Removed) -> list[Shape]:
        return [(0 if i in state[0] else h, 0 if i in state[1] else w) for i, (h, w) in enumerate(problem.whole)]

    start = [tuple(frozenset(rng.sample(layers, count)) for count in counts) for _ in range(how.start)]
    library = Choice.of(problem, {}, problem.whole).library
    best = evolve(
        problem, library, start, lambda s, r: switched(s, r, len(layers)), lambda s: _removals(shapes(s)), how
    )
    return Choice.of(problem, {}, shapes(best))


def _removals(shapes: Sequence[Shape]) -> list[Alternative]:
    return [
        Alternative(i, subblock, "no_op")
        for i, shape in enumerate(shapes)
        for subblock, size in zip(("attention", "ffn"), shape, strict=True)
        if not size
    ]


def removal_counts(problem: Problem, parameters: float) -> tuple[int, int]:
    """How many attentions and FFNs to remove: near the size, then as equal as possible. All layers are alike."""
    layers, sizes = len(problem.layers), problem.sizes
    attention, ffn, excess = sizes.attention[0], sizes.ffn[0], sizes.total - parameters
    fits = [(a, f) for a in range(layers) for f in range(layers) if a * attention + f * ffn >= excess]
    least = min(a * attention + f * ffn for a, f in fits)
    near = [(a, f) for a, f in fits if a * attention + f * ffn <= least + 0.002 * sizes.total]
    return min(near, key=lambda pair: abs(pair[0] - pair[1]))


def switched(state: Removed, rng: random.Random, layers: int) -> Removed:
    """One to three subblocks of one type come back, and others of the type go."""
    new = list(state)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        kind = rng.choice([k for k in (0, 1) if 0 < len(new[k]) < layers])
        back = rng.choice(sorted(new[kind]))
        gone = rng.choice(sorted(set(range(layers)) - new[kind]))
        new[kind] = new[kind] - {back} | {gone}
    return new[0], new[1]
