"""Týr-the-Pruner: a coarse-to-fine evolutionary search over locally pruned layers.

Source: Li et al., "Týr-the-Pruner" (arXiv 2503.09657). Each subblock is pruned locally to several sizes, with an
optimal-brain-surgeon update of the weights that stay. The input of a layer during this is the mean over the sizes of
the layers before it (expectation error accumulation). An evolutionary search moves sparsity between layers and compares
whole children by KL on more and more tokens. Then everything is done again around the best child with half the step.

Removing units changes only what the last projection reads, so the mean over sizes of a subblock's outputs is its output
with the mean of their last projections, in which removed units have zeros.

The paper ranks units by gradient and Hessian; here it is by the Hessian alone, one unit after another. Its scores on
7B parents take 4 rounds of 50 generations of 128 offspring; here the search ends after a given number of tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from benchmarks.rivals.depth import Evolution, evolve
from benchmarks.rivals.problem import Choice, Problem, Shape, alternatives, keeping, uniform_shapes
from layersmith.distillation.activations import Rows
from layersmith.distillation.reconstruction import refit, watched
from layersmith.execution.exchange import set_weight
from layersmith.execution.layerwise import Split, split_layers
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library import ranking
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept

Sizes = list[tuple[list[int], list[int]]]  # numbers of heads and of channels that each layer is offered
STEPS = (1 / 8, 1 / 16, 1 / 32)


def tyr(problem: Problem, parameters: float, steps: Sequence[float] = STEPS, how: Evolution | None = None) -> Choice:
    """One round for each step, a share of the FFN's width."""
    how = how or Evolution(stages=((2, 4), (8, 1)))
    # The middle of the uniform children of the size: not the one with the fewest heads, nor that with the most.
    uniform = uniform_shapes(problem, parameters)
    best, library = uniform[(len(uniform) - 1) // 2], problem.library
    for step in steps:
        sizes = offered(problem, best, step)
        library = prune_locally(problem, sizes)
        start = [repaired(problem, snapped(best, sizes), sizes, parameters, random.Random(k)) for k in range(4)]

        def mutate(shapes: list[Shape], rng: random.Random, sizes: Sizes = sizes) -> list[Shape]:
            return mutated(problem, shapes, sizes, parameters, rng)

        of_round = dataclasses.replace(how, tokens=how.tokens / len(steps))
        best = evolve(problem, library, start, mutate, lambda shapes: alternatives(problem, shapes), of_round)
    return Choice(library, alternatives(problem, best), problem.sizes.of(problem, best))


def offered(problem: Problem, around: Sequence[Shape], step: float, reach: int = 2) -> Sizes:
    """Up to two steps to either side of a shape; numbers of heads change by a slice at least."""
    result = []
    for i, (heads, width) in enumerate(around):
        full, per_slice, groups = problem.width(i).size, problem.heads(i).size, problem.heads(i).num_heads
        widths = {width + round(k * step * full) for k in range(-reach, reach + 1)} | {
            full if step == max(STEPS) else width
        }
        counts = {heads + k * per_slice for k in (-1, 0, 1)}
        result.append(
            (sorted(h for h in counts if per_slice <= h <= groups), sorted(w for w in widths if 0 < w <= full))
        )
    return result


@torch.no_grad()
def prune_locally(problem: Problem, sizes: Sizes) -> Library:
    """Orders and updated weights of all sizes, each on the mean outputs of the layers before."""
    library = dataclasses.replace(problem.library, kept=Kept(), pairs=Kept(), _skeletons={})
    layerwise, rows, kept, orders = split_layers(library.parent, library), Rows(problem.calibration, 4096), Kept(), {}
    for i, of_layer in enumerate(sizes):
        split: Split = layerwise.split(i, *rows.start(layerwise, torch.arange(1)))
        assert split.layout == "sequence"
        assert split.attention is not None
        assert split.ffn is not None
        for subblock, module, numbers in zip(SUBBLOCKS, (split.attention, split.ffn), of_layer, strict=True):
            name, moment, total = problem.reader(i, subblock), None, 0
            for batch in rows.batches():
                started, hidden = rows.start(layerwise, batch)
                with watched(module, name) as seen:
                    layerwise.run(started, i, rows.child_input(batch, hidden), module)
                a = seen[0][0].float()
                moment = a.T @ a if moment is None else moment + a.T @ a
                total += len(a)
            assert moment is not None
            pruned = _Local(problem, i, subblock, problem.reader_weight(i, subblock), moment.double() / total)
            orders |= pruned.orders
            mean = torch.zeros_like(pruned.weight)
            for a, units, weight in pruned.updated(numbers):
                if not a.is_parent:
                    kept = keeping(kept, a.identity, i, {f"{name}.weight": weight})
                mean[:, units] += weight / len(numbers)
            set_weight(module, f"{name}.weight", mean)
            rows.pass_through_child(layerwise, i, module)
            rows.child.advance()
    problem.work.tokens += 2 * problem.calibration.numel()
    return dataclasses.replace(library, orders={**library.orders, **orders}, kept=kept, _skeletons={})


class _Local:
    """The local pruning of one subblock."""

    def __init__(self, problem: Problem, i: int, subblock: str, weight: torch.Tensor, moment: torch.Tensor):
        self.problem, self.i, self.subblock, self.weight, self.moment = problem, i, subblock, weight, moment
        if subblock == "ffn":
            order = ranking.by_iterative_removal(ranking.channel_costs(weight, moment))
            self.orders = {f"{i}.ffn.0": order}
        else:
            _, order, _ = ranking.head_orders(weight, problem.heads(i), moment)
            self.orders = {f"{i}.queries": order}
        self.order = order

    def updated(self, numbers: Sequence[int]) -> list[tuple[Alternative, torch.Tensor, torch.Tensor]]:
        """Each size as an alternative, the inputs that stay, and the weights that read them."""
        result = []
        for number in numbers:
            (a,) = [a for a in alternatives(self.problem, self._shapes(number)) if self._is_mine(a)]
            units = self._inputs(number)
            weight = refit(
                self.weight[:, units], self.moment[units][:, units], self.weight.double() @ self.moment[:, units]
            )
            result.append((a, units, weight.to(self.weight.dtype)))
        return result

    def _shapes(self, number: int) -> list[Shape]:
        shapes = self.problem.whole
        heads, width = shapes[self.i]
        shapes[self.i] = (heads, number) if self.subblock == "ffn" else (number, width)
        return shapes

    def _is_mine(self, a: Alternative) -> bool:
        return (a.layer, a.subblock) == (self.i, self.subblock)

    def _inputs(self, number: int) -> torch.Tensor:
        """The entries of the projection's input that stay, in their own order."""
        if self.subblock == "ffn":
            return self.order[:number].sort().values
        heads = self.order[:, : number // len(self.order)].flatten().sort().values
        size = self.weight.shape[1] // self.problem.heads(self.i).num_heads
        return (heads[:, None] * size + torch.arange(size)).flatten()


# ---------------------------------------------------------------------------------------------- moves


def snapped(shapes: Sequence[Shape], sizes: Sizes) -> list[Shape]:
    """The nearest offered shapes."""
    return [
        (min(heads, key=lambda h: abs(h - shape[0])), min(widths, key=lambda w: abs(w - shape[1])))
        for shape, (heads, widths) in zip(shapes, sizes, strict=True)
    ]


def mutated(
    problem: Problem, shapes: Sequence[Shape], sizes: Sizes, parameters: float, rng: random.Random
) -> list[Shape]:
    """Up to three moves of a step from one layer to another, of heads or of channels, and repair of the size."""
    new = list(shapes)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        kind = rng.choice((0, 1, 1))
        for i, direction in zip(rng.sample(range(len(new)), 2), (-1, 1), strict=True):
            new[i] = _moved(new[i], sizes[i], kind, direction)
    return repaired(problem, new, sizes, parameters, rng)


def repaired(
    problem: Problem, shapes: Sequence[Shape], sizes: Sizes, parameters: float, rng: random.Random
) -> list[Shape]:
    """Widths of random FFNs go down until the size fits, then up where there is room."""
    new = list(shapes)
    size = problem.sizes.of(problem, new)
    for direction in (-1, 1):
        layers = list(range(len(new)))
        while layers and (direction == 1 or size > parameters):
            i = rng.choice(layers)
            moved = _moved(new[i], sizes[i], 1, direction)
            changed = size + problem.sizes.of_one(problem, i, moved) - problem.sizes.of_one(problem, i, new[i])
            if moved == new[i] or (direction == 1 and changed > parameters):
                layers.remove(i)
                continue
            new[i], size = moved, changed
    if size > parameters:
        raise ValueError("no child of these sizes is small enough")
    return new


def _moved(shape: Shape, offered: tuple[list[int], list[int]], kind: int, direction: int) -> Shape:
    """The next larger or smaller size that is offered, if there is one."""
    at = offered[kind].index(shape[kind]) + direction
    if not 0 <= at < len(offered[kind]):
        return shape
    return (offered[0][at], shape[1]) if kind == 0 else (shape[0], offered[1][at])
