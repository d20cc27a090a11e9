"""Counted costs: parameters and bytes, as exact integers.

They equal those of the realized model: shapes come from layers built on the meta device, tied weights count once, and
the size of a head is read from the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig, has_attention
from layersmith.costs.budget import Workload
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.patcher import deci_x_patcher
from layersmith.library.axes.axis import REST, LayerAxes
from layersmith.library.formats import embeddings, matrices, saved_bytes, with_embeddings
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import causal_lm_config, stock_model, whole_number
from layersmith.modeling_layersmith import as_parent
from layersmith.quantization.formats import KVFormat, format_named, kv_format_named

COSTS = ("parameters", "active_parameters", "weight_bytes", "kv_cache_bytes", "memory_bytes")


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What the costs of a model are counted from.

    Attributes:
        descriptor: Descriptor of the parent's model family.
        config: Config of the parent.
        blocks: Block configs of the model, one a layer.
        axes: Axes of the parent's layers, with the size of a KV head and the weights of experts.
        dtype: Data type of the weights and the KV cache.
    """

    descriptor: type[ModelDescriptor]
    config: PretrainedConfig
    blocks: Sequence[BlockConfig]
    axes: Sequence[LayerAxes]
    dtype: torch.dtype

    @property
    def language(self) -> PretrainedConfig:
        """Config of the language model."""
        language: PretrainedConfig = self.descriptor.get_language_model_config(self.config)
        return language


def max_positions(language: PretrainedConfig) -> int | None:
    """The longest context of a language model; None if its config does not say."""
    positions = getattr(language, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def context_note(asked: int, workload: Workload) -> list[str]:
    """A note if the context that was asked for is longer than what the model can have."""
    if workload.context >= asked:
        return []
    return [
        f"the model has {workload.context:,} positions, so costs are for a context of {workload.context:,} tokens "
        f"instead of {asked:,}."
    ]


def subblock_costs(
    shape: ModelShape, workload: Workload, formats: Sequence[str] = (), kv_formats: Sequence[str] = ()
) -> tuple[list[dict[str, dict[str, int]]], dict[str, int]]:
    """Costs of every subblock of a model, and of what is outside the layers.

    Args:
        shape: The model.
        workload: What costs are for.
        formats: Number formats to count subblocks in as well.
        kv_formats: The same for the KV cache.

    Returns:
        For every layer ``{"attention": costs, "ffn": costs}``, with those in formats ``"attention int8"``, ``"kv fp8"``
        and so on; and the costs of embeddings, head and final norm.
    """
    descriptor, blocks, axes, dtype = shape.descriptor, shape.blocks, shape.axes, shape.dtype
    with deci_x_patcher(descriptor, list(blocks)):
        model = stock_model(as_parent(causal_lm_config(shape.config)), dtype=dtype)
    sizes = unique_sizes(model)
    groups = weight_groups(descriptor, sizes, len(blocks))
    layers = []
    for i, block in enumerate(blocks):
        kv_bytes, state_bytes = kv_cache_bytes(shape, i, workload), 0
        if has_attention(block):
            layer = model.get_submodule(descriptor.layer_block_name(i))
            shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
            state_bytes = workload.batch * descriptor.state_bytes(i, block, shapes, dtype)
        ffn = groups.get(f"block_{i}_ffn", ())
        layers.append(
            {
                "attention": _costs(sizes[name] for name in groups.get(f"block_{i}_attention", ()))
                | {"kv_cache_bytes": kv_bytes + state_bytes},
                "ffn": _costs(sizes[name] for name in ffn)
                | {"active_parameters": _active(descriptor, block, i, axes[i], {name: sizes[name][0] for name in ffn})},
            }
        )
        layer, prefix = model.get_submodule(descriptor.layer_block_name(i)), f"{descriptor.layer_block_name(i)}."
        weights = matrices(model, descriptor, layer, i, len(blocks), axes[i]) if formats else {}
        for subblock, of_subblock in weights.items():
            by_name, whole = {prefix + name: layer.get_parameter(name) for name in of_subblock}, layers[-1][subblock]
            for name in formats:
                less = saved_bytes(model, by_name, format_named(name))
                layers[-1][f"{subblock} {name}"] = whole | {"weight_bytes": whole["weight_bytes"] - less}
        for name in kv_formats:
            kv_bytes = kv_cache_bytes(shape, i, workload, kv_format_named(name))
            layers[-1][f"kv {name}"] = layers[-1]["attention"] | {"kv_cache_bytes": kv_bytes + state_bytes}
        for costs in layers[-1].values():
            costs["memory_bytes"] = costs["weight_bytes"] + costs["kv_cache_bytes"]
    inside = {name for group, names in groups.items() if group.startswith("block_") for name in names}
    return layers, _costs(size for name, size in sizes.items() if name not in inside)


def outside_costs(shape: ModelShape, fixed: Mapping[str, int], formats: Sequence[str]) -> dict[str, dict[str, int]]:
    """Costs of what is outside the layers with embeddings and head in each format that a program runs them in.

    Args:
        shape: The model.
        fixed: Costs of what is outside the layers, in the data type of the weights.
        formats: Names of formats; others are left out.
    """
    model = stock_model(as_parent(causal_lm_config(shape.config)), dtype=shape.dtype)
    result = {}
    for name in with_embeddings(formats):
        saved = saved_bytes(model, embeddings(model), format_named(name))
        less = {cost: fixed[cost] - saved for cost in ("weight_bytes", "memory_bytes")}
        result[name] = {**fixed, **less}
    return result


def layers_alike(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    blocks: Sequence[BlockConfig],
    layers: Sequence[Mapping[str, Mapping[str, int]]],
) -> list[int]:
    """For every layer the index of the first equal one: the same alternative costs the same in both.

    Args:
        descriptor: Descriptor of the parent's model family.
        config: Config of the parent.
        blocks: Block configs of the parent, one a layer.
        layers: Costs of the parent's layers.
    """
    language = descriptor.get_language_model_config(config)
    kinds = descriptor.kinds_of_layers(causal_lm_config(config))
    firsts: dict[str, int] = {}
    alike = []
    for i, block in enumerate(blocks):
        key = repr((kinds[i], block, layers[i], sliding_window(language, i, block.attention.layer_type)))
        alike.append(firsts.setdefault(key, i))
    return alike


def unique_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Parameter name to (elements, bytes). A tied parameter has one entry, under its first name."""
    return {name: (p.numel(), p.numel() * p.element_size()) for name, p in model.named_parameters()}


def _costs(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    sizes = list(sizes)
    parameters, weight_bytes = sum(s[0] for s in sizes), sum(s[1] for s in sizes)
    return {
        "parameters": parameters,
        "active_parameters": parameters,
        "weight_bytes": weight_bytes,
        "kv_cache_bytes": 0,
        "memory_bytes": weight_bytes,
    }


def _active(
    descriptor: type[ModelDescriptor], block: BlockConfig, index: int, axes: LayerAxes, sizes: Mapping[str, int]
) -> int:
    """Parameters that a token uses: of the routed experts only those it is routed to."""
    prefix = f"{descriptor.layer_block_name(index)}."
    expert_sizes = {
        name.removeprefix(prefix): n for name, n in sizes.items() if axes.is_of_experts(name.removeprefix(prefix))
    }
    of_experts, moe = sum(expert_sizes.values()), block.ffn.moe
    if moe is None:
        return sum(sizes.values())
    idle = 0
    for w in axes.experts.weights if axes.experts is not None else ():
        # Some families have slots for experts that do nothing; a child keeps as many as the parent.
        places = sum(s.unit for s in w.segments if s.part == REST) if w.name in expert_sizes else 0
        idle += expert_sizes[w.name] // (moe.num_local_experts + places) * places if places else 0
    share = (of_experts - idle) * moe.num_experts_per_tok // moe.num_local_experts
    return sum(sizes.values()) - of_experts + share


def kv_cache_bytes(shape: ModelShape, index: int, workload: Workload, format: KVFormat | None = None) -> int:
    """Bytes of the keys and values of one layer: heads x (value size + key size) x tokens x bytes.

    In a format only the keys and values of heads are smaller. It is for caches without anything else.

    A layer with sliding-window attention keeps at most its window. Latent attention keeps one latent vector per token
    instead of heads. Whatever else is kept per token, e.g. the keys of an indexer, is included; states of fixed size
    are not. Keys and values that other layers use stay when the attention is removed.
    """
    descriptor, block, itemsize = shape.descriptor, shape.blocks[index], shape.dtype.itemsize
    facts = descriptor.layer_facts(index)
    kept = has_attention(block) or facts.attention_stays
    other_bytes = descriptor.token_bytes(index, shape.dtype, kept) * workload.context
    of_token, tokens = 0, workload.context
    if kept and not facts.keeps_state and not facts.caches_nothing:
        if (window := sliding_window(shape.language, index, block.attention.layer_type)) is not None:
            tokens = min(tokens, window)
        latent = facts.latent_cache
        heads, numbers, head_dim = _of_heads(shape, index)
        less = _fewer_numbers(shape, index)
        numbers = round(numbers - less * heads)
        of_token = (numbers if latent is None else round(latent - less)) * itemsize
        if format is not None and latent is None and numbers and not other_bytes:
            of_token = format.bytes_of(numbers, head_dim)
    return facts.cache_slots * workload.batch * (of_token * tokens + other_bytes)


def _fewer_numbers(shape: ModelShape, index: int) -> float:
    """Numbers that are kept less of a token, for every head, because of smaller sizes inside the attention."""
    sizes = shape.descriptor.layer_facts(index).inner_sizes
    inner = shape.blocks[index].attention.inner_sizes or {}
    return sum(sizes[name][0].cached * (sizes[name][1] - size) for name, size in inner.items() if name in sizes)


def _of_heads(shape: ModelShape, index: int) -> tuple[int, float, int]:
    """The heads that the cache keeps, where each has its own numbers of a token, those numbers, and a head's size."""
    language, attention, axis = shape.language, shape.blocks[index].attention, shape.axes[index].kv
    usual_heads, hidden_size = (whole_number(language, name) for name in ("num_attention_heads", "hidden_size"))
    facts = shape.descriptor.layer_facts(index)
    query_heads = facts.num_query_heads
    query_heads = usual_heads if query_heads is None else query_heads
    # Where the number of KV heads cannot differ alone it is in no block config, and is not that of the query heads.
    shared = facts.shared_kv_heads
    heads = attention.num_key_value_heads or (shared if shared != query_heads else None)
    heads = None if facts.caches_each_query else heads
    heads = heads or attention.num_attention_heads or query_heads
    head_dim = axis.head_dim if axis else None
    head_dim = head_dim or whole_number(language, "head_dim") or (hidden_size or 0) // (usual_heads or 1)
    return (heads, facts.cached_numbers * heads * head_dim, head_dim) if heads and head_dim else (0, 0, 1)


def sliding_window(language: PretrainedConfig, index: int, layer_type: str | None = None) -> int | None:
    """The attention window of a layer; None if it attends to everything."""
    window = getattr(language, "sliding_window", None)
    types = getattr(language, "layer_types", None)
    if type(window) is not int:
        return None
    if types:
        return window if (layer_type or types[index]) == "sliding_attention" else None
    return window if getattr(language, "use_sliding_window", True) else None


def total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of costs."""
    result = dict.fromkeys(COSTS, 0)
    for part in parts:
        for name in COSTS:
            result[name] += part[name]
    return result
