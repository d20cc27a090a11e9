"""``ModelDescriptor``: what the rest of layersmith knows about a model family.

A descriptor says which classes are decoder layers, how the weights of a model fall into subblocks, how a block config
becomes config attributes, and how a subblock is taken out. It is used as a class, never instantiated. The interface
is fixed; a descriptor that somebody else wrote for it works here unchanged.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from layersmith.block_config import BlockConfig


class ModelDescriptor(ABC):
    """The interface of a model family."""

    # ------------------------------------------------------------------------------------------ layers

    @staticmethod
    @abstractmethod
    def decoder_layer_cls() -> type[nn.Module] | list[type[nn.Module]]:
        """The decoder layer class, or all of them if there are several."""

    @staticmethod
    @abstractmethod
    def block_config_to_layer_overrides(block_config: BlockConfig) -> dict[str, Any]:
        """The config attributes, and their values, with which a layer of ``block_config`` is built.

        >>> LlamaModelDescriptor.block_config_to_layer_overrides(
        ...     BlockConfig(ffn=FFNConfig(intermediate_size=4096)))  # doctest: +SKIP
        {'intermediate_size': 4096}
        """

    @staticmethod
    def attn_no_op_post_init(decoder_layer: nn.Module) -> None:
        """Change a freshly built layer so that its attention does nothing; override where the family allows it.

        Example:
            >>> decoder_layer.input_layernorm = Same()  # doctest: +SKIP
            >>> decoder_layer.self_attn = return_tuple_of_size(MatchingZeros, size=2)()  # doctest: +SKIP
        """
        raise NotImplementedError("this descriptor has no attention no-op")

    @staticmethod
    def mlp_no_op_post_init(decoder_layer: nn.Module) -> None:
        """Change a freshly built layer so that its FFN does nothing; override where the family allows it.

        Example:
            >>> decoder_layer.post_attention_layernorm = Same()  # doctest: +SKIP
            >>> decoder_layer.mlp = MatchingZeros()  # doctest: +SKIP
        """
        raise NotImplementedError("this descriptor has no FFN no-op")

    @classmethod
    def attn_no_op_supported(cls) -> bool:
        """Whether :meth:`attn_no_op_post_init` is overridden."""
        return cls.attn_no_op_post_init is not ModelDescriptor.attn_no_op_post_init

    @classmethod
    def mlp_no_op_supported(cls) -> bool:
        """Whether :meth:`mlp_no_op_post_init` is overridden."""
        return cls.mlp_no_op_post_init is not ModelDescriptor.mlp_no_op_post_init

    # ------------------------------------------------------------------------------------------ names

    @staticmethod
    @abstractmethod
    def input_embedding_name() -> str:
        """The module name of the input embedding, e.g. ``"model.embed_tokens"``."""

    @staticmethod
    @abstractmethod
    def output_embedding_name() -> str:
        """The module name of the language-model head, e.g. ``"lm_head"``."""

    @staticmethod
    @abstractmethod
    def final_norm_name() -> str:
        """The module name of the norm before the head, e.g. ``"model.norm"``."""

    @staticmethod
    @abstractmethod
    def layer_block_name(index: int) -> str:
        """The module name of the decoder layer at ``index``, e.g. ``"model.layers.3"``."""

    # ------------------------------------------------------------------------------------------ weights

    @staticmethod
    @abstractmethod
    def layer_name_predicates(num_layers: int) -> dict[str, re.Pattern[str]]:
        """For every weight group a pattern that matches the ``state_dict`` names of the group.

        The groups are ``embedding``, ``lm_head`` (with the final norm), and ``block_{i}_attention`` and
        ``block_{i}_ffn`` for every layer, each with the norms that only it uses.
        """

    @classmethod
    def get_weight_groups(cls, layer_names: Iterable[str], num_hidden_layers: int) -> dict[str, list[str]]:
        """Sort ``state_dict`` names into weight groups.

        Args:
            layer_names: names of the model's ``state_dict``.
            num_hidden_layers: number of decoder layers.

        Returns:
            Group name to the names in it, groups in the order of the predicates, names in the order given; groups
            without a name are left out.

        Raises:
            ValueError: a name that no group takes.
        """
        predicates = cls.layer_name_predicates(num_hidden_layers)
        groups: dict[str, list[str]] = {group: [] for group in predicates}
        for name in layer_names:
            group = next((group for group, pattern in predicates.items() if pattern.match(name)), None)
            if group is None:
                raise ValueError(f"{cls.__name__}: no weight group takes {name!r}")
            groups[group].append(name)
        return {group: names for group, names in groups.items() if names}

    # ------------------------------------------------------------------------------------------ models in shards

    @staticmethod
    @abstractmethod
    def init_rotary_embedding(model: nn.Module, runtime: Any) -> None:
        """Make the rotary embedding of ``model`` anew on ``runtime.device``.

        Its frequencies are buffers that are computed at construction and not part of the ``state_dict``, so a model
        that was built on the meta device has none.

        Args:
            model: the model, whose ``config`` tells all that is needed.
            runtime: has ``device`` and ``dtype`` (see :class:`layersmith.run.runtime.Runtime`).
        """

    @classmethod
    def create_dummy_block(cls, original_layer: nn.Module, block_index: int) -> nn.Module:
        """A stand-in without weights for a decoder layer that another process holds.

        It passes its input on, and answers for the plain attributes that the model reads from its layers.
        """
        from layersmith.heterogeneous.no_op import DummyBlock

        return DummyBlock(original_layer, block_index)

    # ------------------------------------------------------------------------------------------ the whole model

    @staticmethod
    def get_language_model_config(config: Any) -> Any:
        """The language model's config inside ``config``; itself, unless the model is multimodal."""
        return config

    @staticmethod
    def requires_trust_remote_code() -> bool:
        """Whether models of this family need ``trust_remote_code=True``."""
        return False

    @staticmethod
    def uses_autocast() -> bool:
        """Whether the family runs under ``torch.autocast``."""
        return True
