"""The shape of one decoder layer: an attention config and an FFN config.

The JSON form is what a child's ``config.json`` carries under ``block_configs``. Puzzletron's checkpoints use the same
form, so either side reads the other's files. ``None`` means "the value in the model's config".
"""

from __future__ import annotations

import json
from dataclasses import field
from typing import Any, ClassVar, TypeVar

from pydantic import PositiveInt

from layersmith.errors import UsageError
from layersmith.records import field_names, parse, record, to_data

C = TypeVar("C", bound="_Config")


class _Config:
    """Conversion to JSON data and back."""

    # Fields that are written even if they are None. The others are left out then, as most tools do not know them.
    _always_written: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data."""
        values = {name: getattr(self, name) for name in field_names(self)}
        return {
            name: value.to_dict() if isinstance(value, _Config) else to_data(value)
            for name, value in values.items()
            if value is not None or name in self._always_written
        }

    def to_json(self) -> str:
        """The config as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls: type[C], data: object, where: str | None = None) -> C:
        """The inverse of :meth:`to_dict`; ``where`` names the place in messages.

        Raises:
            UsageError: an unknown field or a value of the wrong type.
        """
        return parse(cls, data, f"{where or cls.__name__}.")


@record()
class MambaConfig(_Config):
    """Sizes of a Mamba or linear-attention mixer, which takes the attention's place."""

    state_dim: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt
    num_groups: PositiveInt


@record()
class MoEConfig(_Config):
    """Sizes of a mixture-of-experts FFN."""

    num_local_experts: PositiveInt
    num_experts_per_tok: PositiveInt = 1
    expert_intermediate_dim: PositiveInt | None = None
    shared_expert_intermediate_dim: int | None = None

    _always_written = ("expert_intermediate_dim", "shared_expert_intermediate_dim")

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(f"{self.num_experts_per_tok} experts per token of only {self.num_local_experts}.")


@record()
class _SubblockConfig(_Config):
    no_op: bool = False
    """The subblock is removed: the layer passes its input on."""
    replace_with_linear: bool = False
    """One linear map, ``[hidden_size, hidden_size]``, replaces the subblock."""
    sparsify: tuple[str, ...] | None = None
    """For puzzletron's files only; layersmith ignores it."""
    weights_precision: str | None = None
    """For puzzletron's files only; layersmith ignores it."""

    def __post_init__(self) -> None:
        if self.no_op and self.replace_with_linear:
            raise ValueError("no_op and replace_with_linear exclude each other.")
        if self.no_op or self.replace_with_linear:
            # Without sizes, equal subblocks compare equal.
            for name in set(field_names(self)) - set(field_names(_SubblockConfig)):
                object.__setattr__(self, name, None)


@record()
class AttentionConfig(_SubblockConfig):
    """The attention of one layer."""

    num_key_value_heads: PositiveInt | None = None
    """Number of KV heads."""
    num_attention_heads: PositiveInt | None = None
    """Number of query heads. The size of a head does not change with it."""
    layer_type: str | None = None
    """What the attention sees, in the words of the model's config: ``sliding_attention``, ``full_attention``."""
    kv_cache_format: str | None = None
    """Number format of keys and values in the KV cache. None: the data type of the model."""
    mamba: MambaConfig | None = None
    """The mixer's sizes, where it takes the attention's place."""
    inner_sizes: dict[str, PositiveInt] | None = field(default=None, hash=False)
    """Sizes inside the attention, by the attribute of the model's config that sets each: ``{"v_head_dim": 96}``."""
    llama4: dict[str, Any] | None = None
    """For puzzletron's files only; layersmith ignores it."""

    _always_written = ("num_key_value_heads",)


@record()
class FFNConfig(_SubblockConfig):
    """The feed-forward network of one layer."""

    intermediate_size: PositiveInt | None = None
    """Width of a dense FFN."""
    moe: MoEConfig | None = None
    """The experts, where the FFN is a mixture."""
    inner_sizes: dict[str, PositiveInt] | None = field(default=None, hash=False)
    """Other sizes inside the FFN, by the attribute of the model's config that sets each."""

    _always_written = ("intermediate_size", "moe")


@record()
class BlockConfig(_Config):
    """One decoder layer: its attention and its FFN.

    Examples:
        >>> BlockConfig(ffn=FFNConfig(no_op=True)).to_dict()["ffn"]["no_op"]
        True
    """

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    parallel_blocks: tuple[dict[str, Any], ...] | None = None
    """For puzzletron's files only; layersmith ignores it."""

    def subblock(self, name: str) -> AttentionConfig | FFNConfig:
        """The config of the subblock ``"attention"`` or ``"ffn"``."""
        return self.attention if name == "attention" else self.ffn

    @property
    def inner_sizes(self) -> dict[str, int]:
        """The sizes inside both subblocks, by the attribute of the model's config that sets each."""
        return {**(self.attention.inner_sizes or {}), **(self.ffn.inner_sizes or {})}


def read_block_configs(entries: object, where: str) -> list[BlockConfig]:
    """Block configs from the ``block_configs`` list of a ``config.json``.

    Raises:
        UsageError: not a list of block configs.
    """
    if not isinstance(entries, list | tuple):
        raise UsageError(f"{where}: block_configs is not a list with one entry per layer.")
    return [
        entry if isinstance(entry, BlockConfig) else BlockConfig.from_dict(entry, f"{where}: block_configs[{i}]")
        for i, entry in enumerate(entries)
    ]


def has_attention(block_config: BlockConfig) -> bool:
    """Whether a block has an attention, which writes to the KV cache."""
    return not (block_config.attention.no_op or block_config.attention.replace_with_linear)
