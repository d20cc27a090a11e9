"""Which alternatives a recipe asks for: the sizes of every axis of every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.errors import LayersmithError, UsageError
from layersmith.heterogeneous.plan import NO_LINEAR, linear_records
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import HeadsAxis, LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import LibraryRecipe


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
