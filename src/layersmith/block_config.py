"""What one decoder layer is: a pair of an attention config and an FFN config.

The schema is the one that a child's ``config.json`` carries under ``block_configs`` and that
puzzletron's checkpoints carry too, so either side reads the other's files. ``None`` means "as the
model's own config says".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from layersmith import schema
from layersmith.errors import UsageError

C = TypeVar("C", bound="_Record")


class _Record:
    """JSON both ways, and unknown fields refused by name."""

    # Written to JSON even when they hold their default, so that a reader sees them.
    _always_written: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        schema.check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON data; fields that only other tools use are left out while unset."""
        data = {}
        for name in schema.field_names(self):
            value = getattr(self, name)
            if value is not None or name in self._always_written:
                data[name] = value.to_dict() if isinstance(value, _Record) else schema.to_data(value)
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any], where: str | None = None) -> C:
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: an unknown field (named, with the nearest known one) or a value of the wrong type.
        """
        return schema.parse(cls, data, where or cls.__name__)

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{cls.__name__}: not JSON ({error}).") from error
        return cls.from_dict(data)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{type(self).__name__}.{name}: must be at least 1, got {value}. Use no_op to remove.")


@dataclass(frozen=True)
class MambaConfig(_Record):
    """Sizes of a Mamba mixer that stands in the attention's place."""

    state_dim: int
    num_heads: int
    head_dim: int
    num_groups: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("state_dim", "num_heads", "head_dim", "num_groups")


@dataclass(frozen=True)
class MoEConfig(_Record):
    """Sizes of a mixture-of-experts FFN."""

    num_local_experts: int
    num_experts_per_tok: int = 1
    expert_intermediate_dim: int | None = None
    shared_expert_intermediate_dim: int | None = None

    _always_written = ("expert_intermediate_dim", "shared_expert_intermediate_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("num_local_experts", "num_experts_per_tok", "expert_intermediate_dim")
        if self.num_experts_per_tok > self.num_local_experts:
            raise UsageError(
                f"MoEConfig.num_experts_per_tok: {self.num_experts_per_tok} of {self.num_local_experts} experts."
            )


@dataclass(frozen=True)
class _SubblockConfig(_Record):
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: tuple[str, ...] | None = None
    weights_precision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_op and self.replace_with_linear:
            raise UsageError(f"{type(self).__name__}: no_op and replace_with_linear exclude each other.")

    def _drop_sizes_if_replaced(self, *names: str) -> None:
        # A subblock that is not there has no sizes; without this, equal subblocks would compare unequal.
        if self.no_op or self.replace_with_linear:
            for name in names:
                object.__setattr__(self, name, None)


@dataclass(frozen=True)
class AttentionConfig(_SubblockConfig):
    """The attention of one layer.

    Attributes:
        no_op: the subblock is removed: the layer passes its input on.
        replace_with_linear: one ``hidden_size`` x ``hidden_size`` map stands in its place.
        num_key_value_heads: K, or None for what the model's config says.
        num_attention_heads: H, or None for what the model's config says; the size of a head stays.
        layer_type: how far it sees, in the words of the model's config (``"sliding_attention"``,
            ``"full_attention"``), or None for what that says of the layer.
    """

    num_key_value_heads: int | None = None
    num_attention_heads: int | None = None
    layer_type: str | None = None
    mamba: MambaConfig | None = None
    llama4: dict[str, Any] | None = None

    _always_written = ("num_key_value_heads",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("num_key_value_heads", "num_attention_heads")
        self._drop_sizes_if_replaced("num_key_value_heads", "num_attention_heads", "layer_type", "mamba", "llama4")


@dataclass(frozen=True)
class FFNConfig(_SubblockConfig):
    """The feed-forward network of one layer.

    Attributes:
        no_op: the subblock is removed: the layer passes its input on.
        replace_with_linear: one ``hidden_size`` x ``hidden_size`` map stands in its place.
        intermediate_size: F, or None for what the model's config says.
        moe: the experts, where the FFN is a mixture.
    """

    intermediate_size: int | None = None
    moe: MoEConfig | None = None

    _always_written = ("intermediate_size", "moe")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("intermediate_size")
        self._drop_sizes_if_replaced("intermediate_size", "moe")


@dataclass(frozen=True)
class BlockConfig(_Record):
    """One decoder layer: its attention and its FFN.

    >>> BlockConfig(ffn=FFNConfig(no_op=True)).to_dict()["ffn"]["no_op"]
    True
    """

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    parallel_blocks: tuple[dict[str, Any], ...] | None = None

    def subblock(self, name: str) -> AttentionConfig | FFNConfig:
        """The config of the subblock ``"attention"`` or ``"ffn"``."""
        return self.attention if name == "attention" else self.ffn


def read_block_configs(entries: object, where: str) -> list[BlockConfig]:
    """Block configs from the ``block_configs`` list of a ``config.json``.

    Raises:
        UsageError: not a list of records of this schema.
    """
    if not isinstance(entries, list | tuple):
        raise UsageError(f"{where}: block_configs is not a list with one entry a layer.")
    return [
        entry if isinstance(entry, BlockConfig) else BlockConfig.from_dict(entry, f"{where}: block_configs[{i}]")
        for i, entry in enumerate(entries)
    ]


def has_attention(block_config: BlockConfig) -> bool:
    """Whether a block has an attention that writes to the KV cache."""
    return not (block_config.attention.no_op or block_config.attention.replace_with_linear)
