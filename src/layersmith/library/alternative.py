"""Alternatives: what a subblock could be instead. The table of their kinds is :data:`KINDS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import UsageError
from layersmith.library import cuts
from layersmith.records import to_data
from layersmith.run.artifacts import fingerprint


@dataclass(frozen=True)
class Kind:
    """A kind of alternative.

    To add one, write its functions in :mod:`.cuts`, add a row to :data:`KINDS`, and offer its sizes in
    :mod:`.search_space`.

    Attributes:
        label: Name of an alternative; ``{size}`` is its size, ``{s}`` the plural of its unit.
        sizes: Attribute of the subblock's config, or of the record in it, that is set to an attribute of the
            alternative, e.g. ``{"moe.num_local_experts": "size"}``.
        sets: Attributes of the subblock's config that are set to a constant.
        words: Name of what gets smaller, for a table of alternatives.
        cut: Makes the weights; None if the alternative has the parent's, or none.
        gone: Entries of modules' inputs that become zero, where that is all the alternative does; None where not.
        reader: The part of an axis whose one weight makes the subblock's output.
        has_weights: Whether it has weights, which local distillation can train.
        runs_subblock: Whether a subblock of the parent's type runs, only smaller.
        is_part: Whether its weights are among the parent's, and among those of a larger size of the same kind.
    """

    label: str
    sizes: dict[str, str] = dataclasses.field(default_factory=dict)
    sets: dict[str, bool] = dataclasses.field(default_factory=dict)
    words: str = ""
    cut: cuts.Cut | None = None
    gone: cuts.Gone | None = None
    reader: cuts.Reader | None = None
    has_weights: bool = True
    runs_subblock: bool = True
    is_part: bool = True

    def config(self, parent: AttentionConfig | FFNConfig, alternative: Alternative) -> AttentionConfig | FFNConfig:
        """The config of a subblock with an alternative of this kind."""
        changes: dict[str, Any] = dict(self.sets)
        for path, attribute in self.sizes.items():
            record, _, name = path.rpartition(".")
            value = getattr(alternative, attribute)
            if isinstance(value, dict):
                changes[name] = {**(getattr(parent, name) or {}), **value}
            elif not record:
                # Where each query head has separate keys, the config counts query heads alone.
                if name == "num_key_value_heads" and len(self.sizes) > 1 and getattr(parent, name) is None:
                    continue
                changes[name] = value
            else:
                changes[record] = dataclasses.replace(changes.get(record, getattr(parent, record)), **{name: value})
        return dataclasses.replace(parent, **changes) if changes else parent


KINDS = {
    "parent": Kind("{subblock} as it is", has_weights=False),
    "no_op": Kind(
        "{subblock} no-op",
        sets={"no_op": True, "replace_with_linear": False},
        words="no-op",
        has_weights=False,
        runs_subblock=False,
    ),
    "linear": Kind(
        "{subblock} linear",
        sets={"no_op": False, "replace_with_linear": True},
        words="linear",
        cut=cuts.linear_map,
        runs_subblock=False,
        is_part=False,
    ),
    "window": Kind("attention with a window", sizes={"layer_type": "method"}, words="window", reader=cuts.heads_reader),
    "kv_heads": Kind(
        "attention {size} KV head{s}",
        sizes={"num_key_value_heads": "size"},
        words="KV heads",
        cut=cuts.kv_heads,
        gone=cuts.heads_gone(cuts.queries_of_gone_heads),
        reader=cuts.heads_reader,
        is_part=False,  # the query heads of removed KV heads read others
    ),
    "head_groups": Kind(
        "attention {size} KV head{s} with their query heads",
        sizes={"num_attention_heads": "query_heads", "num_key_value_heads": "size"},
        words="KV heads with their query heads",
        cut=cuts.head_groups,
        gone=cuts.heads_gone(cuts.queries_of_gone_heads),
        reader=cuts.heads_reader,
    ),
    "query_heads": Kind(
        "attention {size} query head{s}",
        sizes={"num_attention_heads": "size"},
        words="query heads",
        cut=cuts.query_heads,
        gone=cuts.heads_gone(cuts.gone_queries),
        reader=cuts.heads_reader,
    ),
    "mixer_heads": Kind(
        "attention {size} mixer head{s}",
        sizes={"mamba.num_heads": "size"},
        words="mixer heads",
        cut=cuts.mixer_heads,
        reader=cuts.mixer_reader,
    ),
    "mixer_groups": Kind(
        "attention {size} group{s} of mixer heads",
        sizes={"mamba.num_groups": "size", "mamba.num_heads": "query_heads"},
        words="groups of mixer heads",
        cut=cuts.mixer_groups,
        reader=cuts.mixer_reader,
    ),
    "mixer_head_size": Kind(
        "attention mixer heads of {size}",
        sizes={"mamba.head_dim": "size"},
        words="size of mixer heads",
        cut=cuts.mixer_head_size,
        reader=cuts.mixer_reader,
    ),
    "state_size": Kind(
        "attention state of {size}",
        sizes={"mamba.state_dim": "size"},
        words="state",
        cut=cuts.state_size,
        reader=cuts.mixer_reader,
    ),
    "attention_size": Kind(
        "attention {method} {size}",
        sizes={"inner_sizes": "named_size"},
        words="size inside",
        cut=cuts.inner_size,
        reader=cuts.heads_reader,
        is_part=False,  # weights of norms are scaled
    ),
    "ffn_width": Kind(
        "ffn {size}",
        sizes={"intermediate_size": "size"},
        words="width",
        cut=cuts.width("ffn"),
        gone=cuts.channels_gone("ffn"),
        reader=cuts.width_reader("ffn"),
    ),
    "experts": Kind("ffn {size} expert{s}", sizes={"moe.num_local_experts": "size"}, words="experts", cut=cuts.experts),
    "expert_width": Kind(
        "ffn experts of {size}",
        sizes={"moe.expert_intermediate_dim": "size"},
        words="expert width",
        cut=cuts.width("ffn"),
    ),
    "shared_width": Kind(
        "ffn shared expert of {size}",
        sizes={"moe.shared_expert_intermediate_dim": "size"},
        words="shared width",
        cut=cuts.width("shared"),
        gone=cuts.channels_gone("shared"),
        reader=cuts.width_reader("shared"),
    ),
    "ffn_size": Kind(
        "ffn {method} {size}",
        sizes={"inner_sizes": "named_size"},
        words="size inside",
        cut=cuts.inner_size,
        is_part=False,
    ),
    "experts_per_token": Kind(
        "ffn {size} expert{s} a token", sizes={"moe.num_experts_per_tok": "size"}, words="experts a token"
    ),
}


@dataclass(frozen=True)
class Alternative:
    """Another config for one subblock of one layer.

    Attributes:
        layer: index of the decoder layer.
        subblock: ``attention`` or ``ffn``.
        kind: a key of :data:`KINDS`: ``parent``, ``no_op``, ``linear``; for attention ``kv_heads`` (fewer for the same
            query heads), ``head_groups`` (fewer with their query heads), ``query_heads`` (fewer for the same KV heads)
            or ``window`` (it sees the last tokens only); for a Mamba or linear-attention mixer ``mixer_heads`` (fewer
            for the same groups), ``mixer_groups`` (fewer groups with their heads), ``mixer_head_size`` (smaller heads)
            or ``state_size``; for an FFN ``ffn_width``, ``experts``, ``expert_width``, ``shared_width`` or
            ``experts_per_token``; for sizes inside either ``attention_size`` or ``ffn_size``.
        method: how its weights come from the parent's: ``contribution``, ``iterative``, ``pool``,
            ``least_squares``; for a window its type in the config's words; for a size inside a subblock the config's
            attribute that sets it; empty where there is only one way.
        size: heads, groups, experts, channels, entries of a head, or numbers of the state that are left; 0 where that
            has no meaning.
        query_heads: query heads that are left with ``head_groups``; heads that are left with ``mixer_groups``.
        format: number format of its weights, a key of :data:`~layersmith.quantization.formats.FORMATS`; empty for the
            parent's data type.
        kv_format: number format of its keys and values in the KV cache, a key of
            :data:`~layersmith.quantization.formats.KV_FORMATS`; empty for the parent's data type.
    """

    layer: int
    subblock: str
    kind: str
    method: str = ""
    size: int = 0
    query_heads: int = 0
    format: str = ""
    kv_format: str = ""

    def __post_init__(self) -> None:
        is_known = self.kind in KINDS and self.subblock in ("attention", "ffn")
        if not is_known or min(self.layer, self.size, self.query_heads) < 0:
            raise UsageError(f"no such alternative: layer {self.layer}, {self.subblock!r}, {self.kind!r}, {self.size}.")

    @property
    def traits(self) -> Kind:
        """The row of the table of kinds."""
        return KINDS[self.kind]

    @property
    def named_size(self) -> dict[str, int]:
        """The size by the config's attribute that sets it, of a size inside a subblock."""
        return {self.method: self.size}

    @property
    def is_parent(self) -> bool:
        """Whether it is the parent's subblock itself."""
        return self.kind == "parent" and not self.format and not self.kv_format

    @property
    def is_no_op(self) -> bool:
        """Whether it removes the subblock."""
        return self.kind == "no_op"

    @property
    def name(self) -> str:
        """What it is, the same in every layer, e.g. ``"ffn 384 (iterative)"``."""
        plural = "s" if self.size != 1 else ""
        words = self.traits.label.format(subblock=self.subblock, method=self.method, size=self.size, s=plural)
        words += f" ({self.method})" if self.method in ("contribution", "iterative", "pool") else ""
        words += f", {self.format}" if self.format else ""
        return f"{words}, {self.kv_format} KV cache" if self.kv_format else words

    @property
    def key(self) -> str:
        """Name and layer: unique in a library."""
        return f"layer {self.layer}: {self.name}"

    def __str__(self) -> str:
        return self.key

    @property
    def identity(self) -> str:
        """Digest of all fields."""
        return fingerprint(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """All fields as JSON data, without empty formats."""
        data: dict[str, Any] = to_data(self)
        return {name: value for name, value in data.items() if value or name not in ("format", "kv_format")}

    @property
    def shape(self) -> Alternative:
        """The same alternative in the parent's data type."""
        return self.in_format("").with_kv_format("")

    def is_within(self, larger: Alternative) -> bool:
        """Whether all weights of this alternative, up to its refitted projection, are among those of another one.

        Both are alternatives of one subblock. What a removed KV head, a mean of heads or a linear map is replaced by
        is not a part of the parent, so these are only within themselves; a no-op is within everything.
        """
        if self == larger or self.is_no_op:
            return True
        of_one_kind = (self.kind, self.method) == (larger.kind, larger.method) and self.size <= larger.size
        return self.traits.is_part and (larger.is_parent or of_one_kind)

    def in_format(self, name: str) -> Alternative:
        """The same alternative with its weights in another format; a no-op has none."""
        return self if name == self.format or self.is_no_op else dataclasses.replace(self, format=name)

    def with_kv_format(self, name: str) -> Alternative:
        """The same alternative with its keys and values in another format, if it may have any."""
        may = self.subblock == "attention" and self.traits.runs_subblock
        return dataclasses.replace(self, kv_format=name) if may and name != self.kv_format else self

    def subblock_config(self, parent: BlockConfig) -> AttentionConfig | FFNConfig:
        """The config of the subblock with this alternative."""
        config = self.traits.config(parent.subblock(self.subblock), self)
        if isinstance(config, AttentionConfig) and self.kv_format:
            return dataclasses.replace(config, kv_cache_format=self.kv_format)
        return config

    def block_config(self, parent: BlockConfig) -> BlockConfig:
        """The parent's block with this alternative in it."""
        changes: dict[str, Any] = {self.subblock: self.subblock_config(parent)}
        return dataclasses.replace(parent, **changes)


def no_op_of_other(a: Alternative) -> Alternative:
    """The alternative that removes the other subblock of the same layer."""
    return Alternative(a.layer, "ffn" if a.subblock == "attention" else "attention", "no_op")


def child_blocks(parent: Sequence[BlockConfig], chosen: Sequence[Alternative]) -> list[BlockConfig]:
    """The block configs of the child with these alternatives."""
    blocks = list(parent)
    for alternative in chosen:
        blocks[alternative.layer] = alternative.block_config(blocks[alternative.layer])
    return blocks


def changed_by_layer(chosen: Sequence[Alternative]) -> dict[int, list[Alternative]]:
    """The alternatives of a solution that change something, by layer."""
    by_layer: dict[int, list[Alternative]] = {}
    for alternative in chosen:
        if not alternative.is_parent:
            by_layer.setdefault(alternative.layer, []).append(alternative)
    return by_layer


def pair_identity(alternatives: Sequence[Alternative]) -> str:
    """Digest of the alternatives of one layer, which are trained together."""
    return fingerprint(sorted(a.identity for a in alternatives))


def in_words(config: AttentionConfig | FFNConfig) -> str:
    """A few words for a subblock of this config."""
    if config.no_op or config.replace_with_linear:
        return "no-op" if config.no_op else "linear"
    inner = [f"{name} {size}" for name, size in (config.inner_sizes or {}).items()]
    if isinstance(config, AttentionConfig):
        kv, queries = config.num_key_value_heads, config.num_attention_heads
        words = [
            f"{n} {what}{'s' if n != 1 else ''}" for n, what in ((queries, "head"), (kv, "KV head")) if n is not None
        ]
        words += ["window"] if config.layer_type == "sliding_attention" else []
        words += [f"{config.kv_cache_format} KV cache"] if config.kv_cache_format else []
        if (mamba := config.mamba) is not None:
            heads = f"{mamba.num_heads} mixer head{'s' if mamba.num_heads != 1 else ''} of {mamba.head_dim}"
            words += [f"{heads}, state {mamba.state_dim}"]
        return ", ".join([*words, *inner]) or "attention"
    moe = config.moe
    if moe is None:
        return ", ".join(["FFN" if config.intermediate_size is None else f"width {config.intermediate_size}", *inner])
    of = f" of {moe.expert_intermediate_dim}" if moe.expert_intermediate_dim is not None else ""
    shared = f", shared {moe.shared_expert_intermediate_dim}" if moe.shared_expert_intermediate_dim is not None else ""
    return ", ".join([f"{moe.num_local_experts} experts{of}, {moe.num_experts_per_tok} a token{shared}", *inner])
