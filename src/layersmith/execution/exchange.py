"""Run a model from the middle, or with some layers exchanged, through its ``forward``.

A model's forward makes masks, positions, caches and logits in ways that differ from family to family. So parts of a
model run by exchanging decoder layers, never by a second implementation of the forward. A layer that need not run is
replaced by a module that returns hidden states computed before.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.no_op import DummyBlock
from layersmith.modeling_layersmith import place_layer_buffers, unsaved_buffers

# Attribute of a layer whose type differs from the one in the parent's config.
LAYER_TYPE = "layersmith_layer_type"


class Handover(DummyBlock):
    """Takes the place of a layer that need not run: returns a given output, in the form of the layer's."""

    def __init__(self, original_layer: nn.Module, block_index: int, output: Any):
        super().__init__(original_layer, block_index)
        self.output = output

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.output


@contextmanager
def exchanged(parent: Parent, layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """While open, the model has other decoder layers at some indices.

    A layer that got or lost a sliding window has the mask of its new type.
    """
    before = parent.layers
    originals = {i: before[i] for i in layers}
    types = getattr(parent.language_config, "layer_types", None)
    changed = {
        i: getattr(layer, LAYER_TYPE)
        for i, layer in layers.items()
        if isinstance(getattr(layer, LAYER_TYPE, None), str)
    }
    try:
        if types and changed:
            parent.language_config.layer_types = [changed.get(i, layer_type) for i, layer_type in enumerate(types)]
        for i, layer in layers.items():
            parent.model.set_submodule(parent.descriptor.layer_block_name(i), layer)
        yield
    finally:
        if types and changed:
            parent.language_config.layer_types = types
        for i, layer in originals.items():
            parent.model.set_submodule(parent.descriptor.layer_block_name(i), layer)


def logits_and_hidden(parent: Parent, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[B, T, V]`` and the hidden states ``[B, T, D]`` that the head reads."""
    seen: list[torch.Tensor] = []
    norm = parent.model.get_submodule(parent.descriptor.final_norm_name().removesuffix(".weight"))
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = parent.model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits, seen[-1]


forward = torch.inference_mode()(logits_and_hidden)


@torch.inference_mode()
def layer_outputs(parent: Parent, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """As :func:`forward`, with the output of every decoder layer."""
    outputs: list[Any] = [None] * len(parent.blocks)

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[index] = output

        return hook

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(parent.layers)]
    try:
        logits, hidden = forward(parent, input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return logits, hidden, outputs


@torch.no_grad()
def first_overflow(parent: Parent) -> str | None:
    """The first part of a parent that gives NaN or infinity for a few tokens, e.g. ``layer 3``; None if none does."""
    ids = torch.arange(32, device=parent.runtime.device)[None] * 31 % parent.language_config.vocab_size
    logits, _, outputs = layer_outputs(parent, ids[:, : parent.positions])
    # Some families give minus infinity to tokens that do not exist.
    if not (logits.isnan() | (logits == torch.inf)).any():
        return None
    wrong = (i for i, output in enumerate(outputs) if not torch.isfinite(first_tensor(output)).all())
    first = next(wrong, None)
    return "the head" if first is None else f"layer {first}"


def forward_with(
    parent: Parent, input_ids: torch.Tensor, outputs: list[Any], index: int, layer: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`forward`, with ``layer`` at ``index``; earlier layers hand over the parent's ``outputs``."""
    layers = _handovers(parent, outputs, index) if hands_over(parent) else {}
    with exchanged(parent, {**layers, index: layer}):
        return forward(parent, input_ids)


def _handovers(parent: Parent, outputs: list[Any], index: int) -> dict[int, nn.Module]:
    return {i: Handover(parent.layers[i], i, outputs[i]) for i in range(index)}


def hands_over(parent: Parent) -> bool:
    """Whether a layer can run on the output of the layers before it when these did not run; tried once.

    It cannot where layers pass on more than hidden states, e.g. keys and values that later layers use.
    """
    return bool(parent.once("hands over hidden states alone", lambda: _can_hand_over(parent)))


def few_tokens(parent: Parent) -> torch.Tensor:
    """``[1, 8]`` token ids; any will do for a check."""
    return torch.arange(3, 11, device=parent.runtime.device)[None] % parent.language_config.vocab_size


def more_tokens(parent: Parent) -> torch.Tensor:
    """``[2, 32]`` others: enough for masks and windows to matter."""
    ids = torch.arange(3, 35, device=parent.runtime.device)[None] % parent.language_config.vocab_size
    return ids.flip(1).repeat(2, 1)


# Runs of the whole model that several checks share: a parent on the disk is read as a whole for each.


def outputs_on_few_tokens(parent: Parent) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """:func:`layer_outputs` on :func:`few_tokens`, run once."""
    found: tuple[torch.Tensor, torch.Tensor, list[Any]] = parent.once(
        "outputs on a few tokens", lambda: layer_outputs(parent, few_tokens(parent))
    )
    return found


def logits_on_more_tokens(parent: Parent) -> torch.Tensor:
    """Logits of :func:`more_tokens`, run once."""
    logits: torch.Tensor = parent.once("logits on more tokens", lambda: forward(parent, more_tokens(parent))[0])
    return logits


def _can_hand_over(parent: Parent) -> bool:
    """Try it: each layer alone must return the same, although the others last ran on other tokens."""
    input_ids = few_tokens(parent)
    _, _, outputs = outputs_on_few_tokens(parent)
    if any(output is None for output in outputs):
        return False
    with foreign_code("does a layer run without those before it?", refusal_is_answer=True) as attempt:
        logits_on_more_tokens(parent)
        for index in reversed(range(1, len(parent.blocks))):
            with exchanged(parent, _handovers(parent, outputs, index)):
                alone = output_of(parent.layers[index], lambda: forward(parent, input_ids))
            if not torch.equal(alone, first_tensor(outputs[index])):
                return False
    return not attempt.failed


class _Enough(Exception):
    """The layer has run; nothing after it is wanted."""


def output_of(layer: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """The hidden states that a layer returns in a run of its model, which stops there."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(first_tensor(output))
        raise _Enough

    handle = layer.register_forward_hook(stop)
    try:
        run()
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


def set_weight(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Set a weight without changing the tensor that another model may share."""
    holder, _, last = name.rpartition(".")
    module.get_submodule(holder).register_parameter(last, nn.Parameter(weight, requires_grad=False))


def share_buffers(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` use the buffers of ``source`` that no ``state_dict`` holds.

    Buffers that depend on the sizes of a layer are not shared.
    """
    wanted = unsaved_buffers(target)
    for name, buffer in source.named_buffers():
        if name in wanted:
            module, _, local_name = name.rpartition(".")
            setattr(target.get_submodule(module), local_name, buffer)
    place_layer_buffers(target)


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference, relative to a layer's update, that rounding alone explains in a dtype.

    It decides whether two ways to compute a layer are the same: layer by layer or whole, with dead units or without.
    A wrong slice or split differs by about 1. Scoring allows more for what it only estimates (``second_order``).
    """
    return {torch.float32: 1e-4, torch.float64: 1e-8}.get(dtype, 3e-2)


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states in what a layer or subblock returned."""
    return output if isinstance(output, torch.Tensor) else output[0]
