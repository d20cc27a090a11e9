"""Importance statistics: what every axis needs to know of the parent's activations, gathered in one pass.

For a projection y = W a with input channels a, the second moment C = E[a a^T] tells everything about what removing
channels does to y in the mean square: removing the set S adds the error e = sum over i in S of w_i a_i, and
E|e|^2 = sum over i, j in S of (w_i . w_j) C_ij. For a linear map in place of a subblock x -> y, the least-squares
solution needs E[x x^T] and E[x y^T].

Of experts no module's input tells the channels, and what an expert adds to a token is weighted by the router. Let R be
the weight that reads an expert's channels a into the output, y = sum over experts of g R a, and xi independent random
signs. The gradient of sum(xi y) with respect to R is G = sum over tokens of xi (g a)^T. Then E|G_u|^2, over the column
of channel u, is D times the sum over tokens of (g a_u)^2, and E[sum over d of (G_d . R_d)(G'_d . R'_d)], over rows d of
two experts, is the sum over tokens of (g R a) . (g' R' a'): the same second moment, of experts. One backward pass of
the FFN with respect to R gives both, from D samples.

Of a mixer's state no module's output tells the numbers. Scaling all entries of the weights that write to one number u
of the state and read it changes the output y, to first order, by its derivative; with G the gradient of sum(xi y),
E[(sum over entries w of u of w G_w)^2] is the square of that derivative, summed over tokens and outputs.

Sums are accumulated in float64; products are in float32.

Shapes: N rows of activations, F channels, D hidden, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.execution.exchange import first_tensor
from layersmith.execution.parent import Parent
from layersmith.library.axes.axis import Bundle, LayerAxes, Segment, StateAxis, WeightAxis
from layersmith.library.slicing import common_module, members_of
from layersmith.modeling_layersmith import first_tensor as first_argument
from layersmith.run.journal import Checkpoint
from layersmith.run.progress import SILENT, Progress

_SAVE_EVERY_SECONDS = 20.0
_PROBE_TOKENS = 8  # that tell which weights a text reaches
_SIGNS = 4  # samples of random signs a batch for a state; there are as many more as there are batches


@dataclass(frozen=True)
class Probe:
    """One sum to gather: the second moment of what goes into a module, or of its input with its output.

    Attributes:
        name: of the sum, e.g. ``"3.ffn.channels"``.
        layer: index of the decoder layer.
        module: name in the layer of the module that is watched.
        kind: ``"moment"`` for E[a a^T], ``"energy"`` for its diagonal alone, ``"cross"`` for E[x x^T] and E[x y^T],
            ``"reader"`` for the energies of channels and the moment of experts from a gradient, ``"state"`` for those
            of a mixer's state.
        bytes: of its sums.
        bundle: whose reader, for ``"reader"``; the module is one that holds all of it.
        state: which state, for ``"state"``; the module is one that holds all of its weights.
        blocks: neighbouring rows that the module is given for one token.
    """

    name: str
    layer: int
    module: str
    kind: str
    bytes: int
    bundle: Bundle | None = None
    state: StateAxis | None = None
    blocks: int = 1


def gather(
    parent: Parent,
    probes: Sequence[Probe],
    tokens: torch.Tensor,
    *,
    batch_sequences: int,
    memory_bytes: float,
    checkpoint: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Run the parent over ``tokens`` and gather all probes, in one pass if their sums fit in ``memory_bytes``.

    Args:
        parent: the parent.
        probes: what to gather.
        tokens: ``[N, T]`` ids.
        batch_sequences: rows in one forward pass.
        memory_bytes: for the sums; probes that do not fit wait for another pass.
        checkpoint: a file that keeps the sums so far; an interrupted call goes on from there, to the same sums.
        inputs: digest of everything the sums depend on; a checkpoint of other inputs is not used.
        progress: shows rows done.

    Returns:
        Means over the tokens, in float32: for ``moment`` ``[F, F]``, for ``energy`` and ``state`` ``[F]``, for
        ``cross`` two entries ``name.input`` and ``name.output``, ``[D, D]`` each, for ``reader`` two entries
        ``name.channels``, ``[experts, F]``, and ``name.members``, ``[experts, experts]``.
    """
    passes = _passes(probes, memory_bytes)
    batches = [tokens[i : i + batch_sequences] for i in range(0, len(tokens), batch_sequences)]
    saved = Checkpoint(checkpoint, inputs, _SAVE_EVERY_SECONDS)
    sums, done = saved.load() or ({}, 0)
    with progress.stage("statistics", len(passes) * len(tokens), "sequences") as advance:
        advance(sum(len(batches[i % len(batches)]) for i in range(done)))
        for number, group in enumerate(passes):
            for index, batch in enumerate(batches):
                position = number * len(batches) + index
                if position < done:
                    continue
                add_batch(parent, group, batch, sums, position)
                advance(len(batch))
                if saved.is_due:
                    saved.save(sums, position + 1)
    count = tokens.numel()
    return {name: (total / count).float() for name, total in sums.items()}


def _passes(probes: Sequence[Probe], memory_bytes: float) -> list[list[Probe]]:
    passes: list[list[Probe]] = [[]]
    used = 0.0
    for probe in probes:
        if passes[-1] and used + probe.bytes > memory_bytes:
            passes.append([])
            used = 0.0
        passes[-1].append(probe)
        used += probe.bytes
    return passes


@torch.no_grad()
def add_batch(
    parent: Parent,
    probes: Sequence[Probe],
    batch: torch.Tensor,
    sums: dict[str, torch.Tensor],
    position: int,
    run: Callable[[], object] | None = None,
) -> None:
    """Add what a batch ``[B, T]`` gives, when it runs through the model or through what ``run`` runs, to sums."""
    again = False  # while a module runs a second time, for its gradient, its parts are not watched

    def add(name: str, value: torch.Tensor) -> None:
        if name in sums:
            sums[name] += value.double().cpu()
        else:
            sums[name] = value.double().cpu()

    def hook(probe: Probe) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal again
            if again:
                return
            if probe.kind in _FROM_GRADIENTS:
                again = True
                try:
                    sums_of_batch = _FROM_GRADIENTS[probe.kind](parent, probe, module, args, kwargs, position)
                finally:
                    again = False
                for name, value in sums_of_batch.items():
                    add(name, value)
                return
            x = first_argument(args, kwargs).float()
            x = x.reshape(-1, probe.blocks * x.shape[-1])
            if probe.kind == "energy":
                add(probe.name, x.square().sum(0))
            elif probe.kind == "moment":
                add(probe.name, x.T @ x)
            else:
                y = first_tensor(output).flatten(0, -2).float()
                add(f"{probe.name}.input", x.T @ x)
                add(f"{probe.name}.output", x.T @ y)

        return watch

    layers = parent.layers
    handles = [
        layers[probe.layer].get_submodule(probe.module).register_forward_hook(hook(probe), with_kwargs=True)
        for probe in probes
    ]
    try:
        if run is None:
            parent.model(input_ids=batch.to(parent.runtime.device), use_cache=False)
        else:
            run()
    finally:
        for handle in handles:
            handle.remove()


def _of_reader(
    parent: Parent, probe: Probe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: int
) -> dict[str, torch.Tensor]:
    """Sums over a batch's tokens: energies ``[experts, F]`` and the moment ``[experts, experts]``."""
    bundle = probe.bundle
    assert bundle is not None
    w = bundle.weight(bundle.reader)
    named = dict(parent.layer(probe.layer).named_parameters())
    names = [w.name.format(m) for m in range(bundle.members if bundle.members and not bundle.stacked else 1)]
    parameters = [named[name] for name in names]
    (grads,) = _signed_gradients(probe, module, args, kwargs, position, parameters, 1)
    seen = {n: p.new_zeros(p.shape) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}
    channels, products = [], []
    weights = dict(zip(names, parameters, strict=True))
    pairs = zip(members_of(seen, bundle, w), members_of(weights, bundle, w), strict=True)
    for (grad, dim), (weight, _) in pairs:
        g, r = (t.detach().movedim(dim, 1).float() for t in (grad, weight))  # [D, F]
        channels.append(g.square().sum(0) / len(g))
        products.append((g * r).sum(1))
    rows = torch.stack(products)
    return {f"{probe.name}.channels": torch.stack(channels), f"{probe.name}.members": rows @ rows.T}


def _of_state(
    parent: Parent, probe: Probe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: int
) -> dict[str, torch.Tensor]:
    """``[F]``: sums over a batch's tokens of what each number of a state adds."""
    state = probe.state
    assert state is not None
    named = dict(parent.layer(probe.layer).named_parameters())
    parameters = [named[w.name] for w in state.makers]
    total = torch.zeros(state.size)
    for grads in _signed_gradients(probe, module, args, kwargs, position, parameters, _SIGNS):
        change = torch.zeros(state.size)
        for w, p, g in zip(state.makers, parameters, grads, strict=True):
            if g is not None:
                entries = (p.detach().float() * g.float()).reshape(len(p), -1).sum(1).cpu()
                change += entries[w.positions("state", {"state": state.size})].sum(1)
        total += change.square() / _SIGNS
    return {probe.name: total}


def expert_reader(parent: Parent, i: int, own: LayerAxes) -> Bundle:
    """The bundle of the routed experts, with the weight whose gradients tell the contribution of each expert.

    Where their channels are not understood it is the last of their weights; of several stacks, e.g. some for images,
    the last that a text reaches.
    """
    assert own.experts is not None
    layer = parent.layer(i)
    bundles = own.ffn.bundles if own.ffn is not None else ()
    for bundle in bundles:
        if bundle.members:
            return bundle
    stacks = [w for w in own.experts.weights if layer.state_dict()[w.name].ndim == 3]
    if len({w.name.rpartition(".")[0] for w in stacks}) > 1:
        stacks = _reached_by_text(parent, layer, stacks) or stacks
    if stacks:
        last = dataclasses.replace(stacks[-1], dim=2, segments=(Segment("channels"),))
        return Bundle(layer.state_dict()[last.name].shape[2], (last,), last.name, own.experts.size, True)
    if flat := [w for w in own.experts.weights if w.name in own.of_experts]:
        last = dataclasses.replace(flat[-1], dim=1, segments=(Segment("channels"),))
        size = layer.state_dict()[last.name].shape[0] // own.experts.size
        return Bundle(size, (last,), last.name, own.experts.size, True, flat=True)
    prefix = f"{own.experts.lists[0]}.0."
    name = [n for n, p in layer.named_parameters() if n.startswith(prefix) and p.ndim == 2][-1]
    last = WeightAxis(name.replace(prefix, f"{own.experts.lists[0]}.{{}}."), 1, (Segment("channels"),))
    return Bundle(layer.state_dict()[name].shape[1], (last,), last.name, own.experts.size, False)


def expert_holder(layer: nn.Module, own: LayerAxes, bundle: Bundle) -> str:
    """The module that holds the experts and their router, so that what it gives is weighted."""
    assert own.experts is not None
    return common_module(layer, [w.name for w in (*bundle.weights, *own.experts.weights)])


def _reached_by_text(parent: Parent, layer: nn.Module, weights: Sequence[WeightAxis]) -> list[WeightAxis]:
    """Those weights of which a text's logits have a gradient."""
    if parent.stream is not None:
        return []
    parameters = [layer.get_parameter(w.name) for w in weights]
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=parent.runtime.device)[None]
    with requiring_grad(parameters), torch.enable_grad():
        total = parent.model(input_ids=ids, use_cache=False).logits.float().sum()
        if not total.requires_grad:
            return []
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [w for w, g in zip(weights, found, strict=True) if g is not None]


_FROM_GRADIENTS = {"reader": _of_reader, "state": _of_state}


def _signed_gradients(
    probe: Probe,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    position: int,
    parameters: Sequence[nn.Parameter],
    samples: int,
) -> list[tuple[torch.Tensor | None, ...]]:
    """Gradients of a module's output times random signs, with respect to parameters of it; as often as asked."""
    generator = torch.Generator().manual_seed(1_000_003 * position + probe.layer)
    with requiring_grad(parameters), torch.enable_grad():
        output = first_tensor(module.forward(*_detached(args), **_detached(kwargs)))
        if not output.requires_grad:
            raise UnsupportedModel(f"layer {probe.layer}: no gradient of {probe.module} reaches the weights in it.")
        found: list[tuple[torch.Tensor | None, ...]] = []
        for sample in range(samples):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            keep = sample + 1 < samples
            found.append(
                torch.autograd.grad(output, parameters, signs.to(output), retain_graph=keep, allow_unused=True)
            )
    return found


@contextmanager
def requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While open, gradients can be taken with respect to these."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, own in zip(parameters, before, strict=True):
            p.requires_grad_(own)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value
