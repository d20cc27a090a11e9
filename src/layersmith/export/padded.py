"""Target ``padded``: a copy in which all layers have one shape, in the parent's stock layout, filled up with zeros.

Every tool that loads the parent loads it, without remote code; it saves nothing. The function is the child's exactly:

* A channel of an FFN or an expert whose weights are zero adds nothing; a subblock of zeros adds nothing.
* A query head adds nothing if the output projection has zeros for it. Where query heads of the copy share a KV head in
  smaller groups than the child's, KV heads are repeated.

What zeros cannot do is refused: a linear map in place of a subblock, and experts that differ in number, since a router
would choose experts of zeros. A child whose layers have one shape already becomes an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith import upstream
from layersmith.block_config import BlockConfig, FFNConfig, MoEConfig
from layersmith.export.source import CannotExport, Heads, Source, layer_of
from layersmith.export.tensors import write_shards
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.model_descriptor.conventions import ATTENTION
from layersmith.model_descriptor.stock import stock_class, stock_model
from layersmith.modeling_layersmith import with_overrides

Shape = tuple[int, ...]


def prepare(source: Source) -> Callable[[Path], None]:
    """Find the shape that all layers of the copy have.

    Returns:
        Writes the copy into a folder.

    Raises:
        CannotExport: Zeros cannot fill up a layer.
    """
    _refuse_what_zeros_cannot_do(source)
    copy = next(_copies(source), None)
    if copy is None:
        raise CannotExport(
            "--to padded: no single shape of the parent's stock layout holds all layers. Search with "
            "--set search.uniform_groups=0, so that all layers are alike."
        )
    return copy.write


def _refuse_what_zeros_cannot_do(source: Source) -> None:
    seen: dict[bool, tuple[int, MoEConfig]] = {}
    for i, block in enumerate(source.blocks):
        for subblock in SUBBLOCKS:
            if block.subblock(subblock).replace_with_linear:
                raise CannotExport(
                    f"--to padded: layer {i}: its {subblock} is one linear map, which no {subblock} of the parent's "
                    "kind with zeros computes. Search with --set library.linear=false."
                )
        moe = block.ffn.moe
        if moe is None:
            continue
        first, other = seen.setdefault(True, (i, moe))
        if (moe.num_local_experts, moe.num_experts_per_tok) != (other.num_local_experts, other.num_experts_per_tok):
            raise CannotExport(
                f"--to padded: layer {i} has {moe.num_local_experts} experts, {moe.num_experts_per_tok} per token, and "
                f"layer {first} {other.num_local_experts}, {other.num_experts_per_tok} per token; a router would "
                "choose experts of zeros. Search with --set search.uniform_groups=0, so that all layers are alike."
            )


@dataclass(frozen=True)
class _Copy:
    """A model whose layers have one shape and can hold the child.

    Attributes:
        source: The child.
        config: Config of the copy.
        heads: Heads of the attention of every layer; None where it has none.
        blocks: Blocks of the copy.
        shapes: Shapes of the copy's tensors on the disk.
    """

    source: Source
    config: PretrainedConfig
    heads: tuple[Heads | None, ...]
    blocks: tuple[BlockConfig, ...]
    shapes: dict[str, Shape]

    def write(self, folder: Path) -> None:
        """Write config and tensors."""
        self.config.architectures = [stock_class(self.config).__name__]
        self.config.save_pretrained(folder)
        some = next(iter(self.source.places))
        write_shards(folder, self.shapes, self.tensor, self.source.tensor(some).element_size())

    def tensor(self, name: str) -> torch.Tensor:
        """The child's tensor, filled up with zeros; all zeros where a subblock was removed."""
        if name not in self.source.places:
            like = next(n for n in self.source.places if layer_of(n) is not None)
            return torch.zeros(self.shapes[name], dtype=self.source.tensor(like).dtype)
        tensor = self.source.tensor(name)
        for dim, entries in self.entries(name):
            tensor = tensor.index_select(dim, entries.clamp_min(0))
            tensor.index_fill_(dim, (entries < 0).nonzero().flatten(), 0)
        return tensor

    def entries(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Of every dimension that grows, the entry of the child's tensor for each of the copy's; -1 for a zero.

        Raises:
            CannotExport: The dimension does not consist of heads or channels.
        """
        before, after = self.source.shapes[name], self.shapes[name]
        i = layer_of(name)
        if before == after:
            return
        if i is None or len(before) != len(after):
            raise CannotExport(f"--to padded: {name} has the shape {list(before)}, the stock layout {list(after)}.")
        of_attention = any(part in name.split(".", 2)[-1] for part in ATTENTION)
        for dim, (old, new) in enumerate(zip(before, after, strict=True)):
            if old == new:
                continue
            units = list(self._heads_of(i) if of_attention else self._channels_of(i))
            found = next((e for unit in units if (e := _spread(unit, old, new)) is not None), None)
            if found is None:
                raise CannotExport(
                    f"--to padded: layer {i}: {name} has the shape {list(before)} and cannot be filled up to "
                    f"{list(after)}: its entries are neither whole heads nor channels."
                )
            yield dim, found

    def _heads_of(self, i: int) -> Iterator[list[list[int]]]:
        child, copy = self.source.heads(i), self.heads[i]
        if child is None or copy is None:
            return
        queries, kv = placed(child, copy)
        yield [queries]
        yield [kv]
        yield [queries, kv, kv]

    def _channels_of(self, i: int) -> Iterator[list[list[int]]]:
        for old, new in zip(_widths(self.source.blocks[i].ffn), _widths(self.blocks[i].ffn), strict=True):
            if old and new and new >= old:
                channels = [*range(old), *[-1] * (new - old)]
                yield [channels]
                yield [channels, channels]


def placed(child: Heads, copy: Heads) -> tuple[list[int], list[int]]:
    """The child's query head for each of the copy's, and the child's KV head for each of the copy's; -1 for zeros.

    Each KV head of the child takes as many of the copy's as its query heads need. Repeated KV heads are equal.

    Raises:
        ValueError: The copy has too few heads.
    """
    each = -(-child.group // copy.group)
    if each * child.kv > copy.kv:
        raise ValueError(f"{child} do not fit into {copy}")
    queries, kv = [-1] * copy.queries, [-1] * copy.kv
    for k in range(child.kv):
        kv[k * each : (k + 1) * each] = [k] * each
        for j in range(child.group):
            queries[k * each * copy.group + j] = k * child.group + j
    return queries, kv


def _spread(unit: Sequence[list[int]], old: int, new: int) -> torch.Tensor | None:
    """The entries of a dimension that consists of segments of units; None if the lengths do not match.

    Args:
        unit: Of every segment, the child's unit for each of the copy's; -1 for zeros.
        old: Length of the child's dimension.
        new: Length of the copy's dimension.
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


# ---------------------------------------------------------------------------------------------- the shape of all layers


def _copies(source: Source) -> Iterator[_Copy]:
    """Copies that hold every layer: with the fewest heads first, with the parent's last."""
    own = [h for i in range(len(source.blocks)) if (h := source.heads(i)) is not None]
    for tight in (True, False):
        heads = {_kind(b): _common_heads(source, _kind(b), own, tight) for b in source.of_parent}
        blocks = tuple(_uniform_block(source, i, heads[_kind(b)]) for i, b in enumerate(source.of_parent))
        config = source.parent_config
        for block in dict.fromkeys(blocks):
            config = with_overrides(config, source.descriptor.block_config_to_layer_overrides(block))
        model = None
        with foreign_code("does a model of this shape build?", refusal_is_answer=True) as attempt:
            model = attempt.call(stock_model, config)
        if model is None:
            continue
        of_layers = tuple(heads[_kind(b)] if source.of_parent[i] else None for i, b in enumerate(source.of_parent))
        outside = {n: s for n, s in source.shapes.items() if layer_of(n) is None}
        inside = {n: s for n, s in upstream.shapes_on_disk(model).items() if layer_of(n) is not None}
        copy = _Copy(source, config, of_layers, blocks, outside | inside)
        if extra := sorted(source.places.keys() - copy.shapes.keys()):
            raise CannotExport(f"--to padded: layer {layer_of(extra[0])}: the stock layout has no tensor {extra[0]}.")
        try:
            for name in source.places:
                list(copy.entries(name))
        except (CannotExport, ValueError):
            if not tight:
                raise
            continue
        yield copy


def _kind(block: BlockConfig) -> tuple[bool, bool]:
    return block.ffn.moe is not None, block.attention.mamba is not None


def _common_heads(source: Source, kind: tuple[bool, bool], own: Sequence[Heads], tight: bool) -> Heads | None:
    """Heads that all layers fit into: the fewest KV heads for the most query heads, or the parent's."""
    of_parent = [
        replace(source, blocks=source.of_parent).heads(i) for i, b in enumerate(source.of_parent) if _kind(b) == kind
    ]
    parent = next((h for h in of_parent if h is not None), None)
    if parent is None or not tight or not own:
        return parent
    queries = max(h.queries for h in own)
    choices = [Heads(queries, kv) for kv in range(1, queries + 1) if queries % kv == 0 and kv <= parent.kv]
    return next((c for c in choices if all(-(-h.group // c.group) * h.kv <= c.kv for h in own)), parent)


def _uniform_block(source: Source, i: int, heads: Heads | None) -> BlockConfig:
    """The block of layer ``i`` of the copy: the widest of its kind."""
    alike = [j for j, b in enumerate(source.of_parent) if _kind(b) == _kind(source.of_parent[i])]
    parent = source.of_parent[i]
    attention = parent.attention
    if heads is not None and attention.num_key_value_heads is not None:
        attention = replace(attention, num_key_value_heads=heads.kv)
    of_parent = replace(source, blocks=source.of_parent).heads(i)
    if heads is not None and of_parent is not None and heads.queries != of_parent.queries:
        attention = replace(attention, num_attention_heads=heads.queries)
    present = [f for j in alike if not (f := source.blocks[j].ffn).no_op] or [parent.ffn]
    widths = [max(values) if all(values) else None for values in zip(*map(_widths, present), strict=True)]
    ffn = parent.ffn
    if ffn.moe is not None:
        moe = next((f.moe for f in present if f.moe is not None), ffn.moe)
        moe = replace(moe, expert_intermediate_dim=widths[1], shared_expert_intermediate_dim=widths[2])
        ffn = replace(ffn, moe=moe)
    elif widths[0] is not None:
        ffn = replace(ffn, intermediate_size=widths[0])
    return BlockConfig(attention, ffn)


def _widths(ffn: FFNConfig) -> tuple[int | None, int | None, int | None]:
    """Width of a dense FFN, of experts and of shared experts."""
    moe: Any = ffn.moe
    return (
        ffn.intermediate_size,
        moe.expert_intermediate_dim if moe else None,
        moe.shared_expert_intermediate_dim if moe else None,
    )
