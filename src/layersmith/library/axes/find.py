"""Finds the axes of a model's layers, the first of four steps: find an axis, try it, prove it, slice it.

* find: experiments on the meta device show which weights a size governs (here; ``experiments``, ``widths``,
  ``experts``, ``heads``, ``mixers``, ``inner``). In which order units lie along a dimension is a guess at this point.
* try: a layer runs in the parent's place with some units removed (``trial``).
* prove: among the guesses, the one is kept whose removal of dead units changes nothing (``prove``, ``prove_mixers``,
  ``prove_inner``).
* slice: the weights of an alternative are cut from the parent's by the proved axis (``library.slicing``).

Whether every alternative of a proved axis runs is tried last (``feasible``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes, NoAxis
from layersmith.library.axes.experiments import ModelExperiments, Resized
from layersmith.library.axes.experts import find_experts, members_of, why_no_experts
from layersmith.library.axes.heads import attention_heads
from layersmith.library.axes.inner import find_inner
from layersmith.library.axes.mixers import keeps_state, mixer_head_size, mixer_heads, mixer_state
from layersmith.library.axes.widths import find_shared_width, find_width, has_shared_width
from layersmith.model_descriptor.base import ModelDescriptor

# Transformers' names for what an attention sees.
FULL, SLIDING = "full_attention", "sliding_attention"


def find_axes(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[LayerAxes]:
    """The axes of every layer of a model whose layers are ``blocks``."""
    model = ModelExperiments(descriptor, config, blocks)
    return [_layer_axes(model, i) for i in range(len(blocks))]


def _layer_axes(model: ModelExperiments, i: int) -> LayerAxes:
    reasons: dict[str, str] = {}

    def tried(name: str, find: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return find(model, i, *arguments)
        except NoAxis as reason:
            reasons[name] = str(reason)
            return None

    has_experts, has_state = model.blocks[i].ffn.moe is not None, keeps_state(model, i)
    experts = tried("experts", find_experts) if has_experts else None
    members = tried("experts", members_of) if has_experts else None
    width = tried("ffn", find_width)
    inner = [tried(f"inner.{name}", find_inner, name) for name in model.described.layer_facts(i).inner_sizes]
    if not has_experts and (reason := why_no_experts(model, i)):
        reasons["experts"] = reason
    return LayerAxes(
        ffn=width,
        experts=experts,
        of_experts=(*members.stacks, *members.lists) if members else (),
        shared=tried("shared", find_shared_width) if has_shared_width(model, i) else None,
        kv=tried("attention", attention_heads, reasons),
        window=tried("window", _find_window) or "",
        mixer=tried("mixer", mixer_heads) if has_state else None,
        state=tried("state", mixer_state) if has_state else None,
        mixer_size=tried("mixer_size", mixer_head_size) if has_state else None,
        inner=tuple(axis for axis in inner if axis is not None),
        reasons=reasons,
    )


def has_windows(types: Sequence[str] | None) -> bool:
    """Whether some layers see everything and others a sliding window, by the types of attention in a config."""
    return {FULL, SLIDING} <= set(types or ())


def _find_window(model: ModelExperiments, i: int) -> str:
    """The type of attention with a sliding window, where the model has both types and this layer has full attention."""
    types = getattr(model.language, "layer_types", None)
    attention = model.blocks[i].attention
    if attention.no_op or attention.replace_with_linear:
        raise NoAxis("there is no attention")
    if types is None or not has_windows(types):
        raise NoAxis("its model does not have both kinds of attention")
    if (attention.layer_type or types[i]) != FULL:
        raise NoAxis("it does not see everything as it is")

    def windowed(block: BlockConfig, j: int, larger: bool) -> Resized | None:
        if types[j] != FULL or block.attention.no_op or block.attention.replace_with_linear:
            return None
        return Resized(Alternative(j, "attention", "window", SLIDING).block_config(block), 0, 1)

    made = model.experiment("window", windowed)
    if made.problem or made.effects[i]:
        raise NoAxis(made.problem or "attention with a window has other weights")
    return SLIDING
