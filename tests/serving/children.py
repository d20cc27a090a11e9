"""The children that are served: of each family a mixed one and, where a server needs it, one whose layers are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig, MoEConfig

SIZES: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


def _block(kv: int | None = None, width: int | None = None, experts: int = 0, expert_width: int = 128) -> BlockConfig:
    """A block with so many KV heads and channels; 0 removes the attention or the FFN."""
    if experts:
        moe = MoEConfig(num_local_experts=experts, num_experts_per_tok=2, expert_intermediate_dim=expert_width)
        ffn = FFNConfig(moe=moe)
    else:
        ffn = FFNConfig(intermediate_size=width or None, no_op=width == 0)
    return BlockConfig(AttentionConfig(num_key_value_heads=kv or None, no_op=kv == 0), ffn)


# Attention removed in one layer and the FFN in another, KV heads and widths different. The first layer keeps its
# attention; in FIRST it does not.
MIXED = [_block(4, 512), _block(2, 256), _block(0, 512), _block(1, 0), _block(4, 256), _block(2, 512)]
FIRST = [_block(0, 512), _block(2, 256), _block(0, 0), _block(1, 512), _block(4, 0), _block(2, 0)]
ALIKE = [_block(2, 256)] * 6
MIXTURES = [_block(4, experts=8), _block(2, experts=6), _block(0, experts=4), *[_block(1, experts=8)] * 2, _block(4, 0)]
MIXTURES_ALIKE = [_block(2, experts=6, expert_width=64)] * 6


@dataclass(frozen=True)
class Child:
    """A child to serve; ``make`` returns its model."""

    name: str
    make: Callable[[Path | None], Any]


def _random(config: PretrainedConfig, blocks: list[BlockConfig]) -> Callable[[Path | None], Any]:
    def make(_: Path | None) -> Any:
        model = layersmith.build(config, blocks)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * 0.08)
        return model

    return make


def _of_smollm2(parent: Path | None) -> Any:
    """SmolLM2 with the first channels and KV heads of its weights: it need not be good to be served."""
    if parent is None:
        return None
    model = layersmith.load(parent, dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    shapes = [_block(3, 1024), _block(1, 1536), _block(0, 768), _block(3, 0), _block(1, 1280)]
    child = layersmith.build(config, [shapes[i % 5] for i in range(config.num_hidden_layers)])
    with torch.no_grad():
        for name, tensor in child.state_dict().items():
            tensor.copy_(weights[name][tuple(slice(n) for n in tensor.shape)])
    return child


CHILDREN = (
    Child("SmolLM2-135M, mixed", _of_smollm2),
    Child("Llama, mixed", _random(LlamaConfig(**SIZES), MIXED)),
    Child("Llama, no attention in layer 0", _random(LlamaConfig(**SIZES | {"tie_word_embeddings": False}), FIRST)),
    Child("Mistral, mixed", _random(MistralConfig(**SIZES, sliding_window=None), MIXED)),
    Child("Mistral with a window of 256, mixed", _random(MistralConfig(**SIZES, sliding_window=256), MIXED)),
    Child("Qwen2, mixed", _random(Qwen2Config(**SIZES), MIXED)),
    Child("Qwen2, no attention in layer 0", _random(Qwen2Config(**SIZES), FIRST)),
    Child("Qwen3, mixed", _random(Qwen3Config(**SIZES), MIXED)),
    Child("Qwen3, no attention in layer 0", _random(Qwen3Config(**SIZES), FIRST)),
    Child("Qwen3 with an untied head, mixed", _random(Qwen3Config(**SIZES | {"tie_word_embeddings": False}), MIXED)),
    Child("Qwen3, alike", _random(Qwen3Config(**SIZES | {"tie_word_embeddings": False}), ALIKE)),
    Child("Qwen3-MoE, mixed, experts pruned", _random(Qwen3MoeConfig(**SIZES, **_EXPERTS), MIXTURES)),
    Child(
        "Qwen3-MoE, alike, two of eight experts pruned", _random(Qwen3MoeConfig(**SIZES, **_EXPERTS), MIXTURES_ALIKE)
    ),
)


def tokenizer_of(parent: Path | None) -> Any:
    """SmolLM2's tokenizer, or that of the demo's model where the package with SmolLM2 is not installed."""
    return AutoTokenizer.from_pretrained(parent or Path(layersmith.__file__).parent / "demo" / "demo-model")
