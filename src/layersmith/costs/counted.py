"""Costs that are counted, not measured: parameters and bytes, as exact integers.

They equal what the realized model holds: shapes are those of layers built on the meta device, tied weights count once,
and the size of a head is the true one, read off the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig, has_attention
from layersmith.heterogeneous.build import build
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import BATCH, CONTEXT

COSTS = ("parameters", "active_parameters", "weight_bytes", "kv_cache_bytes", "memory_bytes")


@dataclass(frozen=True)
class Workload:
    """How a model is served.

    Attributes:
        batch: sequences at once.
        context: tokens in the KV cache of each.
    """

    batch: int = BATCH
    context: int = CONTEXT


def subblock_costs(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    blocks: Sequence[BlockConfig],
    dtype: torch.dtype,
    workload: Workload,
    head_dims: Sequence[int | None],
) -> tuple[list[dict[str, dict[str, int]]], dict[str, int]]:
    """Costs of every subblock of a model of these blocks, and of what is outside the layers.

    Args:
        descriptor: of the family.
        config: of the parent.
        blocks: one a layer.
        dtype: of the weights and the KV cache.
        workload: batch and context.
        head_dims: size of a KV head in each layer; None where it is not known from the weights.

    Returns:
        For every layer ``{"attention": costs, "ffn": costs}``, and the costs of embeddings, head and final norm.
    """
    model = build(config, blocks, dtype=dtype, device="meta", descriptor=descriptor)
    sizes = unique_sizes(model)
    groups = weight_groups(descriptor, sizes, len(blocks))
    layers = []
    for i, block in enumerate(blocks):
        kv_bytes = kv_cache_bytes(descriptor, config, block, i, dtype, workload, head_dims[i])
        layers.append(
            {
                "attention": _costs(sizes[name] for name in groups.get(f"block_{i}_attention", ()))
                | {"kv_cache_bytes": kv_bytes},
                "ffn": _costs(sizes[name] for name in groups.get(f"block_{i}_ffn", ())),
            }
        )
        for subblock in layers[-1].values():
            subblock["memory_bytes"] = subblock["weight_bytes"] + subblock["kv_cache_bytes"]
    inside = {name for group, names in groups.items() if group.startswith("block_") for name in names}
    return layers, _costs(size for name, size in sizes.items() if name not in inside)


def unique_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Parameter name to (elements, bytes); a tied parameter is there once, under its first name."""
    return {name: (p.numel(), p.numel() * p.element_size()) for name, p in model.named_parameters()}


def _costs(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    sizes = list(sizes)
    parameters, weight_bytes = sum(s[0] for s in sizes), sum(s[1] for s in sizes)
    return {
        "parameters": parameters,
        # All weights of a dense subblock take part in every token.
        "active_parameters": parameters,
        "weight_bytes": weight_bytes,
        "kv_cache_bytes": 0,
        "memory_bytes": weight_bytes,
    }


def kv_cache_bytes(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    block: BlockConfig,
    index: int,
    dtype: torch.dtype,
    workload: Workload,
    head_dim: int | None,
) -> int:
    """Keys and values of one layer: 2 * K * d * tokens * bytes.

    A layer with sliding-window attention keeps at most its window.
    """
    if not has_attention(block):
        return 0
    language = descriptor.get_language_model_config(config)
    heads = block.attention.num_key_value_heads or language.num_attention_heads
    head_dim = head_dim or getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    tokens = workload.context
    if (window := sliding_window(language, index)) is not None:
        tokens = min(tokens, window)
    return 2 * heads * head_dim * workload.batch * tokens * dtype.itemsize


def sliding_window(language: PretrainedConfig, index: int) -> int | None:
    """The attention window of a layer, or None if it sees everything."""
    window = getattr(language, "sliding_window", None)
    types = getattr(language, "layer_types", None)
    if type(window) is not int:
        return None
    if types:
        return window if types[index] == "sliding_attention" else None
    return window if getattr(language, "use_sliding_window", True) else None


def total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of costs."""
    result = dict.fromkeys(COSTS, 0)
    for part in parts:
        for name in COSTS:
            result[name] += part[name]
    return result
