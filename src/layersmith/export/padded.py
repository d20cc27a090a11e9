"""Target ``padded``: a copy in which all layers have one shape, in the parent's stock layout, filled up with zeros.

Every tool that loads the parent loads it, without remote code; it saves nothing. :mod:`layersmith.export.grow` says why
the function is the child's exactly. What zeros cannot do is refused: a linear map in place of a subblock, and experts
that differ in number, since a router would choose experts of zeros. A child whose layers have one shape already becomes
an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig, MoEConfig
from layersmith.export.grow import Grown, shapes_of, widths_of
from layersmith.export.source import CannotExport, Heads, Source
from layersmith.export.tensors import write_shards
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.model_descriptor.stock import stock_class, stock_model
from layersmith.modeling_layersmith import with_overrides


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
    seen: list[tuple[int, MoEConfig]] = []
    for i, block in enumerate(source.blocks):
        for subblock in SUBBLOCKS:
            if block.subblock(subblock).replace_with_linear:
                raise CannotExport(
                    f"--to padded: layer {i}: its {subblock} is one linear map, which no {subblock} of the parent's "
                    "kind with zeros computes. Search with --set library.linear=[]."
                )
        moe = block.ffn.moe
        if moe is None:
            continue
        seen.append((i, moe))
        first, other = seen[0]
        if (moe.num_local_experts, moe.num_experts_per_tok) != (other.num_local_experts, other.num_experts_per_tok):
            raise CannotExport(
                f"--to padded: layer {i} has {moe.num_local_experts} experts, {moe.num_experts_per_tok} per token, and "
                f"layer {first} {other.num_local_experts}, {other.num_experts_per_tok} per token; a router would "
                "choose experts of zeros. Search with --set search.uniform_groups=0, so that all layers are alike."
            )


@dataclass(frozen=True)
class _Copy:
    """A config of a stock model that can hold the child, and the child in its tensors."""

    config: PretrainedConfig
    grown: Grown

    def write(self, folder: Path) -> None:
        """Write config and tensors."""
        self.config.architectures = [stock_class(self.config).__name__]
        self.config.save_pretrained(folder)
        write_shards(folder, self.grown.shapes, self.grown.tensor, self.grown.source.dtype.itemsize)
        self.grown.write_formats(folder)


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
        grown = Grown(source, tuple(heads[_kind(b)] for b in source.of_parent), blocks, shapes_of(source, model))
        try:
            grown.check()
        except (CannotExport, ValueError) as reason:
            if not tight:
                raise CannotExport(f"--to padded: {reason}.") from reason
            continue
        yield _Copy(config, grown)


def _kind(block: BlockConfig) -> tuple[bool, bool]:
    return block.ffn.moe is not None, block.attention.mamba is not None


def _common_heads(source: Source, kind: tuple[bool, bool], own: Sequence[Heads], tight: bool) -> Heads | None:
    """Heads that all layers fit into: the fewest KV heads for the most query heads, or the parent's."""
    of_parent = [source.parent.heads(i) for i, b in enumerate(source.of_parent) if _kind(b) == kind]
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
    of_parent = source.parent.heads(i)
    if heads is not None and of_parent is not None and heads.queries != of_parent.queries:
        attention = replace(attention, num_attention_heads=heads.queries)
    present = [f for j in alike if not (f := source.blocks[j].ffn).no_op] or [parent.ffn]
    widths = [max(values) if all(values) else None for values in zip(*map(widths_of, present), strict=True)]
    ffn = parent.ffn
    if ffn.moe is not None:
        moe = next((f.moe for f in present if f.moe is not None), ffn.moe)
        moe = replace(moe, expert_intermediate_dim=widths[1], shared_expert_intermediate_dim=widths[2])
        ffn = replace(ffn, moe=moe)
    elif widths[0] is not None:
        ffn = replace(ffn, intermediate_size=widths[0])
    return BlockConfig(attention, ffn)
