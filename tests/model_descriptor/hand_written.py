"""Families laid out as Llama is: pre-norm, ``self_attn`` and ``mlp`` in ``model.layers``, rope at the model's level."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import torch
from torch import nn

from layersmith.block_config import BlockConfig
from layersmith.heterogeneous.no_op import MatchingZeros, Same, return_tuple_of_size
from layersmith.model_descriptor.base import ModelDescriptor


class _LlamaLike(ModelDescriptor):
    """All that these families share; what differs is the classes."""

    @staticmethod
    def attn_no_op_post_init(decoder_layer: nn.Module) -> None:
        decoder_layer.input_layernorm = Same()
        decoder_layer.self_attn = return_tuple_of_size(MatchingZeros, size=2)()

    @staticmethod
    def mlp_no_op_post_init(decoder_layer: nn.Module) -> None:
        decoder_layer.post_attention_layernorm = Same()
        decoder_layer.mlp = MatchingZeros()

    @staticmethod
    def block_config_to_layer_overrides(block_config: BlockConfig) -> dict[str, Any]:
        overrides = {
            "num_key_value_heads": block_config.attention.num_key_value_heads,
            "intermediate_size": block_config.ffn.intermediate_size,
        }
        return {name: value for name, value in overrides.items() if value is not None}

    @staticmethod
    def init_rotary_embedding(model: nn.Module, runtime: Any) -> None:
        rotary_class: Any = type(model.get_submodule("model.rotary_emb"))
        with torch.device(runtime.device):
            model.set_submodule("model.rotary_emb", rotary_class(config=model.config))

    @staticmethod
    def input_embedding_name() -> str:
        return "model.embed_tokens"

    @staticmethod
    def output_embedding_name() -> str:
        return "lm_head"

    @staticmethod
    def final_norm_name() -> str:
        return "model.norm"

    @staticmethod
    def layer_block_name(index: int) -> str:
        return f"model.layers.{index}"

    @staticmethod
    def layer_name_predicates(num_layers: int) -> dict[str, re.Pattern[str]]:
        predicates = {
            "embedding": re.compile(r"^model\.embed_tokens\..+$"),
            "lm_head": re.compile(r"^(model\.norm|lm_head)\..+$"),
        }
        for i in range(num_layers):
            predicates[f"block_{i}_ffn"] = re.compile(rf"^model\.layers\.{i}\.(post_attention_layernorm|mlp)\..+$")
            predicates[f"block_{i}_attention"] = re.compile(rf"^model\.layers\.{i}\.(input_layernorm|self_attn)\..+$")
        return predicates


def _layer_class(module: str, name: str) -> type[nn.Module]:
    return getattr(import_module(f"transformers.models.{module}"), name)


class LlamaModelDescriptor(_LlamaLike):
    @staticmethod
    def decoder_layer_cls() -> type[nn.Module]:
        return _layer_class("llama.modeling_llama", "LlamaDecoderLayer")


class MistralModelDescriptor(_LlamaLike):
    @staticmethod
    def decoder_layer_cls() -> type[nn.Module]:
        return _layer_class("mistral.modeling_mistral", "MistralDecoderLayer")


class Qwen2ModelDescriptor(_LlamaLike):
    @staticmethod
    def decoder_layer_cls() -> type[nn.Module]:
        return _layer_class("qwen2.modeling_qwen2", "Qwen2DecoderLayer")


class Qwen3ModelDescriptor(_LlamaLike):
    @staticmethod
    def decoder_layer_cls() -> type[nn.Module]:
        return _layer_class("qwen3.modeling_qwen3", "Qwen3DecoderLayer")
