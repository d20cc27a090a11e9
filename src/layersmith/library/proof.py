"""Proof that a slice means what its axis says, on the parent's own weights.

If the output projection reads nothing from a channel, the channel is dead and removing it must not change what the
layer gives. So some channels of a copy of a layer are made dead by zeroing their columns in the output projection, the
same channels are sliced away, and both layers must agree. An axis that fails is turned off, with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from layersmith.block_config import AttentionConfig, FFNConfig
from layersmith.execution import first_tensor, forward_with, layer_outputs, share_buffers
from layersmith.library.axes import Axis, LayerAxes, WeightAxis, layer_shapes, meta_layers
from layersmith.library.weights import keep_kv_heads, narrow_ffn
from layersmith.parent import Parent


def prove(parent: Parent, axes: Sequence[LayerAxes], tokens: torch.Tensor) -> list[LayerAxes]:
    """The axes that hold, by experiment on one layer of every distinct shape.

    Args:
        parent: the parent.
        axes: as found on the meta device.
        tokens: ``[1, T]`` ids; a few dozen are enough.
    """
    tokens = tokens.to(parent.runtime.device)
    _, _, outputs = layer_outputs(parent, tokens)
    verdicts: dict[tuple[object, ...], tuple[Axis | None, str]] = {}
    proved = []
    for i, own in enumerate(axes):
        shapes = tuple(sorted(layer_shapes(parent.layers[i]).items()))
        ffn, kv, reasons = own.ffn, own.kv, dict(own.reasons)
        if ffn is not None:
            key = ("ffn", type(parent.layers[i]), shapes, ffn)
            if key not in verdicts:
                verdicts[key] = _prove_ffn(parent, i, ffn, tokens, outputs)
            ffn, reason = verdicts[key]
            if ffn is None:
                reasons["ffn"] = reason
        if kv is not None:
            key = ("kv", type(parent.layers[i]), shapes, kv)
            if key not in verdicts:
                verdicts[key] = _prove_kv(parent, i, kv, tokens, outputs)
            kv, reason = verdicts[key]
            if kv is None:
                reasons["attention"] = reason
        proved.append(LayerAxes(ffn, kv, reasons))
    return proved


def _prove_ffn(parent: Parent, i: int, axis: Axis, tokens: torch.Tensor, outputs: list) -> tuple[Axis | None, str]:
    kept = torch.arange(0, axis.size, 2)
    block = dataclasses.replace(parent.blocks[i], ffn=FFNConfig(intermediate_size=len(kept)))
    layouts = [axis]
    if any(w.unit > 1 for w in axis.weights):
        # Where a weight holds several entries a channel, two layouts are usual; the proof tells which it is.
        flipped = tuple(dataclasses.replace(w, channels_inner=w.unit > 1) for w in axis.weights)
        layouts.append(dataclasses.replace(axis, weights=flipped))
    difference = float("inf")
    for layout in layouts:
        reader = next(w for w in layout.weights if w.name == f"{axis.output}.weight")
        dead = reader.entries(torch.arange(1, axis.size, 2), axis.size)
        narrow = partial(narrow_ffn, axis=layout, channels=kept)
        difference = _compare(parent, i, block, reader, dead, narrow, tokens, outputs)
        if difference < _tolerance(parent):
            return layout, ""
    return (
        None,
        f"removing dead channels changes the layer's output by {difference:.1e}, so the slice is not understood",
    )


def _prove_kv(parent: Parent, i: int, axis: Axis, tokens: torch.Tensor, outputs: list) -> tuple[Axis | None, str]:
    count = max(k for k in range(1, axis.size // 2 + 1) if axis.num_heads % k == 0)
    kept = torch.arange(axis.size)[-count:]  # not the first ones, so that the order of heads is put to the test
    block = dataclasses.replace(parent.blocks[i], attention=AttentionConfig(num_key_value_heads=count))
    group = axis.num_heads // axis.size
    reader = next(w for w in axis.queries if w.name == f"{axis.output}.weight")
    dead_heads = torch.tensor([h for h in range(axis.num_heads) if h // group not in kept.tolist()])
    difference = _compare(
        parent,
        i,
        block,
        reader,
        reader.entries(dead_heads, axis.num_heads),
        lambda weights: keep_kv_heads(weights, axis, kept),
        tokens,
        outputs,
    )
    if difference < _tolerance(parent):
        return axis, ""
    return None, f"removing dead heads changes the layer's output by {difference:.1e}, so the slice is not understood"


def _tolerance(parent: Parent) -> float:
    return 1e-4 if parent.runtime.dtype == torch.float32 else 3e-2


def _compare(
    parent: Parent,
    i: int,
    block: object,
    reader: WeightAxis,
    dead: torch.Tensor,
    slice_weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    tokens: torch.Tensor,
    outputs: list,
) -> float:
    """The largest difference between layer ``i`` with dead entries and with them removed, relative to its update."""
    original = parent.layers[i]
    with_dead = copy.deepcopy(original)
    weight = with_dead.get_parameter(reader.name)
    weight.data.index_fill_(reader.dim, dead.to(weight.device), 0)
    blocks = [block if j == i else own for j, own in enumerate(parent.blocks)]
    narrow = copy.deepcopy(meta_layers(parent.descriptor, parent.config, blocks)[i])  # type: ignore[arg-type]
    tensors: dict[str, torch.Tensor] = dict(with_dead.named_parameters())
    tensors |= slice_weights(tensors)
    narrow.load_state_dict({name: tensors[name] for name, _ in narrow.named_parameters()}, strict=False, assign=True)
    share_buffers(original, narrow)
    seen: list[torch.Tensor] = []
    for layer in (with_dead, narrow.eval()):
        _run(parent, tokens, outputs, i, layer, seen)
    before = first_tensor(outputs[i - 1]) if i else parent.model.get_input_embeddings()(tokens)
    update = (seen[0] - before).float().abs().max().clamp_min(1e-12)
    return float((seen[0] - seen[1]).float().abs().max() / update)


def _run(
    parent: Parent, tokens: torch.Tensor, outputs: list, i: int, layer: nn.Module, seen: list[torch.Tensor]
) -> None:
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output)))
    try:
        forward_with(parent, tokens, outputs, i, layer)
    finally:
        handle.remove()
