"""Block configs that differ in one size: what the experiments of :mod:`layersmith.library.axes.find` build.

A change is given a block, its index, and whether the other size is larger; it gives the block with that size, the size,
and the one it had, or None where there is no such size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from layersmith.block_config import BlockConfig, FFNConfig
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import largest_part

Change = Callable[[BlockConfig, int, bool], tuple[BlockConfig, int, int] | None]


def other_size(size: int, larger: bool) -> int:
    """Twice a size, or its largest proper divisor."""
    return 2 * size if larger else largest_part(size)


def narrower_ffn(block: BlockConfig, i: int, larger: bool) -> tuple[BlockConfig, int, int] | None:
    moe = block.ffn.moe
    if moe is None:
        return _changed(block, i, "ffn", "ffn_width", block.ffn.intermediate_size, larger)
    return _changed(block, i, "ffn", "expert_width", moe.expert_intermediate_dim, larger)


def narrower_shared(block: BlockConfig, i: int, larger: bool) -> tuple[BlockConfig, int, int] | None:
    moe = block.ffn.moe
    size = moe.shared_expert_intermediate_dim if moe is not None else None
    return _changed(block, i, "ffn", "shared_width", size, larger)


def fewer_experts(block: BlockConfig, i: int, larger: bool) -> tuple[BlockConfig, int, int] | None:
    moe = block.ffn.moe
    if moe is None or moe.num_local_experts < 2:
        return None
    # A token cannot use more than there are; what it uses changes no shape.
    per_token = min(moe.num_experts_per_tok, other_size(moe.num_local_experts, larger))
    enough = dataclasses.replace(block, ffn=FFNConfig(moe=dataclasses.replace(moe, num_experts_per_tok=per_token)))
    return _changed(enough, i, "ffn", "experts", moe.num_local_experts, larger)


def other_kv_heads(block: BlockConfig, i: int, larger: bool) -> tuple[BlockConfig, int, int] | None:
    return _changed(block, i, "attention", "kv_heads", block.attention.num_key_value_heads, larger)


def _changed(
    block: BlockConfig, i: int, subblock: str, kind: str, size: int | None, larger: bool
) -> tuple[BlockConfig, int, int] | None:
    """The block with an alternative of another size; None where there is no size, or it is 1."""
    if size is None or size < 2:
        return None
    other = other_size(size, larger)
    return Alternative(i, subblock, kind, size=other).block_config(block), other, size
