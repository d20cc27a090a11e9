"""Children of several families whose layers differ in everything that exports have to express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GemmaConfig, MistralConfig, Qwen3MoeConfig

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig, MoEConfig
from tests.conftest import FAMILIES, SIZES, child_model

MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS: dict[str, Any] = FAMILIES | {
    "gemma": lambda **more: GemmaConfig(**SIZES | {"head_dim": 8} | more),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(**SIZES | MOE | more),
    "mistral_plain": lambda **more: MistralConfig(**SIZES | {"sliding_window": None} | more),
}


def attention(**sizes: Any) -> AttentionConfig:
    return AttentionConfig(**sizes)


def ffn(width: int | None = None, **sizes: Any) -> FFNConfig:
    return FFNConfig(intermediate_size=width, **sizes)


def experts(count: int, width: int = 16, per_token: int = 2) -> FFNConfig:
    return FFNConfig(
        moe=MoEConfig(num_local_experts=count, num_experts_per_tok=per_token, expert_intermediate_dim=width)
    )


# No attention in layer 0, no FFN in layer 1; other KV heads in every layer, fewer query heads in one.
MIXED = (
    BlockConfig(attention(no_op=True), ffn(40)),
    BlockConfig(attention(num_key_value_heads=2), ffn(no_op=True)),
    BlockConfig(attention(num_key_value_heads=1), ffn(24)),
    BlockConfig(attention(num_key_value_heads=4, num_attention_heads=4), ffn(64)),
)
# As many experts in all layers, of other widths.
PRUNED_EXPERTS = (
    BlockConfig(attention(num_key_value_heads=2), experts(3)),
    BlockConfig(attention(no_op=True), experts(3, 8)),
    BlockConfig(attention(num_key_value_heads=1), experts(3)),
    BlockConfig(attention(num_key_value_heads=4), ffn(no_op=True)),
)
ALIKE = (BlockConfig(attention(num_key_value_heads=2), ffn(32)),) * 4
ALIKE_EXPERTS = (BlockConfig(attention(num_key_value_heads=2), experts(3)),) * 4


def write_child(
    folder: Path, family: str, blocks: tuple[BlockConfig, ...], dtype: torch.dtype = torch.bfloat16, **more: Any
) -> Path:
    """A child of random weights in a new folder."""
    model = child_model(CONFIGS[family](**{"num_hidden_layers": len(blocks)} | more), list(blocks)).to(dtype)
    layersmith.save(model, folder)
    return folder
