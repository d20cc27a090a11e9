"""Importance statistics: the moments of the parent's activations that rank units, gathered in one pass.

For a projection y = W a with input channels a, the second moment C = E[a a^T] determines the mean-square effect of
removing channels on y. Removing the set S causes the error e = sum over i in S of w_i a_i, and
E|e|^2 = sum over i, j in S of (w_i . w_j) C_ij. The least-squares linear map in place of a subblock x -> y needs
E[x x^T] and E[x y^T].

The channels of experts are the input of no module, and the router weights an expert's output by g. Let R be the weight
that maps an expert's channels a to the output, y = sum over experts of g R a, and xi independent random signs. The
gradient of sum(xi y) with respect to R is G = sum over tokens of xi (g a)^T. E|G_u|^2, over the column of channel u, is
D times the sum over tokens of (g a_u)^2. E[sum over d of (G_d . R_d)(G'_d . R'_d)], over rows d of two experts, is the
sum over tokens of (g R a) . (g' R' a'): the second moment of experts. One backward pass of the FFN with respect to R
estimates both from D samples.

The numbers of a mixer's state are the output of no module. Let w be the entries of the weights that write number u of
the state or read it. Scaling them changes the output y, to first order, by its derivative. With G the gradient of
sum(xi y), E[(sum over w of w G_w)^2] is the square of that derivative, summed over tokens and outputs.

Source: random signs as in Hutchinson's estimator of a trace (Communications in Statistics 18, 1989).

Sums are accumulated in float64; products are in float32.

Shapes: N rows of activations, F channels, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.errors import InputError, UnsupportedModel
from layersmith.execution.exchange import first_tensor
from layersmith.execution.parent import Parent
from layersmith.library.axes.axis import REST, Bundle, InnerAxis, LayerAxes, Segment, StateAxis, WeightAxis
from layersmith.library.slicing import common_module, members_of
from layersmith.modeling_layersmith import first_tensor as first_argument
from layersmith.run import ranks
from layersmith.run.journal import Checkpoint
from layersmith.run.progress import SILENT, Progress

_SAVE_EVERY_SECONDS = 20.0
_PROBE_TOKENS = 8  # length of the text that shows which weights a text reaches
_SIGNS = 4  # samples of random signs per batch for a state; more batches add more samples


@dataclass(frozen=True)
class Probe:
    """One sum to gather: the second moment of a module's input, or of its input with its output.

    Attributes:
        name: Name of the sum, e.g. ``"3.ffn.channels"``.
        layer: Index of the decoder layer.
        module: Name in the layer of the observed module.
        kind: ``"moment"`` for E[a a^T], ``"energy"`` for its diagonal alone, ``"cross"`` for E[x x^T] and E[x y^T],
            ``"reader"`` for the energies of channels and the moment of experts from a gradient, ``"state"`` for the
            energies of a mixer's state or of a size inside a subblock.
        bytes: Size of the sums.
        bundle: The bundle of a ``"reader"`` probe; the module holds all of its weights.
        state: The state of a ``"state"`` probe, or the size inside a subblock; the module holds all of its weights.
        blocks: Number of consecutive rows of the module's input that belong to one token.
    """

    name: str
    layer: int
    module: str
    kind: str
    bytes: int
    bundle: Bundle | None = None
    state: StateAxis | InnerAxis | None = None
    blocks: int = 1


@dataclass(frozen=True)
class Calibration:
    """The rows over which statistics are gathered.

    Attributes:
        tokens: ``[N, T]`` ids.
        batch_sequences: Number of rows in one forward pass.
        checkpoint: File that keeps the sums so far; an interrupted pass continues from it, to the same sums.
        inputs: Digest of everything that the sums depend on; a checkpoint of other inputs is ignored.
        progress: Shows the rows done.
    """

    tokens: torch.Tensor
    batch_sequences: int
    checkpoint: Path | None = None
    inputs: str = ""
    progress: Progress = SILENT


def gather(
    parent: Parent, probes: Sequence[Probe], calibration: Calibration, memory_bytes: float
) -> dict[str, torch.Tensor]:
    """Run the parent over calibration rows and gather all probes, in one pass if their sums fit in memory.

    All processes of a launcher call this and divide the batches. The first returns the means, the others nothing. The
    sums are added in another order than in one process, in float64.

    Args:
        parent: The parent.
        probes: The sums to gather.
        calibration: The rows.
        memory_bytes: Memory for the sums; probes that do not fit are gathered in another pass.

    Returns:
        Means over the tokens, in float32: for ``moment`` ``[F, F]``, for ``energy`` and ``state`` ``[F]``, for
        ``cross`` two entries ``name.input`` and ``name.output``, ``[D, D]`` each, for ``reader`` two entries
        ``name.channels``, ``[experts, F]``, and ``name.members``, ``[experts, experts]``.
    """
    sums = ranks.together(lambda: _sums_of_this_process(parent, _passes(probes, memory_bytes), calibration))
    ranks.add_up(sums)
    count = calibration.tokens.numel()
    return {name: (total / count).float() for name, total in sums.items()} if ranks.is_first() else {}


def _sums_of_this_process(
    parent: Parent, passes: Sequence[Sequence[Probe]], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """The sums over every n-th batch, where there are n processes."""
    tokens = calibration.tokens
    batches = list(enumerate(tokens.split(calibration.batch_sequences)))[ranks.number() :: ranks.count()]
    saved = Checkpoint(calibration.checkpoint, calibration.inputs, _SAVE_EVERY_SECONDS)
    sums, done = saved.load() or ({}, 0)
    with calibration.progress.stage("statistics", len(passes) * len(tokens), "sequences") as advance:
        advance(sum(ranks.count() * len(batches[i % len(batches)][1]) for i in range(done)))
        for number, group in enumerate(passes):
            for index, (position, batch) in enumerate(batches, start=number * len(batches)):
                if index < done:
                    continue
                add_batch(parent, group, batch, sums, position)
                advance(ranks.count() * len(batch))
                if saved.is_due:
                    saved.save(sums, index + 1)
    return sums


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
    """Add the sums of a batch to ``sums``.

    Args:
        parent: The parent.
        probes: The sums to gather.
        batch: ``[B, T]`` ids.
        sums: Sums by name, in float64; changed in place.
        position: Number of the batch, which seeds its random signs.
        run: Runs the batch; default: the whole model.
    """
    observer = _Observer(parent, sums, position, len(batch))
    handles = [
        parent.layers[probe.layer]
        .get_submodule(probe.module)
        .register_forward_hook(partial(observer.observe, probe), with_kwargs=True)
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


@dataclass
class _Observer:
    """Adds what modules compute on a batch to sums.

    Attributes:
        parent: The parent.
        sums: Sums by name, in float64.
        position: Number of the batch.
        num_rows: Number of its rows.
        is_repeated: Whether a module runs a second time for its gradient; its parts are not observed then.
    """

    parent: Parent
    sums: dict[str, torch.Tensor]
    position: int
    num_rows: int
    is_repeated: bool = False

    def observe(
        self, probe: Probe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """The forward hook of a probe's module."""
        if self.is_repeated:
            return
        if probe.kind in _FROM_GRADIENTS:
            self.is_repeated = True
            try:
                call = _Call(probe, self.parent.layer(probe.layer), module, args, kwargs, self.position)
                sums_of_batch = _FROM_GRADIENTS[probe.kind](call)
            finally:
                self.is_repeated = False
            for name, value in sums_of_batch.items():
                if not torch.isfinite(value).all():
                    raise _gradients_not_finite(self.parent, probe, self.position * self.num_rows, self.num_rows)
                self._add(name, value)
            return
        x = first_argument(args, kwargs).float()
        x = x.reshape(-1, probe.blocks * x.shape[-1])
        moment = x.square().sum(0) if probe.kind == "energy" else x.T @ x
        if not torch.isfinite(moment).all():
            raise _not_finite(self.parent, probe, x.view(self.num_rows, -1), self.position * self.num_rows)
        if probe.kind in ("energy", "moment"):
            self._add(probe.name, moment)
        else:
            y = first_tensor(output).flatten(0, -2).float()
            self._add(f"{probe.name}.input", moment)
            self._add(f"{probe.name}.output", x.T @ y)

    def _add(self, name: str, value: torch.Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value.double().cpu()
        else:
            self.sums[name] = value.double().cpu()


def _not_finite(parent: Parent, probe: Probe, by_row: torch.Tensor, rows_before: int) -> InputError:
    """The error for activations ``[B, ...]`` of a batch, some of which are NaN, infinite, or too large to square."""
    dtype = str(parent.runtime.dtype).removeprefix("torch.")
    wrong = (~torch.isfinite(by_row)).any(1).nonzero()
    what = f"NaN or infinite in {dtype}" if len(wrong) else "so large that their squares overflow float32"
    row = int(wrong[0, 0]) if len(wrong) else int(by_row.abs().amax(1).argmax())
    mend = "Set dtype to float32 in the recipe" if dtype == "float16" else "Check the parent's weights"
    return InputError(
        f"{parent.path}: the inputs of {probe.module} in layer {probe.layer} are {what}, first in row "
        f"{rows_before + row} of the calibration text. {mend}."
    )


def _gradients_not_finite(parent: Parent, probe: Probe, rows_before: int, num_rows: int) -> InputError:
    """The error where a product of gradients is NaN or infinite though the module's inputs are finite."""
    dtype = str(parent.runtime.dtype).removeprefix("torch.")
    mend = "Check the parent's weights" if dtype == "float32" else "Set dtype to float32 in the recipe"
    return InputError(
        f"{parent.path}: the gradients of {probe.module} in layer {probe.layer} are NaN or infinite in {dtype}, in "
        f"rows {rows_before} to {rows_before + num_rows - 1} of the calibration text. {mend}."
    )


@dataclass(frozen=True)
class _Call:
    """One call of a probe's module, in one batch."""

    probe: Probe
    layer: nn.Module
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int

    def signed_gradients(
        self, parameters: Sequence[nn.Parameter], samples: int
    ) -> list[tuple[torch.Tensor | None, ...]]:
        """Per sample, the gradients of the output times random signs with respect to the parameters."""
        probe = self.probe
        generator = torch.Generator().manual_seed(1_000_003 * self.position + probe.layer)
        with requiring_grad(parameters), torch.enable_grad():
            output = first_tensor(self.module.forward(*_detached(self.args), **_detached(self.kwargs)))
            if not output.requires_grad:
                raise UnsupportedModel(f"layer {probe.layer}: no gradient of {probe.module} reaches the weights in it.")
            gradients: list[tuple[torch.Tensor | None, ...]] = []
            for sample in range(samples):
                signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
                keep = sample + 1 < samples
                gradients.append(
                    torch.autograd.grad(output, parameters, signs.to(output), retain_graph=keep, allow_unused=True)
                )
        return gradients


def _of_reader(call: _Call) -> dict[str, torch.Tensor]:
    """Sums over a batch's tokens: energies ``[experts, F]`` and the moment ``[experts, experts]``."""
    probe, bundle = call.probe, call.probe.bundle
    assert bundle is not None
    w = bundle.weight(bundle.reader)
    names = [w.name.format(m) for m in range(bundle.members if bundle.members and not bundle.stacked else 1)]
    weights = {name: call.layer.get_parameter(name) for name in names}
    (gradients,) = call.signed_gradients(list(weights.values()), 1)
    by_name = {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(names, gradients, strict=True)}
    channels, products = [], []
    pairs = zip(members_of(by_name, bundle, w), members_of(weights, bundle, w), strict=True)
    for (grad, dim), (weight, _) in pairs:
        g, r = (t.detach().movedim(dim, 1).float() for t in (grad, weight))  # [D, F]
        channels.append(g.square().sum(0) / len(g))
        products.append((g * r).sum(1))
    rows = torch.stack(products)
    return {f"{probe.name}.channels": torch.stack(channels), f"{probe.name}.members": rows @ rows.T}


def _of_state(call: _Call) -> dict[str, torch.Tensor]:
    """``[N]``: sums over a batch's tokens of the energy of each number of a state, or of a size inside a subblock."""
    state = call.probe.state
    assert state is not None
    part, sizes = ("state", {"state": state.size}) if isinstance(state, StateAxis) else ("channels", state.sizes)
    parameters = [call.layer.get_parameter(w.name) for w in state.makers]
    total = torch.zeros(sizes[part])
    for grads in call.signed_gradients(parameters, _SIGNS):
        change = torch.zeros(sizes[part])
        for w, p, g in zip(state.makers, parameters, grads, strict=True):
            if g is not None:
                entries = (p.detach().float() * g.float()).movedim(w.dim, 0).reshape(p.shape[w.dim], -1).sum(1).cpu()
                change += entries[w.positions(part, {**sizes, REST: 1})].sum(1)
        total += change.square() / _SIGNS
    return {call.probe.name: total}


_FROM_GRADIENTS = {"reader": _of_reader, "state": _of_state}


def expert_reader(parent: Parent, i: int, axes: LayerAxes) -> Bundle:
    """The bundle of the routed experts, with the weight whose gradient gives the contribution of each expert.

    Where the experts have no width axis, it is the last of their weights. Of several stacks, e.g. some for images, it
    is the last that a text reaches.
    """
    experts = axes.experts
    assert experts is not None
    for bundle in axes.ffn.bundles if axes.ffn is not None else ():
        if bundle.members:
            return bundle
    layer = parent.layers[i]
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    stacks = [w for w in experts.weights if len(shapes[w.name]) == 3]
    if len({w.name.rpartition(".")[0] for w in stacks}) > 1:
        stacks = _reached_by_text(parent, layer, stacks) or stacks
    flat = [] if stacks else [w for w in experts.weights if w.name in axes.of_experts]
    if stacks:
        name, dim, size = stacks[-1].name, 2, shapes[stacks[-1].name][2]
    elif flat:
        name, dim, size = flat[-1].name, 1, shapes[flat[-1].name][0] // experts.size
    else:
        prefix = f"{experts.lists[0]}.0."
        first = [n for n, p in layer.named_parameters() if n.startswith(prefix) and p.ndim == 2][-1]
        name, dim, size = first.replace(prefix, f"{experts.lists[0]}.{{}}."), 1, shapes[first][1]
    return Bundle(
        size=size,
        weights=(WeightAxis(name, dim, (Segment("channels"),)),),
        reader=name,
        members=experts.size,
        stacked=bool(stacks or flat),
        flat=bool(flat),
    )


def expert_holder(layer: nn.Module, axes: LayerAxes, bundle: Bundle) -> str:
    """The module that holds the experts and their router, whose output is therefore weighted by the router."""
    assert axes.experts is not None
    return common_module(layer, [w.name for w in (*bundle.weights, *axes.experts.weights)])


def _reached_by_text(parent: Parent, layer: nn.Module, weights: Sequence[WeightAxis]) -> list[WeightAxis]:
    """The weights for which a text's logits have a gradient."""
    if parent.stream is not None:
        return []
    parameters = [layer.get_parameter(w.name) for w in weights]
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=parent.runtime.device)[None]
    with requiring_grad(parameters), torch.enable_grad():
        total = parent.model(input_ids=ids, use_cache=False).logits.float().sum()
        if not total.requires_grad:
            return []
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [w for w, gradient in zip(weights, gradients, strict=True) if gradient is not None]


@contextmanager
def requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients be taken with respect to these parameters while the block runs."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in zip(parameters, before, strict=True):
            p.requires_grad_(required)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value
