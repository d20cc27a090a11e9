"""What every method is given, what it returns, and how sizes are counted.

Prunable units are the channels of an FFN, and *slices* of query heads: one head of every KV group, because all groups
of a layer keep equally many heads. Removing the last slice removes the attention. For parents like Llama.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import HeadsAxis, WidthAxis
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept, digest_of
from layersmith.recipe import ScoringRecipe
from layersmith.run.progress import SILENT
from layersmith.scoring.children import ChildEvaluator, child_evaluator

Shape = tuple[int, int]  # query heads and FFN channels that a layer keeps


@dataclass(eq=False)
class Work:
    """What a method has used: tokens in forward passes of the parent, where a backward pass counts as two."""

    tokens: float = 0.0
    started: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        """CPU seconds since the start."""
        return time.process_time() - self.started


@dataclass(frozen=True, eq=False)
class Problem:
    """A parent and the rows that a method may use.

    Attributes:
        library: The parent with its axes; its orders and alternatives are layersmith's.
        calibration: ``[N, T]`` rows for statistics and refits.
        scoring: ``[M, T]`` rows for comparing children.
        seed: Seed of everything random.
        work: What was used so far.
    """

    library: Library
    calibration: torch.Tensor
    scoring: torch.Tensor
    seed: int = 0
    work: Work = field(default_factory=Work)

    @property
    def model(self) -> PreTrainedModel:
        return self.library.parent.model

    @property
    def layers(self) -> list[nn.Module]:
        return self.library.parent.layers

    def heads(self, i: int) -> HeadsAxis:
        axis = self.library.axes[i].kv
        assert axis is not None
        return axis

    def width(self, i: int) -> WidthAxis:
        axis = self.library.axes[i].ffn
        assert axis is not None
        return axis

    def reader(self, i: int, subblock: str) -> str:
        """The module in layer ``i`` that reads the subblock's units, e.g. ``mlp.down_proj``."""
        weight = self.heads(i).reader if subblock == "attention" else self.width(i).bundles[0].reader
        return weight.removesuffix(".weight")

    def reader_weight(self, i: int, subblock: str) -> torch.Tensor:
        """Its weight, ``[hidden, units]``."""
        return self.layers[i].get_submodule(self.reader(i, subblock)).weight.detach()

    @property
    def whole(self) -> list[Shape]:
        """The parent's shapes."""
        return [(self.heads(i).num_heads, self.width(i).size) for i in range(len(self.layers))]

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self)

    @property
    def all_rows(self) -> torch.Tensor:
        return torch.cat([self.scoring, self.calibration])

    def divergences(
        self, library: Library, children: Sequence[Sequence[Alternative]], rows: Sequence[int]
    ) -> list[float]:
        """The mean KL divergence of children to the parent on some of :attr:`all_rows`."""
        evaluator: ChildEvaluator = child_evaluator(library, self.all_rows, ScoringRecipe(), SILENT)
        results = evaluator.run(children, rows)
        self.work.tokens += evaluator.passes * self.all_rows.numel()
        return [math.fsum(row["kl_divergence"] for row in by_row) / len(by_row) for by_row in results]


class Sizes:
    """Parameters of layers by their shapes."""

    def __init__(self, problem: Problem):
        self.of_layer = [sum(p.numel() for p in layer.parameters()) for layer in problem.layers]
        self.channel, self.slice, self.attention, self.ffn = [], [], [], []
        for i, layer in enumerate(problem.layers):
            heads, bundle, library = problem.heads(i), problem.width(i).bundles[0], problem.library
            self.channel.append(sum(layer.get_parameter(w.name).numel() for w in bundle.weights) // bundle.size)
            of_queries = sum(
                layer.get_parameter(w.name).numel()
                for w in heads.weights
                if {s.part for s in w.segments} == {"queries"}
            )
            self.slice.append(of_queries * heads.size // heads.num_heads)
            for sizes, other in ((self.attention, "attention"), (self.ffn, "ffn")):
                without = library.without(i, other)
                sizes.append(self.of_layer[i] - sum(p.numel() for p in without.parameters()))

    @property
    def total(self) -> int:
        return sum(self.of_layer)

    def of(self, problem: Problem, shapes: Sequence[Shape]) -> int:
        """Parameters in the layers."""
        return sum(self.of_one(problem, i, shape) for i, shape in enumerate(shapes))

    def of_one(self, problem: Problem, i: int, shape: Shape) -> int:
        """Parameters of layer ``i``."""
        (heads, width), axis, full = shape, problem.heads(i), problem.width(i).size
        attention = self.slice[i] * ((axis.num_heads - heads) // axis.size) if heads else self.attention[i]
        return self.of_layer[i] - attention - (self.channel[i] * (full - width) if width else self.ffn[i])


def alternatives(problem: Problem, shapes: Sequence[Shape]) -> list[Alternative]:
    """One alternative for each subblock of every layer."""
    chosen = []
    for i, ((heads, width), (all_heads, full)) in enumerate(zip(shapes, problem.whole, strict=True)):
        kind = "no_op" if not heads else "parent" if heads == all_heads else "query_heads"
        ranked = kind == "query_heads"
        chosen.append(Alternative(i, "attention", kind, "contribution" if ranked else "", heads if ranked else 0))
        kind = "no_op" if not width else "parent" if width == full else "ffn_width"
        ranked = kind == "ffn_width"
        chosen.append(Alternative(i, "ffn", kind, "iterative" if ranked else "", width if ranked else 0))
    return chosen


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method keeps.

    Attributes:
        library: The library with the method's orders, and its weights where it changes any.
        chosen: One alternative for each subblock of every layer.
        parameters: In the layers.
        biases: Added to projections of the child, by their names in the model.
    """

    library: Library
    chosen: list[Alternative]
    parameters: int
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(problem: Problem, orders: Mapping[str, torch.Tensor], shapes: Sequence[Shape]) -> Choice:
        """The first units of each order, as many as the shapes say."""
        chosen = alternatives(problem, shapes)
        anyhow = orders_of(
            problem, *([torch.zeros(n) for n in of_layers] for of_layers in zip(*problem.whole, strict=True))
        )
        library = dataclasses.replace(
            problem.library, orders=anyhow | dict(orders), kept=Kept(), pairs=Kept(), _skeletons={}
        )
        return Choice(library, chosen, problem.sizes.of(problem, shapes))

    def child(self) -> PreTrainedModel:
        model = self.library.compose(self.chosen)
        for name, bias in self.biases.items():
            module = model.get_submodule(name)
            present = module.bias.detach() if isinstance(module.bias, torch.Tensor) else 0
            module.register_parameter("bias", nn.Parameter(bias + present, requires_grad=False))
        return model

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parent, for :meth:`restored`."""
        library = {name: getattr(self.library, name) for name in ("orders", "kept", "pairs")}
        return library | {"chosen": self.chosen, "parameters": self.parameters, "biases": dict(self.biases)}

    @staticmethod
    def restored(problem: Problem, data: dict[str, Any]) -> Choice:
        library = dataclasses.replace(
            problem.library, orders=data["orders"], kept=data["kept"], pairs=data["pairs"], _skeletons={}
        )
        return Choice(library, data["chosen"], data["parameters"], data["biases"])


# ---------------------------------------------------------------------------------------------- orders, uniform sizes


def head_slices(problem: Problem, i: int, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``[H]`` of heads as an order ``[groups, H / groups]``, best first, and the scores of the slices."""
    groups = problem.heads(i).shares
    by_group = scores.view(groups, -1)
    ranked, order = by_group.sort(dim=-1, descending=True, stable=True)
    return order + torch.arange(groups)[:, None] * by_group.shape[1], ranked.sum(0)


def orders_of(
    problem: Problem, heads: Sequence[torch.Tensor], channels: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Orders of all layers from the scores of heads and of channels; more is better."""
    orders = {}
    for i, (of_heads, of_channels) in enumerate(zip(heads, channels, strict=True)):
        orders[f"{i}.queries"] = head_slices(problem, i, of_heads)[0]
        orders[f"{i}.ffn.0"] = of_channels.sort(descending=True, stable=True).indices
    return orders


def uniform_shapes(problem: Problem, parameters: float) -> list[list[Shape]]:
    """All ways to give every layer the same shape, by number of head slices; the FFN's width fills the size."""
    found = []
    all_heads, full = problem.whole[0]
    step = problem.heads(0).size
    for heads in range(step, all_heads + 1, step):
        free = parameters - problem.sizes.of(problem, [(heads, full)] * len(problem.layers))
        width = full + int(free // sum(problem.sizes.channel))
        if 0 < width <= full:
            found.append([(heads, width)] * len(problem.layers))
    return found


def best_of(problem: Problem, choices: Sequence[Choice], rows: int = 8) -> Choice:
    """The choice whose child has the lowest KL on a few scoring rows; all have the same library."""
    if len(choices) == 1:
        return choices[0]
    means = problem.divergences(choices[0].library, [c.chosen for c in choices], range(min(rows, len(problem.scoring))))
    return choices[means.index(min(means))]


def remove_lowest(
    problem: Problem,
    slices: Sequence[torch.Tensor],
    channels: Sequence[torch.Tensor],
    parameters: float,
    least: int = 0,
) -> list[Shape]:
    """Remove units in the order of their scores over all layers, until at most these parameters are left.

    Args:
        problem: The problem.
        slices, channels: Scores of the units of each layer that are still there.
        parameters: In the layers.
        least: Slices of heads that every attention keeps.
    """
    units = [(float(s), i, "slice") for i, of in enumerate(slices) for s in sorted(of.tolist())[: len(of) - least]]
    units += [(float(s), i, "channel") for i, of in enumerate(channels) for s in of.tolist()]
    shapes = [(len(s) * problem.heads(i).size, len(c)) for i, (s, c) in enumerate(zip(slices, channels, strict=True))]
    size = problem.sizes.of(problem, shapes)
    for _, i, kind in sorted(units):
        if size <= parameters:
            break
        (heads, width), before = shapes[i], problem.sizes.of_one(problem, i, shapes[i])
        shapes[i] = (heads - problem.heads(i).size, width) if kind == "slice" else (heads, width - 1)
        size += problem.sizes.of_one(problem, i, shapes[i]) - before
    return shapes


def batches(rows: torch.Tensor, tokens: int = 4096) -> Iterable[torch.Tensor]:
    """The rows, a few at a time."""
    return rows.split(max(1, tokens // rows.shape[1]))


def keeping(kept: Kept, identity: str, layer: int, weights: Mapping[str, torch.Tensor]) -> Kept:
    """Kept weights with those of one more alternative, or pair of them."""
    record = {
        "of": identity, "identity": identity, "layer": layer, "subblock": "", "weights": digest_of(weights),
        "tokens": 0, "before": None, "after": None,
    }  # fmt: skip
    return Kept((*kept.records, record), {**kept.in_memory, identity: dict(weights)})
