"""Methods of a descriptor beyond the interface of the spec, with defaults for families without other knowledge.

A descriptor that implements only the spec's methods inherits the defaults and works. They are right for a decoder
whose layers are alike and whose attention caches keys and values for each KV head. Overriding a method makes more
alternatives possible or makes costs exact.

A method with an argument ``index`` is about that layer of the model for which the descriptor was made;
:meth:`Capabilities.for_config` returns the descriptor for another model of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.model_descriptor.conventions import FFN_WIDTH, KV_HEADS, NUM_LAYERS
from layersmith.model_descriptor.stock import whole_number


@dataclass(frozen=True)
class LayerFacts:
    """What is known of one layer of the model for which a descriptor was made. Its defaults are right for most.

    Attributes:
        refuted: Questions of experiments whose answer was no, with the reasons.
        num_query_heads: Number of query heads; None: the config's usual attribute counts.
        shared_kv_heads: Number of KV heads that cannot be reduced alone; None: not known.
        why_no_query_heads: Why the number of query heads cannot be reduced alone; empty: not known.
        why_no_kv_heads: Why the number of KV heads cannot be reduced; empty: not known.
        heads_end_in_blocks: Whether the output projection is made of blocks that each read a share of the heads.
        heads_in_pairs: Whether heads work in pairs, one of each half, whose outputs lie next to each other.
        has_mixer: Whether it has a mixer that keeps a state of fixed size, with or without keys and values.
        square_state: Whether one attribute sets both the head size of its mixer and the size of the state.
        mixer_problem: Why the sizes of its mixer cannot be reduced; empty: not known.
        flat_experts: Weights in which experts lie one after another along the first dimension.
        experts_of_both: Whether one attribute sets the number of experts of its attention and of its FFN.
        ffn_experts: ``FFNExperts`` record of what the number of experts sets in the FFN, where the attention has as
            many; None: not known.
        attention_stays: Whether it still writes to the KV cache without its attention, because other layers read it.
        keeps_state: Whether it keeps a state of fixed size and no keys and values.
        caches_nothing: Whether it keeps nothing in the cache.
        cache_slots: Number of slots of the KV cache that it uses, one for each of its attentions.
        cached_numbers: Numbers in the KV cache for each number of a value head: 2 where keys are as long as values.
        latent_cache: Numbers in the KV cache for each token that all heads share; None: heads share none.
        caches_each_query: Whether the KV cache holds keys and values of each query head, whatever the KV heads.
        estimates_cache: Whether the size of its cache is an estimate, because it also holds something unknown.
        inner_sizes: Sizes inside its subblocks: the config's attribute to its ``InnerSize`` record and its value.
    """

    refuted: tuple[str, ...] = ()
    num_query_heads: int | None = None
    shared_kv_heads: int | None = None
    why_no_query_heads: str = ""
    why_no_kv_heads: str = ""
    heads_end_in_blocks: bool = False
    heads_in_pairs: bool = False
    has_mixer: bool = False
    square_state: bool = False
    mixer_problem: str = ""
    flat_experts: tuple[str, ...] = ()
    experts_of_both: bool = False
    ffn_experts: Any = None
    attention_stays: bool = False
    keeps_state: bool = False
    caches_nothing: bool = False
    cache_slots: int = 1
    cached_numbers: float = 2.0
    latent_cache: int | None = None
    caches_each_query: bool = False
    estimates_cache: bool = False
    inner_sizes: Mapping[str, tuple[Any, int]] = field(default_factory=dict)


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
    def layer_facts(cls, index: int) -> LayerFacts:
        """What is known of a layer. Default: nothing beyond its config; see the attributes of the record."""
        return LayerFacts()

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
    def changed_numbers(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int | float]]:
        """Plain numbers of a freshly built layer's modules that change, where the config cannot say so.

        Returns:
            Module to attribute to its new value. Default: none.
        """
        return {}

    @classmethod
    def shared_entries(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int]]:
        """Arguments of a freshly built layer's modules of which it takes only some entries, such as rotary embeddings.

        Returns:
            Module to the name of an argument to the number of entries of its last dimension. Default: none.
        """
        return {}

    # ------------------------------------------------------------------------------------------ the KV cache

    @classmethod
    def appends_to_cache(cls) -> bool:
        """Whether layers append to the cache in turn, so that the ones after a removed attention move up."""
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
