"""Second-order scores: all alternatives of all layers from one forward and a few backward passes of the parent.

At the parent the divergence KL(p || q) is zero and flat, so to second order it is half of the quadratic form of the
Fisher information. Let delta_t be the change by an alternative in the hidden states after its subblock at token t,
J_st the Jacobian of the logits at position s with respect to those hidden states, and F_s = diag(p_s) - p_s p_s^T the
Fisher information of the parent's distribution at s. Then

    KL = 1/2 sum_s (sum_t J_st delta_t)^T F_s (sum_t J_st delta_t) + O(delta^3).

With signs xi_s in {-1, 1}^V, independent, v_s = sqrt(p_s) xi_s - p_s (sqrt(p_s) . xi_s) has E[v_s v_s^T] = F_s, so one
backward pass of sum_s v_s . z_s gives g_t = sum_s J_st^T v_s with

    KL ~ 1/2 E[(sum_t g_t . delta_t)^2] ~ 1/2 sum_t E[(g_t . delta_t)^2].

The second step drops the products of changes at different tokens: their sum has a far larger variance than the terms
that are kept. The g do not depend on the alternatives, so one backward pass serves all of them.

Alternatives that only silence units at the input a of the projection W that reads them (narrower FFNs, fewer heads)
are not run: with u the gradient at the output of W and h = W^T u that at its input, g . delta = - sum over silenced i
of h_i a_i. Where the projection was refitted to W' on the remaining entries b of its input,
g . delta = u . (W' b - W a).

Random signs have a lower variance than labels drawn from p, which have the same second moment;
docs/measurements/scoring.md compares them.

Shapes: B rows, T tokens, D hidden, V vocabulary, F units of a reader's input, n alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import LayerwiseParent, key_of
from layersmith.library.alternative import Alternative
from layersmith.run import ranks
from layersmith.scoring.exact import spans
from layersmith.scoring.forward import plan_start, read, start_all
from layersmith.scoring.silencing import ParentLayer, Survey, bias_of, refitted_reader, watched
from layersmith.scoring.work import Plan, Work, share_of_layer

# Amounts of work for the estimate of the remaining time; scores do not depend on them. A softmax of the head as a share
# of a head with metrics; a backward pass of a layer in forward passes; and the refitted readers as a share of a layer.
# benchmarks/time_left.py shows how accurate the remaining time is.
_SOFTMAX, _BACKWARD, _REFITTED = 0.6, 1.5, 0.2


@dataclass(frozen=True, eq=False)
class SeededBatch:
    """A batch of rows, with seeds of the random signs.

    Attributes:
        rows: Token ids, ``[B, T]``.
        seeds: For each backward pass, one seed per row.
    """

    rows: torch.Tensor
    seeds: Sequence[Sequence[int]]


@dataclass
class _Sums:
    """Sums over the tokens of each row of a batch, ``[B]`` by identity of an alternative."""

    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, alternatives: Sequence[Alternative], products: Sequence[torch.Tensor]) -> None:
        """Add the squares over tokens of ``[B, T]`` products g . delta."""
        for a, product in zip(alternatives, products, strict=True):
            total = product.square().sum(-1).double().cpu()
            self.squares[a.identity] = self.squares[a.identity] + total if a.identity in self.squares else total


def estimate(
    layerwise: LayerwiseParent,
    alternatives: Sequence[Alternative],
    survey: Survey,
    batches: Sequence[SeededBatch],
    states: States,
    work: Work | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Second-order estimates of KL in nats per token, on every row.

    Each layer is finished on all batches before the next one begins. Processes that a parent is divided between do
    this together: hidden states pass on through their layers, and gradients back.

    Args:
        layerwise: The parent, run layer by layer.
        alternatives: The alternatives, without the parent's subblocks.
        survey: The result of :func:`look` for them.
        batches: The batches.
        states: Stores hidden states between layers.
        work: Counts and times the work.

    Returns:
        For each batch, identity of an alternative of a layer that this process ran on it to ``[B]`` float64.
    """
    with layerwise.division.passing(states, partial(homes, layerwise)) as shared:
        return _estimates(layerwise, alternatives, survey, batches, shared, work or Work())


def homes(layerwise: LayerwiseParent, key: tuple[Any, ...], in_groups: bool = True) -> Sequence[int]:
    """The process that gets a hidden state, or the gradient of the input of layer ``key[1]``; all share the head.

    Layers run in the group of batch ``key[-1]``, or all in the first.
    """
    division, n = layerwise.division, key[-1]
    i = key[1] - (key[0] == "gradient")
    if 0 <= i < len(division.owners):
        return [division.owner_in_group(i, n if in_groups else 0)]
    return [n % ranks.count()] if i > 0 else []


def _estimates(
    layerwise: LayerwiseParent,
    alternatives: Sequence[Alternative],
    survey: Survey,
    batches: Sequence[SeededBatch],
    states: States,
    work: Work,
) -> list[dict[str, torch.Tensor]]:
    depth = len(layerwise.layers)
    started = start_all(layerwise, [batch.rows for batch in batches], states, work)
    for n, batch in enumerate(batches):
        if not layerwise.division.is_mine(n):
            continue
        with work.doing("head back", _amount_of_head(layerwise, len(batch.seeds), batch.rows.shape)):
            for k, g in enumerate(_of_the_head(layerwise, batch, states.pop(("parent", depth, n)))):
                states.put(("gradient", depth, k, n), g)
    by_place: dict[tuple[int, str], list[Alternative]] = {}
    for a in alternatives:
        by_place.setdefault((a.layer, a.subblock), []).append(a)
    sums = [_Sums() for _ in batches]
    for i in reversed(layerwise.division.here_in_group):
        by_subblock = {subblock: by_place.get((i, subblock), []) for subblock in ("attention", "ffn")}
        read(layerwise, i, work)
        both = [*by_subblock["attention"], *by_subblock["ffn"]]
        for n, of_group in started.items():
            batch = batches[n]
            passes = range(len(batch.seeds))
            amount = _amount_back(layerwise, survey, i, both, len(passes), batch.rows.shape)
            with work.doing("back", amount):
                hidden = states.pop(("parent", i, n))
                layer = ParentLayer(layerwise, i, of_group, hidden, work)
                cotangents = [states.pop(("gradient", i + 1, k, n)) for k in passes]
                for k, g in enumerate(_through(layer, by_subblock, survey, hidden, cotangents, sums[n])):
                    if i:
                        states.put(("gradient", i, k, n), g)
                del layer, hidden, cotangents, g  # frees their weights
    scales = [0.5 / (len(batch.seeds) * batch.rows.shape[1]) for batch in batches]
    return [
        {identity: total * scale for identity, total in of_batch.squares.items()}
        for of_batch, scale in zip(sums, scales, strict=True)
    ]


def plan_estimate(
    layerwise: LayerwiseParent,
    alternatives: Sequence[Alternative],
    survey: Survey,
    shapes: Sequence[torch.Size],
    samples: int,
    plan: Plan,
) -> None:
    """Plan the work of :func:`estimate` on batches of shapes ``[B, T]``."""
    depth = len(layerwise.layers)
    plan_start(layerwise, shapes, plan)
    if layerwise.streamed:
        plan("reading", depth)
    by_layer = [[a for a in alternatives if a.layer == i] for i in range(depth)]
    for shape in shapes:
        plan("build", sum(not survey.of(a) for a in alternatives))
        plan("head back", _amount_of_head(layerwise, samples, shape))
        plan(
            "back",
            sum(_amount_back(layerwise, survey, i, of_layer, samples, shape) for i, of_layer in enumerate(by_layer)),
        )


def _amount_of_head(layerwise: LayerwiseParent, samples: int, shape: torch.Size) -> float:
    """Work of the head in :func:`estimate`, in operations of a head with metrics, which take longer than a softmax."""
    return (_SOFTMAX + samples) * layerwise.head_operations(*shape)


def _amount_back(
    layerwise: LayerwiseParent,
    survey: Survey,
    i: int,
    alternatives: Sequence[Alternative],
    samples: int,
    shape: torch.Size,
) -> float:
    """Approximate work of a layer in :func:`estimate`, in operations of a forward pass.

    Relative to the matrix products, norms and activations take longer in a backward pass than in a forward pass.
    """
    run = sum(share_of_layer(a) for a in alternatives if not survey.of(a))
    read = _REFITTED * sum(share_of_layer(a) for a in alternatives if a.identity in survey.refitted)
    return (1 + _BACKWARD * samples + run + read) * layerwise.operations(i, i + 1, *shape)


def _through(
    layer: ParentLayer,
    by_subblock: dict[str, list[Alternative]],
    survey: Survey,
    hidden: torch.Tensor,
    cotangents: list[torch.Tensor],
    sums: _Sums,
) -> list[torch.Tensor]:
    """Score the alternatives of a layer, and propagate the cotangents from its output to its input."""
    layout = layer.stages.layout
    if layout == "whole":
        return _Pass(layer, "attention", by_subblock["attention"] + by_subblock["ffn"], survey, hidden).back(
            cotangents, sums
        )
    attention = _Pass(layer, "attention", by_subblock["attention"], survey, hidden)
    if layout == "parallel":
        of_both = [
            p.back(cotangents, sums) for p in (_Pass(layer, "ffn", by_subblock["ffn"], survey, hidden), attention)
        ]
        return [a + b - g for a, b, g in zip(*of_both, cotangents, strict=True)]
    cotangents = _Pass(layer, "ffn", by_subblock["ffn"], survey, attention.output.detach()).back(cotangents, sums)
    return attention.back(cotangents, sums)


class _Pass:
    """A forward pass of one subblock of the parent that gradients can be taken of."""

    def __init__(
        self,
        layer: ParentLayer,
        subblock: str,
        alternatives: Sequence[Alternative],
        survey: Survey,
        given: torch.Tensor,
    ) -> None:
        self.layer, self.subblock, self.alternatives, self.survey = layer, subblock, alternatives, survey
        readers = sorted({name for a in alternatives for name in survey.of(a)})
        self.given = given.detach().requires_grad_()
        with torch.enable_grad(), watched(layer.module(subblock), readers) as (self.inputs, self.outputs):
            self.output = layer.run(subblock, self.given)

    def back(self, cotangents: list[torch.Tensor], sums: _Sums) -> list[torch.Tensor]:
        """Add each alternative's products to its sum, and return the cotangents at the input of the subblock."""
        silent = [a for a in self.alternatives if a.identity in self.survey.silencing]
        refitted = [a for a in self.alternatives if a.identity in self.survey.refitted]
        inputs = self.inputs if silent else {}
        outputs = {name: self.outputs[name] for a in refitted for name in self.survey.of(a)}
        wanted = [self.given, *inputs.values(), *outputs.values()]
        last = len(cotangents) - 1
        grads = [self._gradients(wanted, g, keep=k < last) for k, g in enumerate(cotangents)]
        with torch.no_grad():
            if silent:
                at_inputs = [dict(zip(inputs, of_pass[1:], strict=False)) for of_pass in grads]
                self._add_silent(silent, at_inputs, sums)
            if refitted:
                at_outputs = [dict(zip(outputs, of_pass[1 + len(inputs) :], strict=True)) for of_pass in grads]
                self._add_refitted(refitted, at_outputs, sums)
            for a in self.alternatives:
                if not self.survey.of(a):
                    with self.layer.layerwise.arithmetic.needs():
                        change = (self.layer.changed(a, self.given.detach()) - self.output).float()
                    for g in cotangents:
                        sums.add([a], [torch.linalg.vecdot(g.float(), change)])
        return [of_pass[0] for of_pass in grads]

    def _add_silent(self, silent: Sequence[Alternative], grads: list[dict[str, torch.Tensor]], sums: _Sums) -> None:
        masks = _masks(silent, self.survey, {name: x.shape[-1] for name, x in self.inputs.items()})
        for grad_by_reader in grads:
            products = [
                (self.inputs[name] * grad).float() @ masks[name].to(grad.device)
                for name, grad in grad_by_reader.items()
            ]
            # Some modules get the tokens of all rows in one dimension.
            total = torch.stack(products).sum(0).view(*self.given.shape[:2], -1)
            sums.add(silent, total.unbind(-1))

    def _add_refitted(self, refitted: Sequence[Alternative], grads: list[dict[str, torch.Tensor]], sums: _Sums) -> None:
        layerwise, module = self.layer.layerwise, self.layer.module(self.subblock)
        for a in refitted:
            ((name, gone),) = self.survey.of(a).items()
            x, y = self.inputs[name], self.outputs[name]
            left, weight = refitted_reader(layerwise, a, gone, x)
            change = x[..., left] @ weight.T - (y - bias_of(module.get_submodule(name)))
            with layerwise.arithmetic.needs():
                layerwise.arithmetic.add(2.0 * x[..., 0].numel() * weight.numel())
            for grad_by_reader in grads:
                product = torch.linalg.vecdot(grad_by_reader[name].float(), change.float())
                sums.add([a], [product.view(self.given.shape[:2])])

    def _gradients(self, wanted: list[torch.Tensor], g: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
        module, arithmetic = self.layer.module(self.subblock), self.layer.layerwise.arithmetic
        with arithmetic.needs():
            arithmetic.count_backward(key_of(module, g))
        return torch.autograd.grad(self.output, wanted, g, retain_graph=keep)


def _masks(silent: Sequence[Alternative], survey: Survey, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Name of a reader to ``[F, n]``, which is 1 where an alternative silences an entry."""
    masks = {name: torch.zeros(size, len(silent)) for name, size in sizes.items()}
    for column, a in enumerate(silent):
        for name, entries in survey.silencing[a.identity].items():
            masks[name][entries, column] = 1
    return masks


# ---------------------------------------------------------------------------------------------- the head


def _of_the_head(layerwise: LayerwiseParent, batch: SeededBatch, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Cotangents ``[B, T, D]`` at the output of the last layer, one for each backward pass."""
    rows = batch.rows
    generators = [[torch.Generator().manual_seed(seed) for seed in of_pass] for of_pass in batch.seeds]
    result = [torch.empty_like(hidden) for _ in batch.seeds]
    for start, end in spans(rows, layerwise.vocab_size):
        part = hidden[:, start:end].detach().requires_grad_()
        with torch.enable_grad(), layerwise.arithmetic.needs():
            logits, _ = layerwise.head(rows[:, start:end], part)
        p = logits.detach().float().softmax(-1)
        for k, of_pass in enumerate(generators):
            v = drawn(p, of_pass).to(logits.dtype)
            keep = k + 1 < len(generators)
            (result[k][:, start:end],) = torch.autograd.grad(logits, part, v, retain_graph=keep)
            with layerwise.arithmetic.needs():
                layerwise.arithmetic.count_backward(("head", part.shape))
    return result


def drawn(p: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """v of the module's docstring for distributions ``[B, T, V]``, with one generator per row."""
    signed = _signs(generators, p.shape[1], p.shape[-1], p.device) * p.sqrt()
    return torch.addcmul(signed, p, signed.sum(-1, keepdim=True), value=-1, out=signed)


_SIGN_BITS = 16
_sign_table: dict[torch.device, torch.Tensor] = {}


def _signs(generators: Sequence[torch.Generator], tokens: int, size: int, device: torch.device) -> torch.Tensor:
    """``[B, tokens, size]`` of -1 and 1, with one generator per row.

    Sixteen signs at once are looked up by random bits, which is several times faster than drawing single signs.
    """
    if device not in _sign_table:
        bits = (torch.arange(2**_SIGN_BITS)[:, None] >> torch.arange(_SIGN_BITS)) & 1
        _sign_table[device] = (2.0 * bits - 1).to(device)
    words = -(-size // 64)
    drawn = [torch.empty(tokens, words, dtype=torch.int64).random_(-(2**63), None, generator=g) for g in generators]
    halves = torch.stack(drawn).view(torch.int16).to(device, torch.int32) + 2 ** (_SIGN_BITS - 1)
    return torch.nn.functional.embedding(halves, _sign_table[device]).flatten(-2)[..., :size]
