"""Alternatives: what a subblock could be instead, and which of them there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import LayersmithError, UsageError
from layersmith.heterogeneous.plan import NO_LINEAR, linear_records
from layersmith.library.axes.axis import HeadsAxis, LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import LibraryRecipe
from layersmith.records import to_data
from layersmith.run.artifacts import fingerprint

_FIELDS = {
    "kv_heads": "num_key_value_heads",
    "query_heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
}
_MIXER_FIELDS = {
    "mixer_heads": "num_heads",
    "mixer_groups": "num_groups",
    "mixer_head_size": "head_dim",
    "state_size": "state_dim",
}
_EXPERT_FIELDS = {
    "experts": "num_local_experts",
    "expert_width": "expert_intermediate_dim",
    "shared_width": "shared_expert_intermediate_dim",
    "experts_per_token": "num_experts_per_tok",
}


@dataclass(frozen=True)
class Alternative:
    """Another config for one subblock of one layer.

    Attributes:
        layer: index of the decoder layer.
        subblock: ``attention`` or ``ffn``.
        kind: ``parent``, ``no_op``, ``linear``; for attention ``kv_heads`` (fewer for the same query heads),
            ``head_groups`` (fewer with their query heads), ``query_heads`` (fewer for the same KV heads) or ``window``
            (it sees the last tokens only); for a Mamba or linear-attention mixer ``mixer_heads`` (fewer for the same
            groups), ``mixer_groups`` (fewer groups with their heads), ``mixer_head_size`` (smaller heads) or
            ``state_size``; for an FFN ``ffn_width``, ``experts``, ``expert_width``, ``shared_width`` or
            ``experts_per_token``.
        method: how its weights come from the parent's: ``contribution``, ``iterative``, ``pool``,
            ``least_squares``; for a window its type in the config's words; empty where there is nothing to choose.
        size: heads, groups, experts, channels, entries of a head, or numbers of the state that are left; 0 where that
            has no meaning.
        query_heads: that are left with ``head_groups``; heads that are with ``mixer_groups``.
    """

    layer: int
    subblock: str
    kind: str
    method: str = ""
    size: int = 0
    query_heads: int = 0

    @property
    def name(self) -> str:
        """What it is, the same in every layer, e.g. ``"ffn 384 (iterative)"``."""
        plural = "s" if self.size != 1 else ""
        words = {
            "parent": f"{self.subblock} as it is",
            "no_op": f"{self.subblock} no-op",
            "linear": f"{self.subblock} linear",
            "window": "attention with a window",
            "kv_heads": f"attention {self.size} KV head{plural}",
            "head_groups": f"attention {self.size} KV head{plural} with their query heads",
            "query_heads": f"attention {self.size} query head{plural}",
            "mixer_heads": f"attention {self.size} mixer head{plural}",
            "mixer_groups": f"attention {self.size} group{plural} of mixer heads",
            "mixer_head_size": f"attention mixer heads of {self.size}",
            "state_size": f"attention state of {self.size}",
            "ffn_width": f"ffn {self.size}",
            "experts": f"ffn {self.size} expert{plural}",
            "expert_width": f"ffn experts of {self.size}",
            "shared_width": f"ffn shared expert of {self.size}",
            "experts_per_token": f"ffn {self.size} expert{plural} a token",
        }
        return words[self.kind] + (f" ({self.method})" if self.method in ("contribution", "iterative", "pool") else "")

    @property
    def key(self) -> str:
        """Name and layer: unique in a library."""
        return f"layer {self.layer}: {self.name}"

    @property
    def identity(self) -> str:
        """Digest of all fields."""
        return fingerprint(to_data(self))

    def subblock_config(self, parent: BlockConfig) -> AttentionConfig | FFNConfig:
        """The config of the subblock with this alternative."""
        own: Any = parent.subblock(self.subblock)
        if self.kind == "no_op":
            return dataclasses.replace(own, no_op=True, replace_with_linear=False)
        if self.kind == "linear":
            return dataclasses.replace(own, no_op=False, replace_with_linear=True)
        if self.kind == "window":
            return dataclasses.replace(own, layer_type=self.method)
        if self.kind == "head_groups":
            # Where each query head has keys of its own, the config counts query heads alone.
            counts = {"num_attention_heads": self.query_heads}
            if own.num_key_value_heads is not None:
                counts["num_key_value_heads"] = self.size
            return dataclasses.replace(own, **counts)
        if self.kind in _MIXER_FIELDS:
            sizes = {_MIXER_FIELDS[self.kind]: self.size}
            if self.kind == "mixer_groups":
                sizes["num_heads"] = self.query_heads
            return dataclasses.replace(own, mamba=dataclasses.replace(own.mamba, **sizes))
        if self.kind in _EXPERT_FIELDS:
            return dataclasses.replace(own, moe=dataclasses.replace(own.moe, **{_EXPERT_FIELDS[self.kind]: self.size}))
        if self.kind in _FIELDS:
            return dataclasses.replace(own, **{_FIELDS[self.kind]: self.size})
        return own

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
    """What of a solution is not the parent's own, by layer."""
    by_layer: dict[int, list[Alternative]] = {}
    for alternative in chosen:
        if alternative.kind != "parent":
            by_layer.setdefault(alternative.layer, []).append(alternative)
    return by_layer


def pair_identity(alternatives: Sequence[Alternative]) -> str:
    """Digest of what stands together in one layer."""
    return fingerprint(sorted(a.identity for a in alternatives))


def in_words(config: AttentionConfig | FFNConfig) -> str:
    """What a subblock of this config is, in a word or two."""
    if config.no_op or config.replace_with_linear:
        return "no-op" if config.no_op else "linear"
    if isinstance(config, AttentionConfig):
        kv, queries = config.num_key_value_heads, config.num_attention_heads
        words = [
            f"{n} {what}{'s' if n != 1 else ''}" for n, what in ((queries, "head"), (kv, "KV head")) if n is not None
        ]
        words += ["window"] if config.layer_type == "sliding_attention" else []
        if (mamba := config.mamba) is not None:
            heads = f"{mamba.num_heads} mixer head{'s' if mamba.num_heads != 1 else ''} of {mamba.head_dim}"
            words += [f"{heads}, state {mamba.state_dim}"]
        return ", ".join(words) or "attention"
    moe = config.moe
    if moe is None:
        return "FFN" if config.intermediate_size is None else f"width {config.intermediate_size}"
    of = f" of {moe.expert_intermediate_dim}" if moe.expert_intermediate_dim is not None else ""
    shared = f", shared {moe.shared_expert_intermediate_dim}" if moe.shared_expert_intermediate_dim is not None else ""
    return f"{moe.num_local_experts} experts{of}, {moe.num_experts_per_tok} a token{shared}"


def search_space(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: Sequence[LayerAxes],
    no_linear: Mapping[str, Sequence[str]],
    recipe: LibraryRecipe,
    ffn_ranking: str,
) -> list[Alternative]:
    """Every alternative of every layer, the parent's own subblocks first.

    Raises:
        UsageError: the recipe keeps layers that are not there, or sizes that no layer can take.
    """
    for layer in recipe.keep_layers:
        if not 0 <= layer < len(blocks):
            raise UsageError(f"recipe library.keep_layers: there is no layer {layer}; the model has {len(blocks)}.")
    found: list[Alternative] = []
    for i, (block, own_axes) in enumerate(zip(blocks, axes, strict=True)):
        found += [Alternative(i, "attention", "parent"), Alternative(i, "ffn", "parent")]
        if i in recipe.keep_layers:
            continue
        found += _of_heads(i, own_axes.kv, recipe) if own_axes.kv is not None else []
        found += _of_mixer(i, own_axes, recipe) if recipe.mixers else []
        if own_axes.window and recipe.windows:
            found.append(Alternative(i, "attention", "window", own_axes.window))
        found += _of_ffn(i, block, own_axes, recipe, ffn_ranking)
        for subblock in ("attention", "ffn"):
            present = not (block.subblock(subblock).no_op or block.subblock(subblock).replace_with_linear)
            if present and subblock in recipe.linear and not no_linear[subblock][i]:
                found.append(Alternative(i, subblock, "linear", "least_squares"))
            supported = (
                descriptor.attn_no_op_supported() if subblock == "attention" else descriptor.mlp_no_op_supported()
            )
            if not block.subblock(subblock).no_op and subblock in recipe.no_op and supported:
                found.append(Alternative(i, subblock, "no_op"))
    return found


def _of_heads(i: int, axis: HeadsAxis, recipe: LibraryRecipe) -> list[Alternative]:
    found = []
    group, unit = axis.num_heads // axis.size, axis.together
    if recipe.kv_heads is not None:
        recipe = dataclasses.replace(recipe, kv_heads=tuple(k // unit for k in recipe.kv_heads if k % unit == 0))
    if axis.fewer_kv:
        for size in kv_head_counts(axis.size, axis.num_heads, recipe):
            # Only counts that divide the parent's can be averages of equally many.
            methods = [m for m in recipe.kv_methods if m != "pool" or axis.size % size == 0]
            found += [Alternative(i, "attention", "kv_heads", method, size * unit) for method in methods]
    if axis.fewer_groups and recipe.query_heads:
        sizes = head_group_counts(axis.size, axis.fewer_kv, axis.num_heads, recipe)
        found += [Alternative(i, "attention", "head_groups", "contribution", k * unit, k * group * unit) for k in sizes]
    if axis.fewer_queries and recipe.query_heads:
        sizes = fractions_of(axis.num_heads // axis.shares, recipe.head_fractions)
        found += [Alternative(i, "attention", "query_heads", "contribution", n * axis.shares * unit) for n in sizes]
    return found


def _of_mixer(i: int, axes: LayerAxes, recipe: LibraryRecipe) -> list[Alternative]:
    found = []
    if axes.mixer is not None:
        groups, group = axes.mixer.size, axes.mixer.num_heads // axes.mixer.size
        if axes.mixer.fewer_queries:
            counts = fractions_of(group, recipe.head_fractions)
            found += [Alternative(i, "attention", "mixer_heads", "contribution", n * groups) for n in counts]
        if axes.mixer.fewer_groups:
            counts = fractions_of(groups, recipe.head_fractions)
            found += [Alternative(i, "attention", "mixer_groups", "contribution", n, n * group) for n in counts]
    for kind, axis in (("mixer_head_size", axes.mixer_size), ("state_size", axes.state)):
        if axis is not None:
            multiple = width_multiple(axis.size)
            sizes = {max(multiple, round(axis.size * f / multiple) * multiple) for f in recipe.head_fractions}
            sizes = {n for n in sizes if n < axis.size}
            found += [Alternative(i, "attention", kind, "contribution", n) for n in sorted(sizes, reverse=True)]
    return found


def _of_ffn(i: int, block: BlockConfig, axes: LayerAxes, recipe: LibraryRecipe, ffn_ranking: str) -> list[Alternative]:
    found: list[Alternative] = []
    moe = block.ffn.moe
    if axes.ffn is not None and moe is None:
        found += [Alternative(i, "ffn", "ffn_width", ffn_ranking, size) for size in ffn_widths(axes.ffn.size, recipe)]
    if axes.experts is not None:
        in_group, least = axes.experts.size // axes.experts.groups, 1 if axes.experts.groups == 1 else 2
        for count in fractions_of(in_group, recipe.expert_fractions):
            size = count * axes.experts.groups
            if count >= least and size >= axes.experts.per_token:
                found.append(Alternative(i, "ffn", "experts", "iterative", size))
        if axes.experts.fewer_per_token:
            counts = fractions_of(axes.experts.per_token, recipe.expert_fractions)
            found += [Alternative(i, "ffn", "experts_per_token", "", size) for size in counts]
    for kind, axis in (("expert_width", axes.ffn if moe is not None else None), ("shared_width", axes.shared)):
        if axis is not None:
            multiple = recipe.ffn_multiple or width_multiple(axis.size)
            widths = {max(multiple, round(axis.size * f / multiple) * multiple) for f in recipe.expert_fractions}
            found += [
                Alternative(i, "ffn", kind, "contribution", w) for w in sorted(widths, reverse=True) if w < axis.size
            ]
    return found


def fractions_of(full: int, fractions: Sequence[float]) -> list[int]:
    """Numbers below ``full``, at least 1, that are these fractions of it, most first."""
    return sorted({n for f in fractions if 1 <= (n := round(full * f)) < full}, reverse=True)


def width_multiple(full: int) -> int:
    """What the widths of an FFN of width ``full`` are multiples of."""
    return next((m for m, least in ((256, 2048), (64, 512), (16, 64), (4, 16)) if full >= least), 1)


def ffn_widths(full: int, recipe: LibraryRecipe) -> list[int]:
    """The widths to try for an FFN of width ``full``, widest first."""
    if recipe.ffn_sizes is not None:
        return sorted({size for size in recipe.ffn_sizes if size < full}, reverse=True)
    multiple = recipe.ffn_multiple or width_multiple(full)
    rounded = {max(multiple, round(full * fraction / multiple) * multiple) for fraction in recipe.ffn_fractions}
    return sorted((size for size in rounded if size < full), reverse=True)


def kv_head_counts(full: int, num_heads: int, recipe: LibraryRecipe) -> list[int]:
    """The numbers of KV heads to try, most first; each divides the number of query heads."""
    if recipe.kv_heads is not None:
        return sorted({k for k in recipe.kv_heads if k < full and num_heads % k == 0}, reverse=True)
    counts, count = [], full
    while count > 1:
        count = max(k for k in range(1, count // 2 + 1) if num_heads % k == 0)
        counts.append(count)
    return counts


def head_group_counts(full: int, shared: bool, num_heads: int, recipe: LibraryRecipe) -> list[int]:
    """The numbers of KV heads to try where their query heads go with them, most first: any will do.

    Args:
        full: what the parent has.
        shared: whether several query heads share one.
        num_heads: the parent's query heads.
        recipe: says which.
    """
    if not shared:
        return fractions_of(full, recipe.head_fractions)
    if recipe.kv_heads is not None:
        return sorted({k for k in recipe.kv_heads if k < full}, reverse=True)
    counts = {*kv_head_counts(full, num_heads, recipe), *fractions_of(full, recipe.head_fractions)}
    return sorted(counts, reverse=True)


def why_no_linear(descriptor: type[ModelDescriptor], layers: Sequence[Any], subblock: str) -> list[str]:
    """For every layer why no linear map can stand in the place of its subblock; empty if one can."""
    reasons = []
    for layer in layers:
        reason = ""
        try:
            linear_records(descriptor, layer, subblock)
        except LayersmithError as error:
            reason = str(error).removeprefix(f"{descriptor.__name__}: ").removesuffix(f"; {NO_LINEAR}.")
        reasons.append(reason)
    return reasons
