"""From findings to block configs of a parent, and from block configs to overrides of its config."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from layersmith.model_descriptor.infer.attributes import AttributePath, merged, nested, value_at
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.mixers import mixer_values
from layersmith.model_descriptor.infer.sizes import Sizes


def block_of(findings: Findings, language: Any, index: int) -> BlockConfig:
    """The block config of one layer of the parent.

    Args:
        findings: The results of the experiments on the model.
        language: The config from which its decoder layers are built.
        index: Index of the layer.
    """
    k = findings.of_layer[index]
    kind, sizes = findings.kinds[k], findings.sizes[k]

    def number(path: AttributePath | None) -> int | None:
        return value_at(language, path, index) or None if path is not None else None

    attention, ffn = AttentionConfig(no_op=True), FFNConfig(no_op=True)
    if kind.attention is not None:
        # The layers that read this layer's keys and values are built for their present size.
        mixer = findings.mixers[index]
        attention = AttentionConfig(
            num_key_value_heads=None if kind.attention.stays else number(sizes.kv_heads),
            mamba=None if mixer is None else MambaConfig(**mixer),
        )
    width, shared = findings.widths[index]
    if kind.ffn is not None and sizes.num_experts is None:
        ffn = FFNConfig(intermediate_size=width)
    elif kind.ffn is not None:
        elsewhere = next((s.experts_per_token for s in findings.sizes if s.experts_per_token), None)
        moe = MoEConfig(
            num_local_experts=number(sizes.num_experts) or 1,
            num_experts_per_tok=number(sizes.experts_per_token or elsewhere) or 1,
            expert_intermediate_dim=width,
            # A shared width that follows the width of the experts is not a separate size.
            shared_expert_intermediate_dim=shared if sizes.shared_width != sizes.expert_width else None,
        )
        ffn = FFNConfig(moe=moe)
    return BlockConfig(attention, ffn)


def overrides_for(findings: Findings, language: Any, block: BlockConfig) -> dict[str, Any]:
    """The attributes of a layer's config, and their values, that make the layer what a block config says.

    The layer may be of any kind, so the attributes of all kinds are set.
    """
    overrides: dict[str, Any] = {}
    types = getattr(language, "layer_types", None)
    if block.attention.layer_type is not None and types:
        overrides["layer_types"] = [block.attention.layer_type] * len(types)
    for sizes in findings.sizes:
        for path, value in _values(sizes, block):
            overrides = merged(overrides, nested(language, path, value))
        for inner in sizes.inner:
            if inner.name in block.inner_sizes:
                overrides = merged(overrides, nested(language, inner.path, block.inner_sizes[inner.name]))
        for path, size in mixer_values(sizes.mixer, block.attention.mamba, partial(value_at, language)):
            overrides = merged(overrides, nested(language, path, size))
    return overrides


def _values(sizes: Sizes, block: BlockConfig) -> Iterator[tuple[AttributePath, int]]:
    """Attribute and value for every size of heads and FFN that a block config sets."""
    attention, moe, unit = block.attention, block.ffn.moe, sizes.config_width
    values: list[tuple[AttributePath | None, int | None, int]] = [(sizes.kv_heads, attention.num_key_value_heads, 1)]
    if attention.num_attention_heads is not None:
        values += [(path, attention.num_attention_heads, 1) for path in sizes.query_heads]
        if sizes.head_size is not None and sizes.query_heads:
            values.append((*sizes.head_size, 1))
    if moe is None and sizes.num_experts is None:
        values.append((sizes.width, block.ffn.intermediate_size, unit))
    elif moe is not None and sizes.num_experts is not None:
        if not sizes.experts_of_both:  # else the attention's experts would change too
            values.append((sizes.num_experts, moe.num_local_experts, 1))
            values.append((sizes.experts_per_token, moe.num_experts_per_tok, 1))
        values.append((sizes.shared_width, moe.shared_expert_intermediate_dim, unit))
        values.append((sizes.expert_width, moe.expert_intermediate_dim, unit))
    yield from ((path, value * factor) for path, value, factor in values if path is not None and value is not None)
