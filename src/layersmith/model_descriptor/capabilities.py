"""Methods of a descriptor beyond the interface of the spec, with defaults for families without other knowledge.

A descriptor that implements only the spec's methods inherits the defaults and works. They are right for a decoder
whose layers are alike and whose attention caches keys and values for each KV head. Overriding a method makes more
alternatives possible or makes costs exact.

A method with an argument ``index`` is about that layer of the model for which the descriptor was made;
:meth:`Capabilities.for_config` returns the descriptor for another model of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.model_descriptor.conventions import FFN_WIDTH, KV_HEADS, NUM_LAYERS
from layersmith.model_descriptor.stock import whole_number


class Capabilities:
    """Methods of every descriptor that are not part of the spec's interface."""

    # ------------------------------------------------------------------------------------------ the whole model

    @classmethod
    def for_config(cls, config: Any) -> Any:
        """The descriptor for another config of the model family. Default: this descriptor."""
        return cls

    @classmethod
    def parent_blocks(cls, config: Any) -> list[BlockConfig]:
        """The block config of every layer of a model that is not heterogeneous.

        Default: the same for every layer, with the number of KV heads and the FFN width that the config names.
        """
        language = cls.get_language_model_config(config)  # type: ignore[attr-defined]
        block = BlockConfig(
            AttentionConfig(num_key_value_heads=whole_number(language, KV_HEADS)),
            FFNConfig(intermediate_size=whole_number(language, FFN_WIDTH)),
        )
        return [block] * int(getattr(language, NUM_LAYERS))

    @classmethod
    def kinds_of_layers(cls, config: Any) -> list[int]:
        """A number for every layer of a config's model; layers with the same number are built from the same classes.

        Default: all layers are alike.
        """
        return [0] * len(cls.parent_blocks(config))

    @classmethod
    def refuted(cls, index: int) -> tuple[str, ...]:
        """Questions of experiments on a layer whose answer was no, with the reasons. Default: none are known."""
        return ()

    # ------------------------------------------------------------------------------------------ modules of a layer

    @classmethod
    def attention_modules(cls, layer: nn.Module) -> tuple[str, ...]:
        """The modules of a layer, as its class builds it, that do the work of its attention. Default: not known."""
        return ()

    @classmethod
    def why_no_linear_layer(cls, layer: nn.Module, subblock: str, module: str) -> str:
        """Why a linear layer in the place of ``module`` cannot replace the whole subblock. Default: it can."""
        return ""

    @classmethod
    def resized_weights(cls, layer: nn.Module, block: BlockConfig) -> dict[str, list[int | None]]:
        """Weights of a freshly built layer that get another shape, where no config attribute sets it.

        Returns:
            Weight to its new shape; None is a length that stays as the layer's config makes it. Default: none.
        """
        return {}

    @classmethod
    def changed_numbers(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int]]:
        """Plain numbers of a freshly built layer's modules that change, where the config cannot say so.

        Returns:
            Module to attribute to its new value. Default: none.
        """
        return {}

    # ------------------------------------------------------------------------------------------ heads and mixers

    @classmethod
    def num_query_heads(cls, index: int) -> int | None:
        """The number of query heads of a layer. Default: not known; the config's usual attribute counts."""
        return None

    @classmethod
    def shared_kv_heads(cls, index: int) -> int | None:
        """The number of KV heads of a layer whose KV heads cannot be reduced alone. Default: not known."""
        return None

    @classmethod
    def why_no_query_heads(cls, index: int) -> str:
        """Why the number of query heads of a layer cannot be reduced alone; empty where that is not known."""
        return ""

    @classmethod
    def why_no_kv_heads(cls, index: int) -> str:
        """Why the number of KV heads of a layer cannot be reduced; empty where that is not known."""
        return ""

    @classmethod
    def heads_end_in_blocks(cls, index: int) -> bool:
        """Whether the output projection consists of blocks, each of which reads its share of the heads."""
        return False

    @classmethod
    def heads_in_pairs(cls, index: int) -> bool:
        """Whether heads work in pairs, one of each half of all heads, whose outputs lie next to each other."""
        return False

    @classmethod
    def has_mixer(cls, index: int) -> bool:
        """Whether a layer has a mixer that keeps a state of fixed size, with or without keys and values."""
        return False

    @classmethod
    def square_state(cls, index: int) -> bool:
        """Whether one attribute sets both the head size of a layer's mixer and the size of its state."""
        return False

    @classmethod
    def mixer_problem(cls, index: int) -> str:
        """Why the sizes of a layer's mixer cannot be reduced; empty where that is not known."""
        return ""

    # ------------------------------------------------------------------------------------------ experts

    @classmethod
    def flat_experts(cls, index: int) -> tuple[str, ...]:
        """Weights of a layer in which experts lie one after another along the first dimension. Default: none."""
        return ()

    @classmethod
    def experts_of_both(cls, index: int) -> bool:
        """Whether one attribute sets the number of experts of a layer's attention and of its FFN."""
        return False

    @classmethod
    def ffn_experts(cls, index: int) -> Any:
        """What the number of experts sets in a layer's FFN, where the attention has as many.

        Returns:
            An ``FFNExperts`` record. Default: None, not known.
        """
        return None

    # ------------------------------------------------------------------------------------------ the KV cache

    @classmethod
    def attention_stays(cls, index: int) -> bool:
        """Whether a layer whose attention is removed still writes to the KV cache, because other layers read it."""
        return False

    @classmethod
    def appends_to_cache(cls) -> bool:
        """Whether layers append to the cache in turn, so that the ones after a removed attention move up."""
        return False

    @classmethod
    def keeps_state(cls, index: int) -> bool:
        """Whether a layer keeps a state of fixed size and no keys and values."""
        return False

    @classmethod
    def caches_nothing(cls, index: int) -> bool:
        """Whether a layer keeps nothing in the cache."""
        return False

    @classmethod
    def cache_slots(cls, index: int) -> int:
        """The number of slots of the KV cache that a layer uses, one for each of its attentions."""
        return 1

    @classmethod
    def cached_numbers(cls, index: int) -> float:
        """Numbers in the KV cache for each number of a value head: 2 where keys are as long as values."""
        return 2.0

    @classmethod
    def latent_cache(cls, index: int) -> int | None:
        """Numbers in the KV cache for each token that all heads of a layer share. Default: heads share none."""
        return None

    @classmethod
    def caches_each_query(cls, index: int) -> bool:
        """Whether the KV cache holds keys and values for each query head, however many KV heads there are."""
        return False

    @classmethod
    def token_bytes(cls, index: int, dtype: torch.dtype, has_attention: bool) -> int:
        """Bytes that a slot keeps of every token in addition to keys and values, e.g. the keys of an indexer."""
        return 0

    @classmethod
    def state_bytes(
        cls, index: int, block: BlockConfig, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> int:
        """Bytes that a layer keeps in the cache for each sequence, whatever its length.

        Args:
            index: Index of the layer.
            block: Block config of the layer.
            shapes: Shapes of the layer's weights.
            dtype: dtype of the model.
        """
        return 0

    @classmethod
    def estimates_cache(cls, index: int) -> bool:
        """Whether the size of a layer's cache is only an estimate, because it also holds something unknown."""
        return False
