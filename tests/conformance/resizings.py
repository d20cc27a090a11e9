"""Sizes that a check of the conformance suite changes, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.sizes import MixerSizes

# What it is, the layer, and the block with it.
Resizing = tuple[str, int, Callable[[BlockConfig], BlockConfig]]


def resizings(blocks: Sequence[BlockConfig], findings: Findings) -> Iterator[Resizing]:
    """Half of every size that the blocks give, in the first layer of each kind of layer."""
    kinds = [findings.kinds[k] for k in findings.of_layer]
    for i, block in enumerate(blocks):
        if kinds[i] in kinds[:i]:
            continue
        sizes = findings.sizes[findings.of_layer[i]]
        heads, width, moe = block.attention.num_key_value_heads, block.ffn.intermediate_size, block.ffn.moe
        if heads is not None and heads > 1:
            yield "number of KV heads", i, _with_attention(num_key_value_heads=heads // 2)
        yield from _of_mixer(i, block, sizes.mixer)
        if width is not None and width > 1:
            yield "FFN width", i, _with_ffn(intermediate_size=width // 2)
        if moe is None:
            continue
        if moe.num_local_experts // 2 >= moe.num_experts_per_tok:
            yield "number of experts", i, _with_moe(num_local_experts=moe.num_local_experts // 2)
        if moe.num_experts_per_tok > 1 and sizes.experts_per_token:
            yield "experts per token", i, _with_moe(num_experts_per_tok=moe.num_experts_per_tok // 2)
        if moe.expert_intermediate_dim:
            yield "expert width", i, _with_moe(expert_intermediate_dim=moe.expert_intermediate_dim // 2)
        if moe.shared_expert_intermediate_dim:
            half = moe.shared_expert_intermediate_dim // 2
            yield "width of the shared experts", i, _with_moe(shared_expert_intermediate_dim=half)


def _of_mixer(i: int, block: BlockConfig, sizes: MixerSizes | None) -> Iterator[Resizing]:
    """Half the heads of a mixer, of each group or with it, half of each head, and half the state."""
    mamba = block.attention.mamba
    if mamba is None or sizes is None:
        return
    if sizes.num_heads and mamba.num_heads % 2 == 0:
        groups = mamba.num_groups
        if (mamba.num_heads // groups) % 2:
            groups //= 2
        yield "number of mixer heads", i, _with_mamba(num_heads=mamba.num_heads // 2, num_groups=groups)
    if sizes.head_dim and mamba.head_dim % 2 == 0:
        yield "size of mixer heads", i, _with_mamba(head_dim=mamba.head_dim // 2)
    if sizes.state_dim and mamba.state_dim > 1:
        yield "size of the state", i, _with_mamba(state_dim=mamba.state_dim // 2)


def _with_mamba(**sizes: int) -> Callable[[BlockConfig], BlockConfig]:
    def change(block: BlockConfig) -> BlockConfig:
        assert block.attention.mamba is not None
        return replace(block, attention=replace(block.attention, mamba=replace(block.attention.mamba, **sizes)))

    return change


def _with_attention(**sizes: Any) -> Callable[[BlockConfig], BlockConfig]:
    return lambda block: replace(block, attention=replace(block.attention, **sizes))


def _with_ffn(**sizes: Any) -> Callable[[BlockConfig], BlockConfig]:
    return lambda block: replace(block, ffn=replace(block.ffn, **sizes))


def _with_moe(**sizes: Any) -> Callable[[BlockConfig], BlockConfig]:
    return lambda block: replace(block, ffn=replace(block.ffn, moe=replace(block.ffn.moe, **sizes)))
