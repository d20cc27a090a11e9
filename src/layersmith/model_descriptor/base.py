"""``ModelDescriptor``: what the rest of layersmith knows about a model family.

A descriptor says which classes are decoder layers, how the weights of a model are divided among subblocks, how a block
config becomes config attributes, and how a subblock is removed. It is used as a class, never instantiated. The methods
in this module are the interface of the spec and do not change; a third party's descriptor that has only them works
unchanged. The further methods, which have defaults, are in ``capabilities.py``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from layersmith.block_config import BlockConfig
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.capabilities import Capabilities


class ModelDescriptor(Capabilities, ABC):
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
        """The pattern of every weight group, which matches the ``state_dict`` names of the group.

        The groups are ``embedding``, ``lm_head`` (with the final norm), and ``block_{i}_attention`` and
        ``block_{i}_ffn`` for every layer, each with the norms that only it uses.
        """

    @classmethod
    def get_weight_groups(cls, layer_names: Iterable[str], num_hidden_layers: int) -> dict[str, list[str]]:
        """Sort ``state_dict`` names into weight groups.

        Args:
            layer_names: Names of the model's ``state_dict``.
            num_hidden_layers: Number of decoder layers.

        Returns:
            Group to its names. Groups are in the order of the predicates and names in the order given; groups without
            a name are left out.

        Raises:
            ValueError: No group's pattern matches a name.
        """
        predicates = cls.layer_name_predicates(num_hidden_layers)
        groups: dict[str, list[str]] = {group: [] for group in predicates}
        for name in layer_names:
            group = next((group for group, pattern in predicates.items() if pattern.match(name)), None)
            if group is None:
                raise ValueError(f"{cls.__name__}: no weight group's pattern matches {name!r}")
            groups[group].append(name)
        return {group: names for group, names in groups.items() if names}

    # ------------------------------------------------------------------------------------------ models in shards

    @staticmethod
    @abstractmethod
    def init_rotary_embedding(model: nn.Module, runtime: Any) -> None:
        """Recompute the rotary embedding of ``model`` on ``runtime.device``.

        Its frequencies are buffers that are computed at construction and are not part of the ``state_dict``. A model
        that was built on the meta device therefore has none.

        Args:
            model: The model; its ``config`` says all that is needed.
            runtime: Device and dtype (see :class:`layersmith.run.runtime.Runtime`).
        """

    @classmethod
    def create_dummy_block(cls, original_layer: nn.Module, block_index: int) -> nn.Module:
        """A stand-in without weights for a decoder layer that another process holds."""
        return DummyBlock(original_layer, block_index)

    # ------------------------------------------------------------------------------------------ the whole model

    @staticmethod
    def get_language_model_config(config: Any) -> Any:
        """The language model's config inside ``config``: ``config`` itself, unless the model is multimodal."""
        return config

    @staticmethod
    def requires_trust_remote_code() -> bool:
        """Whether models of this family need ``trust_remote_code=True``."""
        return False

    @staticmethod
    def uses_autocast() -> bool:
        """Whether the family runs under ``torch.autocast``."""
        return True


class DummyBlock(nn.Module):
    """Replaces a decoder layer that another process holds. It returns its input and has no weights.

    It has the plain attributes that a model's loop reads from its layers, e.g. ``attention_type``.
    """

    def __init__(self, original_layer: nn.Module, block_index: int):
        super().__init__()
        self.block_index = block_index
        values = dict(vars(original_layer))
        for cls in type(original_layer).__mro__[: type(original_layer).__mro__.index(nn.Module)]:
            for name, attribute in vars(cls).items():
                if isinstance(attribute, property):
                    with foreign_code(f"What is the layer's property {name}?", refusal_is_answer=True) as attempt:
                        values.setdefault(name, attempt.call(getattr, original_layer, name))
        for name, value in values.items():
            if not name.startswith("_") and isinstance(value, str | int | bool) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states
