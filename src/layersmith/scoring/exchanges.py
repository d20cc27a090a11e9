"""Scores around a child: the change of its loss by each exchange of an alternative, to second order.

Scores of the library are measured at the parent, where the divergence is flat. A child is far from the parent, and its
errors interact, so scores are measured again at the child. Let q be the child's distribution and p the parent's. Let
delta_bt be the change in the hidden states after a subblock at token t if alternative b replaces the child's one, and g
the gradient of KL(p || q) with respect to these hidden states. The Hessian of KL(p || q) in the logits is the Fisher
information of q, so with signs as in :mod:`layersmith.scoring.second_order` and their gradients h,

    KL(child with exchanges) ~ KL(child) + E[sum over b of g_t . delta_bt] + 1/2 E[(sum over b of h_t . delta_bt)^2],

where b runs over the exchanges. One forward pass of the parent, two of the child and two backward passes of the child
serve all exchanges; each alternative also runs once in the place of its subblock.

Shapes: B rows, T tokens, D hidden, A alternatives, S tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from operator import add

import numpy as np
import torch
from torch import nn

from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import Batch, LayerwiseParent
from layersmith.library.alternative import Alternative
from layersmith.run import ranks
from layersmith.scoring.exact import spans
from layersmith.scoring.second_order import drawn, homes

# Number of evenly spaced tokens that are kept: the mean product over that many is known within a few hundredths.
_MOST_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class ExchangeEffects:
    """Effects of exchanges on a child's loss, in nats per token.

    Attributes:
        place: Key of an alternative to its row and column.
        linear: ``[A]`` float64, the first-order effect of each exchange.
        mixed: ``[A, A]`` float64, the mean products of two exchanges.
    """

    place: Mapping[str, int]
    linear: np.ndarray
    mixed: np.ndarray

    def of(self, exchanges: Sequence[Alternative]) -> float:
        """The joint effect of exchanges of different subblocks."""
        rows = [self.place[a.key] for a in exchanges]
        return float(self.linear[rows].sum() + 0.5 * self.mixed[np.ix_(rows, rows)].sum())

    def given(self, exchanges: Sequence[Alternative]) -> np.ndarray:
        """``[A]``: the effect of each exchange if these are made as well."""
        rows = [self.place[a.key] for a in exchanges]
        return self.linear + 0.5 * np.diag(self.mixed) + self.mixed[:, rows].sum(1)


@dataclass
class _Sums:
    """Sums over the tokens of each batch by key of an alternative, and the products of one of ``every`` tokens."""

    every: int
    linear: dict[str, list[float]] = field(default_factory=dict)
    products: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, a: Alternative, change: torch.Tensor, cotangents: Sequence[torch.Tensor]) -> None:
        slope, sign = (torch.linalg.vecdot(g.float(), change) for g in cotangents)
        self.linear.setdefault(a.key, []).append(float(slope.double().sum()))
        self.products.setdefault(a.key, []).append(sign.flatten()[:: self.every].cpu())


@torch.no_grad()
def exchange_effects(
    layerwise: LayerwiseParent,
    chosen: Sequence[Alternative],
    others: Sequence[Alternative],
    batches: Sequence[torch.Tensor],
    seed: int,
    states: States,
) -> ExchangeEffects:
    """Effects of exchanges on a child.

    Each layer is finished on as many batches as the capacity of ``states`` allows before the next one begins. Where the
    layers of the parent are dealt to processes, all call this.

    Args:
        layerwise: The parent, run layer by layer.
        chosen: The child's alternatives, one for every subblock.
        others: Alternatives to exchange for, none of them the child's.
        batches: Token ids, ``[B, T]`` for each batch.
        seed: Seed of the signs.
        states: Stores hidden states between layers.
    """
    child: dict[int, dict[str, Alternative]] = {}
    for a in chosen:
        child.setdefault(a.layer, {})[a.subblock] = a
    total = sum(rows.numel() for rows in batches)
    sums = _Sums(max(1, -(-total // _MOST_TOKENS)))
    # The inputs of every layer, two final hidden states and two gradients.
    of_batch = (len(layerwise.layers) + 4) * max(rows.numel() for rows in batches) * layerwise.bytes_of_a_token
    size = max(1, int(min(len(batches), states.capacity / of_batch)))
    seeds = iter(range(seed * 1_000_003, (seed + 1) * 1_000_003))

    def sweep() -> _Sums:
        with layerwise.division.passing(states, partial(homes, layerwise, in_groups=False)) as shared:
            for start in range(0, len(batches), size):
                part = batches[start : start + size]
                seeds_of = [list(islice(seeds, len(rows))) for rows in part]
                _Sweep(layerwise, child, others, shared, sums).run(part, seeds_of)
        return sums

    sums = _of_all(sweep, {a.key: a.layer for a in others}) if layerwise.division.is_open else sweep()
    keys = list(sums.linear)
    products = np.stack([torch.cat(sums.products[key]).numpy() for key in keys]).astype(np.float64)
    mixed = products @ products.T / products.shape[1]
    linear = np.array([reduce(add, sums.linear[key], 0.0) for key in keys]) / total
    return ExchangeEffects({key: k for k, key in enumerate(keys)}, linear, mixed)


def _of_all(sweep: Callable[[], _Sums], layers: Mapping[str, int]) -> _Sums:
    """The sums of all processes, in the order in which one process would have come to them."""
    linear, products = dict[str, list[float]](), dict[str, list[torch.Tensor]]()
    for of_process in ranks.from_each(sweep):
        linear |= of_process.linear
        products |= of_process.products
    keys = sorted(linear, key=lambda key: -layers[key])
    return _Sums(0, {key: linear[key] for key in keys}, {key: products[key] for key in keys})


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A forward pass of parent and child and a backward pass of the child, layer by layer.

    Attributes:
        layerwise: The parent, run layer by layer.
        child: The child's alternatives by layer and subblock.
        others: Alternatives to exchange for.
        states: Stores hidden states between layers.
        sums: Collects the effects of exchanges.
    """

    layerwise: LayerwiseParent
    child: Mapping[int, Mapping[str, Alternative]]
    others: Sequence[Alternative]
    states: States
    sums: _Sums

    def run(self, batches: Sequence[torch.Tensor], seeds: Sequence[Sequence[int]]) -> None:
        """Add the effects on some batches, with one seed per row."""
        layerwise, states, depth = self.layerwise, self.states, len(self.layerwise.layers)
        started = self._forward(batches)
        for n, rows in enumerate(batches):
            if not layerwise.division.is_mine(n):
                continue
            parent, child = (states.pop((name, depth, n)) for name in ("parent", "child"))
            for k, g in enumerate(_of_the_head(layerwise, rows, parent, child, seeds[n])):
                states.put(("gradient", depth, k, n), g)
        for i in reversed(layerwise.division.here):
            layerwise.read(i)
            of_layer = [a for a in self.others if a.layer == i]
            for n, batch in enumerate(started):
                cotangents = [states.pop(("gradient", i + 1, k, n)) for k in range(2)]
                layer = _Layer(layerwise, batch, self.child[i], states.pop(("child", i, n)), self.sums)
                for k, g in enumerate(layer.back(of_layer, cotangents)):
                    if i:
                        states.put(("gradient", i, k, n), g)
                del layer, cotangents, g  # frees their weights

    def _forward(self, batches: Sequence[torch.Tensor]) -> list[Batch]:
        """Run parent and child; ``("child", i, n)`` is the input of the child's layer i for batch n."""
        layerwise, states = self.layerwise, self.states
        started = []
        for n, rows in enumerate(batches):
            batch = layerwise.start(rows)
            if 0 in layerwise.division.here:
                for name in ("parent", "child"):
                    states.put((name, 0, n), batch.embedded)
            started.append(batch.without_embedded())
        for i in layerwise.division.here:
            layerwise.read(i)
            module = layerwise.builder.layer(*self.child[i].values())
            for n, batch in enumerate(started):
                hidden = layerwise.run(batch, i, states.get(("child", i, n)), module)
                states.put(("child", i + 1, n), hidden)
                states.put(("parent", i + 1, n), layerwise.run(batch, i, states.pop(("parent", i, n))))
            del module  # frees its weights
        return started


def _of_the_head(
    layerwise: LayerwiseParent, rows: torch.Tensor, parent: torch.Tensor, child: torch.Tensor, seeds: Sequence[int]
) -> list[torch.Tensor]:
    """Cotangents ``[B, T, D]`` of KL(p || q) and of the signs at the output of the child's last layer."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    slope, signs = torch.empty_like(child), torch.empty_like(child)
    for start, end in spans(rows, layerwise.vocab_size):
        ids, part = rows[:, start:end], child[:, start:end].detach().requires_grad_()
        p = layerwise.head(ids, parent[:, start:end])[0].float().softmax(-1)
        with torch.enable_grad():
            logits, _ = layerwise.head(ids, part)
        q = logits.detach().float().softmax(-1)
        (slope[:, start:end],) = torch.autograd.grad(logits, part, (q - p).to(logits.dtype), retain_graph=True)
        (signs[:, start:end],) = torch.autograd.grad(logits, part, drawn(q, generators).to(logits.dtype))
    return [slope, signs]


class _Layer:
    """A layer of the child on one batch.

    Args:
        layerwise: The parent, run layer by layer.
        batch: The batch.
        child: The child's alternatives in the layer, by subblock.
        given: Input of the layer, ``[B, T, D]``.
        sums: Collects the effects of exchanges.
    """

    def __init__(
        self,
        layerwise: LayerwiseParent,
        batch: Batch,
        child: Mapping[str, Alternative],
        given: torch.Tensor,
        sums: _Sums,
    ):
        self.layerwise, self.batch, self.child, self.given, self.sums = layerwise, batch, child, given, sums
        self.i = next(iter(child.values())).layer
        self.stages = layerwise.split(self.i, batch, given)

    def back(self, others: Sequence[Alternative], cotangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Add the effects of exchanges, and return the cotangents at the input of the layer."""
        if self.stages.layout == "whole":
            return _Pass(self, self._whole, self.child["attention"], self.given).back(others, cotangents)
        of_attention, of_ffn = ([a for a in others if a.subblock == subblock] for subblock in ("attention", "ffn"))
        attention = _Pass(self, self._alone, self.child["attention"], self.given)
        if self.stages.layout == "parallel":
            ffn = _Pass(self, self._alone, self.child["ffn"], self.given)
            of_both = ffn.back(of_ffn, cotangents), attention.back(of_attention, cotangents)
            return [a + b - g for a, b, g in zip(*of_both, cotangents, strict=True)]
        ffn = _Pass(self, self._alone, self.child["ffn"], attention.output.detach())
        return attention.back(of_attention, ffn.back(of_ffn, cotangents))

    def _alone(self, a: Alternative) -> nn.Module:
        """The module that runs in the place of the subblock."""
        return self.layerwise.module_of(a, self.stages)

    def _whole(self, a: Alternative) -> nn.Module:
        """The child's layer with one alternative exchanged."""
        return self.layerwise.builder.layer(*({**self.child, a.subblock: a}).values())

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return self.layerwise.run(self.batch, self.i, hidden, module)


class _Pass:
    """A forward pass of a subblock, or of a whole layer, that gradients can be taken of.

    Args:
        layer: The layer.
        module_of: Gives the module with an alternative.
        chosen: The child's alternative.
        given: Input of the module, ``[B, T, D]``.
    """

    def __init__(
        self, layer: _Layer, module_of: Callable[[Alternative], nn.Module], chosen: Alternative, given: torch.Tensor
    ):
        self.layer, self.module_of, self.given = layer, module_of, given.detach().requires_grad_()
        with torch.enable_grad():
            self.output = layer.run(module_of(chosen), self.given)

    def back(self, others: Sequence[Alternative], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Add the effects of exchanges, and return the cotangents at the input."""
        before = []
        for k, g in enumerate(cotangents):
            keep = k + 1 < len(cotangents)
            before.append(torch.autograd.grad(self.output, self.given, g, retain_graph=keep)[0])
        given, output = self.given.detach(), self.output.detach()
        for a in others:
            self.layer.sums.add(a, (self.layer.run(self.module_of(a), given) - output).float(), cotangents)
        return before
