"""Alternatives: what a subblock could be instead, and which of them there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from layersmith import schema
from layersmith.artifacts import fingerprint
from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import LayersmithError, UsageError
from layersmith.library.axes import LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import LibraryRecipe


@dataclass(frozen=True)
class Alternative:
    """Another config for one subblock of one layer.

    Attributes:
        layer: index of the decoder layer.
        subblock: ``attention`` or ``ffn``.
        kind: ``parent``, ``kv_heads``, ``ffn_width``, ``linear`` or ``no_op``.
        method: how its weights come from the parent's: ``contribution``, ``iterative``, ``pool``,
            ``least_squares``; empty where there is nothing to choose.
        size: KV heads or width that are left; 0 where that has no meaning.
    """

    layer: int
    subblock: str
    kind: str
    method: str = ""
    size: int = 0

    @property
    def name(self) -> str:
        """What it is, the same in every layer, e.g. ``"ffn 384 (iterative)"``."""
        words = {
            "parent": f"{self.subblock} as it is",
            "no_op": f"{self.subblock} no-op",
            "linear": f"{self.subblock} linear",
            "kv_heads": f"attention {self.size} KV head{'s' if self.size != 1 else ''}",
            "ffn_width": f"ffn {self.size}",
        }
        return words[self.kind] + (f" ({self.method})" if self.method in ("contribution", "iterative", "pool") else "")

    @property
    def key(self) -> str:
        """Name and layer: unique in a library."""
        return f"layer {self.layer}: {self.name}"

    @property
    def identity(self) -> str:
        """Digest of all fields."""
        return fingerprint(schema.to_data(self))

    def subblock_config(self, parent: BlockConfig) -> AttentionConfig | FFNConfig:
        """The config of the subblock with this alternative."""
        own = parent.subblock(self.subblock)
        if self.kind == "no_op":
            return dataclasses.replace(own, no_op=True, replace_with_linear=False)
        if self.kind == "linear":
            return dataclasses.replace(own, no_op=False, replace_with_linear=True)
        if self.kind == "kv_heads":
            return dataclasses.replace(cast(AttentionConfig, own), num_key_value_heads=self.size)
        if self.kind == "ffn_width":
            return dataclasses.replace(cast(FFNConfig, own), intermediate_size=self.size)
        return own

    def block_config(self, parent: BlockConfig) -> BlockConfig:
        """The parent's block with this alternative in it."""
        changes: dict[str, Any] = {self.subblock: self.subblock_config(parent)}
        return dataclasses.replace(parent, **changes)


def search_space(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: Sequence[LayerAxes],
    linear_possible: dict[str, bool],
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
        if own_axes.kv is not None:
            for size in kv_head_counts(own_axes.kv.size, own_axes.kv.num_heads, recipe):
                # Only counts that divide the parent's can be averages of equally many.
                methods = [m for m in recipe.kv_methods if m != "pool" or own_axes.kv.size % size == 0]
                found += [Alternative(i, "attention", "kv_heads", method, size) for method in methods]
        if own_axes.ffn is not None:
            sizes = ffn_widths(own_axes.ffn.size, recipe)
            found += [Alternative(i, "ffn", "ffn_width", ffn_ranking, size) for size in sizes]
        for subblock in ("attention", "ffn"):
            present = not (block.subblock(subblock).no_op or block.subblock(subblock).replace_with_linear)
            if present and subblock in recipe.linear and linear_possible[subblock]:
                found.append(Alternative(i, subblock, "linear", "least_squares"))
            supported = (
                descriptor.attn_no_op_supported() if subblock == "attention" else descriptor.mlp_no_op_supported()
            )
            if not block.subblock(subblock).no_op and subblock in recipe.no_op and supported:
                found.append(Alternative(i, subblock, "no_op"))
    return found


def ffn_widths(full: int, recipe: LibraryRecipe) -> list[int]:
    """The widths to try for an FFN of width ``full``, widest first."""
    if recipe.ffn_sizes is not None:
        return sorted({size for size in recipe.ffn_sizes if size < full}, reverse=True)
    multiple = recipe.ffn_multiple or next((m for m, least in ((256, 2048), (64, 512), (16, 64)) if full >= least), 1)
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


def linear_is_possible(descriptor: type[ModelDescriptor], layers: Sequence[Any], subblock: str) -> bool:
    """Whether one module of the layer is the subblock, so that a linear map can stand in its place."""
    from layersmith.heterogeneous.plan import linear_records

    try:
        linear_records(descriptor, layers[0], subblock)
    except LayersmithError:
        return False
    return True
