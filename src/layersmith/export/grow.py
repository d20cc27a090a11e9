"""Tensors of a child filled up with zeros to the sizes of a layout, with the same function.

* A channel of an FFN or an expert whose weights are zero adds nothing; a subblock of zeros adds nothing.
* A query head adds nothing if the output projection has zeros for it. Where fewer query heads share a KV head than in
  the child, KV heads are repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layersmith.block_config import BlockConfig, FFNConfig
from layersmith.export.source import CannotExport, Heads, Source, layer_of
from layersmith.heterogeneous.quantized import write_quantized
from layersmith.model_descriptor.conventions import ATTENTION
from layersmith.quantization.rounding import Grid, Quantized
from layersmith.upstream import shapes_on_disk

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Grown:
    """A child in larger tensors.

    Attributes:
        source: The child.
        heads: Heads of the attention of every layer; None where it has none.
        blocks: Blocks of the larger layers.
        shapes: Shapes of the tensors on the disk, by name.
    """

    source: Source
    heads: tuple[Heads | None, ...]
    blocks: tuple[BlockConfig, ...]
    shapes: dict[str, Shape]

    def check(self) -> None:
        """Raises: CannotExport: A tensor does not fit."""
        for name in self.source.places:
            if name not in self.shapes:
                raise CannotExport(f"layer {layer_of(name)}: the layout has no tensor {name}")
            list(self.entries(name))
        for name in self.source.grids:
            self.grid(name)

    def write_formats(self, folder: Path) -> None:
        """Give the weights in a folder of :meth:`tensor` the child's formats of compressed-tensors."""

        def rounded(name: str) -> Quantized:
            grid = self.grid(name)
            return Quantized(grid, grid.levels(self.tensor(name).float()).bfloat16())

        write_quantized(folder, {name: grid.format for name, grid in self.source.grids.items()}, rounded)

    def grid(self, name: str) -> Grid:
        """The values that the weights of :meth:`tensor` can have.

        Raises:
            CannotExport: Input channels that share a scale in the child are in different groups of the layout.
        """
        grid, size = self.source.grids[name], self.source.grids[name].format.group
        for dim, entries in self.entries(name) if size != "tensor" else ():
            if dim == 1 and size == "channel":
                continue
            fits = grid.format.refusal(self.shapes[name]) is None
            groups = _of_groups(entries, int(size) if dim == 1 else 1) if fits else None
            if groups is None:
                raise CannotExport(
                    f"layer {layer_of(name)}: {name} has the format {grid.format}, and the layout has zeros or "
                    "repeated heads between channels that share a scale. Search with formats of smaller groups or int8"
                )
            grid = _picked(grid, dim, groups)
        return grid

    def tensor(self, name: str) -> torch.Tensor:
        """The child's tensor, filled up with zeros; all zeros where a subblock was removed."""
        if name not in self.source.places:
            return torch.zeros(self.shapes[name], dtype=self.source.dtype)
        tensor = self.source.tensor(name)
        for dim, entries in self.entries(name):
            tensor = tensor.index_select(dim, entries.clamp_min(0))
            tensor.index_fill_(dim, (entries < 0).nonzero().flatten(), 0)
        return tensor

    def entries(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Of every dimension that grows, the entry of the child's tensor for each of the layout's; -1 for a zero.

        Raises:
            CannotExport: The dimension does not consist of heads or channels.
        """
        before, after = self.source.shapes[name], self.shapes[name]
        i = layer_of(name)
        if before == after:
            return
        if i is None or len(before) != len(after):
            raise CannotExport(f"{name} has the shape {list(before)}, the layout {list(after)}")
        of_attention = any(part in name.split(".", 2)[-1] for part in ATTENTION)
        for dim, (old, new) in enumerate(zip(before, after, strict=True)):
            if old == new:
                continue
            units = list(self._heads_of(i) if of_attention else self._channels_of(i))
            found = next((e for unit in units if (e := _spread(unit, old, new)) is not None), None)
            if found is None:
                raise CannotExport(
                    f"layer {i}: {name} has the shape {list(before)} and cannot be filled up to "
                    f"{list(after)}: its entries are neither whole heads nor channels"
                )
            yield dim, found

    def _heads_of(self, i: int) -> Iterator[list[list[int]]]:
        child, grown = self.source.heads(i), self.heads[i]
        if child is None or grown is None:
            return
        queries, kv = placed(child, grown)
        yield [queries]
        yield [kv]
        yield [queries, kv, kv]

    def _channels_of(self, i: int) -> Iterator[list[list[int]]]:
        for old, new in zip(widths_of(self.source.blocks[i].ffn), widths_of(self.blocks[i].ffn), strict=True):
            if old and new and new >= old:
                channels = [*range(old), *[-1] * (new - old)]
                yield [channels]
                yield [channels, channels]


def shapes_of(source: Source, model: PreTrainedModel) -> dict[str, Shape]:
    """Shapes on the disk of a model that is to hold a child: its layers', and the child's outside them."""
    outside = {name: shape for name, shape in source.shapes.items() if layer_of(name) is None}
    return outside | {n: s for n, s in shapes_on_disk(model).items() if layer_of(n) is not None}


def of_query_heads(source: Source, queries: int) -> tuple[Heads | None, ...]:
    """Heads for every layer with ``queries`` query heads and the fewest KV heads into which the layer's fit."""

    def larger(own: Heads | None) -> Heads | None:
        if own is None or own.queries == queries:
            return own
        divisors = (kv for kv in range(own.kv, queries + 1) if queries % kv == 0)
        return next(h for kv in divisors if -(-own.group // (h := Heads(queries, kv)).group) * own.kv <= kv)

    return tuple(larger(source.heads(i)) for i in range(len(source.blocks)))


def placed(child: Heads, larger: Heads) -> tuple[list[int], list[int]]:
    """The child's query head for each of the layout's, and the child's KV head for each of the layout's; -1 for zeros.

    Each KV head of the child takes as many of the layout's as its query heads need. Repeated KV heads are equal.

    Raises:
        ValueError: The layout has too few heads.
    """
    each = -(-child.group // larger.group)
    if each * child.kv > larger.kv:
        raise ValueError(f"{child} do not fit into {larger}")
    queries, kv = [-1] * larger.queries, [-1] * larger.kv
    for k in range(child.kv):
        kv[k * each : (k + 1) * each] = [k] * each
        for j in range(child.group):
            queries[k * each * larger.group + j] = k * child.group + j
    return queries, kv


def _spread(unit: Sequence[list[int]], old: int, new: int) -> torch.Tensor | None:
    """The entries of a dimension that consists of segments of units; None if the lengths do not match.

    Args:
        unit: Of every segment, the child's unit for each of the layout's; -1 for zeros.
        old: Length of the child's dimension.
        new: Length of the layout's dimension.
    """
    counts = [max(segment) + 1 for segment in unit]
    size = new // sum(map(len, unit))
    if size == 0 or size * sum(map(len, unit)) != new or size * sum(counts) != old:
        return None
    entries, start = [], 0
    for segment, count in zip(unit, counts, strict=True):
        for u in segment:
            entries += [-1] * size if u < 0 else list(range(start + u * size, start + (u + 1) * size))
        start += count * size
    return torch.tensor(entries)


def _of_groups(entries: torch.Tensor, size: int) -> torch.Tensor | None:
    """The child's group for each group of ``size`` entries, -1 where all are zeros; None if one has parts of two."""
    groups = entries.where(entries < 0, entries // size).view(-1, size)
    largest = groups.amax(1, keepdim=True)
    return largest.flatten() if ((groups < 0) | (groups == largest)).all() else None


def _picked(grid: Grid, dim: int, entries: torch.Tensor) -> Grid:
    """A grid with these rows or groups of another; those of zeros, which every grid has, get a scale of 1."""

    def pick(part: torch.Tensor, fill: float) -> torch.Tensor:
        return part.index_select(dim, entries.clamp_min(0)).index_fill_(dim, (entries < 0).nonzero().flatten(), fill)

    stored = {n: part if n == "global_scale" else pick(part, 0) for n, part in grid.stored.items()}
    offset = None if grid.offset is None else pick(grid.offset, 0)
    return replace(grid, scale=pick(grid.scale, 1), offset=offset, stored=stored)


def widths_of(ffn: FFNConfig) -> tuple[int | None, int | None, int | None]:
    """Width of a dense FFN, of experts and of shared experts."""
    moe: Any = ffn.moe
    return (
        ffn.intermediate_size,
        moe.expert_intermediate_dim if moe else None,
        moe.shared_expert_intermediate_dim if moe else None,
    )
