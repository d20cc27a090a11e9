"""The alternatives that a recipe requests: the sizes of every axis of every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.errors import LayersmithError, UsageError, some_of
from layersmith.heterogeneous.plan import NO_LINEAR, SUBBLOCKS, linear_records
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import HeadsAxis, LayerAxes
from layersmith.library.axes.inner import inner_alternative
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
    """Every alternative of every layer, the parent's subblocks first.

    Raises:
        UsageError: The recipe keeps a layer that the model does not have.
    """
    for layer in recipe.keep_layers:
        if not 0 <= layer < len(blocks):
            raise UsageError(f"recipe library.keep_layers: there is no layer {layer}; the model has {len(blocks)}.")
    removable = {"attention": descriptor.attn_no_op_supported(), "ffn": descriptor.mlp_no_op_supported()}
    alternatives: list[Alternative] = []
    for i, (block, layer_axes) in enumerate(zip(blocks, axes, strict=True)):
        alternatives += [Alternative(i, "attention", "parent"), Alternative(i, "ffn", "parent")]
        if i in recipe.keep_layers:
            continue
        alternatives += _of_heads(i, layer_axes.kv, recipe) if layer_axes.kv is not None else []
        alternatives += _of_mixer(i, layer_axes, recipe) if recipe.mixers else []
        if layer_axes.window and recipe.windows:
            alternatives.append(Alternative(i, "attention", "window", layer_axes.window))
        alternatives += _of_ffn(i, block, layer_axes, recipe, ffn_ranking)
        alternatives += _of_inner(i, layer_axes, recipe) if recipe.inner_sizes else []
        for subblock in SUBBLOCKS:
            config = block.subblock(subblock)
            if config.no_op:
                continue
            if not config.replace_with_linear and subblock in recipe.linear and not no_linear[subblock][i]:
                alternatives.append(Alternative(i, subblock, "linear", "least_squares"))
            if subblock in recipe.no_op and removable[subblock]:
                alternatives.append(Alternative(i, subblock, "no_op"))
    _check_sizes(alternatives, axes, recipe)
    return alternatives


def _check_sizes(alternatives: Sequence[Alternative], axes: Sequence[LayerAxes], recipe: LibraryRecipe) -> None:
    """Raises: UsageError: The recipe names a size that no layer can have."""
    if len(set(recipe.keep_layers)) == len(axes):
        return
    offered = {
        kind: {a.size for a in alternatives if a.kind == kind} for kind in ("ffn_width", "kv_heads", "head_groups")
    }
    asked = {
        "ffn_sizes": set(recipe.ffn_sizes or ()) - offered["ffn_width"],
        "kv_heads": set(recipe.kv_heads or ()) - offered["kv_heads"] - offered["head_groups"],
    }
    for name, sizes in asked.items():
        if sizes:
            raise UsageError(f"recipe library.{name}: no layer can be cut to {some_of(sorted(sizes))}.")
    has_widths = any(layer.ffn is not None for layer in axes) and (recipe.ffn_sizes or recipe.ffn_fractions)
    if recipe.ffn_multiple is not None and has_widths and not offered["ffn_width"]:
        raise UsageError(f"recipe library.ffn_multiple: no FFN is wider than {recipe.ffn_multiple}.")


def _of_heads(i: int, axis: HeadsAxis, recipe: LibraryRecipe) -> Iterator[Alternative]:
    group, unit = axis.num_heads // axis.size, axis.together
    if recipe.kv_heads is not None:
        recipe = dataclasses.replace(recipe, kv_heads=tuple(k // unit for k in recipe.kv_heads if k % unit == 0))
    if axis.fewer_kv:
        for size in kv_head_counts(axis.size, axis.num_heads, recipe):
            for method in recipe.kv_methods:
                # Averages of equally many heads need a count that divides the parent's.
                if method != "pool" or axis.size % size == 0:
                    yield Alternative(i, "attention", "kv_heads", method, size * unit)
    if axis.fewer_groups and recipe.query_heads:
        for k in head_group_counts(axis.size, axis.fewer_kv, axis.num_heads, recipe):
            yield _ranked(i, "attention", "head_groups", k * unit, k * group * unit)
    if axis.fewer_queries and recipe.query_heads:
        for n in fractions_of(axis.num_heads // axis.shares, recipe.head_fractions):
            yield _ranked(i, "attention", "query_heads", n * axis.shares * unit)


def _ranked(i: int, subblock: str, kind: str, size: int, query_heads: int = 0) -> Alternative:
    return Alternative(layer=i, subblock=subblock, kind=kind, method="contribution", size=size, query_heads=query_heads)


def _of_mixer(i: int, axes: LayerAxes, recipe: LibraryRecipe) -> Iterator[Alternative]:
    if axes.mixer is not None:
        groups, group = axes.mixer.size, axes.mixer.num_heads // axes.mixer.size
        if axes.mixer.fewer_queries:
            for n in fractions_of(group, recipe.head_fractions):
                yield _ranked(i, "attention", "mixer_heads", n * groups)
        if axes.mixer.fewer_groups:
            for n in fractions_of(groups, recipe.head_fractions):
                yield _ranked(i, "attention", "mixer_groups", n, n * group)
    for kind, axis in (("mixer_head_size", axes.mixer_size), ("state_size", axes.state)):
        if axis is not None:
            for n in rounded(axis.size, recipe.head_fractions, width_multiple(axis.size)):
                yield _ranked(i, "attention", kind, n)


def _of_inner(i: int, axes: LayerAxes, recipe: LibraryRecipe) -> Iterator[Alternative]:
    for axis in axes.inner:
        usual = width_multiple(axis.size)
        multiple = math.lcm(axis.step, usual if axis.subblock == "ffn" else usual // 2 or 1)
        for n in rounded(axis.size, recipe.head_fractions, multiple):
            yield inner_alternative(i, axis.subblock, axis.name, n)


def _of_ffn(
    i: int, block: BlockConfig, axes: LayerAxes, recipe: LibraryRecipe, ffn_ranking: str
) -> Iterator[Alternative]:
    moe = block.ffn.moe
    if axes.ffn is not None and moe is None:
        for size in ffn_widths(axes.ffn.size, recipe):
            yield Alternative(i, "ffn", "ffn_width", ffn_ranking, size)
    if axes.experts is not None:
        in_group, least = axes.experts.size // axes.experts.groups, 1 if axes.experts.groups == 1 else 2
        for count in fractions_of(in_group, recipe.expert_fractions):
            size = count * axes.experts.groups
            if count >= least and size >= axes.experts.per_token:
                yield Alternative(i, "ffn", "experts", "iterative", size)
        if axes.experts.fewer_per_token:
            for size in fractions_of(axes.experts.per_token, recipe.expert_fractions):
                yield Alternative(i, "ffn", "experts_per_token", size=size)
    for kind, axis in (("expert_width", axes.ffn if moe is not None else None), ("shared_width", axes.shared)):
        if axis is not None:
            for width in rounded(axis.size, recipe.expert_fractions, recipe.ffn_multiple or width_multiple(axis.size)):
                yield _ranked(i, "ffn", kind, width)


def fractions_of(full: int, fractions: Sequence[float]) -> list[int]:
    """The numbers from 1 to ``full - 1`` that are these fractions of ``full``, largest first."""
    return sorted({n for f in fractions if 1 <= (n := round(full * f)) < full}, reverse=True)


def rounded(full: int, fractions: Sequence[float], multiple: int) -> list[int]:
    """The multiples below ``full`` that are nearest to these fractions of it, largest first."""
    sizes = {max(multiple, round(full * f / multiple) * multiple) for f in fractions}
    return sorted((size for size in sizes if size < full), reverse=True)


def width_multiple(full: int) -> int:
    """The number whose multiples are the widths to try for an FFN of width ``full``."""
    return next((m for m, least in ((256, 2048), (64, 512), (16, 64), (4, 16)) if full >= least), 1)


def ffn_widths(full: int, recipe: LibraryRecipe) -> list[int]:
    """The widths to try for an FFN of width ``full``, widest first."""
    if recipe.ffn_sizes is not None:
        return sorted({size for size in recipe.ffn_sizes if size < full}, reverse=True)
    return rounded(full, recipe.ffn_fractions, recipe.ffn_multiple or width_multiple(full))


def kv_head_counts(full: int, num_heads: int, recipe: LibraryRecipe) -> list[int]:
    """The numbers of KV heads to try, largest first; each divides the number of query heads."""
    if recipe.kv_heads is not None:
        return sorted({k for k in recipe.kv_heads if k < full and num_heads % k == 0}, reverse=True)
    counts, count = [], full
    while count > 1:
        count = max(k for k in range(1, count // 2 + 1) if num_heads % k == 0)
        counts.append(count)
    return counts


def head_group_counts(full: int, shared: bool, num_heads: int, recipe: LibraryRecipe) -> list[int]:
    """The numbers of KV heads to try where their query heads are removed too, largest first; any number is valid.

    Args:
        full: The parent's number of KV heads.
        shared: Whether several query heads share one.
        num_heads: The parent's number of query heads.
        recipe: Gives the numbers, or fractions of the parent's.
    """
    if not shared:
        return fractions_of(full, recipe.head_fractions)
    if recipe.kv_heads is not None:
        return sorted({k for k in recipe.kv_heads if k < full}, reverse=True)
    counts = {*kv_head_counts(full, num_heads, recipe), *fractions_of(full, recipe.head_fractions)}
    return sorted(counts, reverse=True)


def why_no_linear(descriptor: type[ModelDescriptor], layers: Sequence[Any], subblock: str) -> list[str]:
    """For every layer, why a linear map cannot replace its subblock; empty if it can."""
    reasons = []
    for layer in layers:
        reason = ""
        try:
            linear_records(descriptor, layer, subblock)
        except LayersmithError as error:
            reason = str(error).removeprefix(f"{descriptor.__name__}: ").removesuffix(f"; {NO_LINEAR}.")
        reasons.append(reason)
    return reasons
