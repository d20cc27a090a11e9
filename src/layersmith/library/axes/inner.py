"""Finds the axes of sizes inside a subblock, and the possible orders of their units in the weights.

A unit is one number of the size in every weight that the size governs: an entry of the heads of queries and keys or of
values, a channel of a rank or of a latent. Where a rotary embedding turns two entries together, they are one unit. The
entries that each group of heads keeps may differ; a rotary embedding, or a norm of every head, makes all keep the same.

Shapes: P the size, C groups of heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from layersmith.block_config import BlockConfig
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import REST, InnerAxis, Layout, NoAxis, Segment, WeightAxis, combined_layouts
from layersmith.library.axes.experiments import Governed, ModelExperiments, Resized, other_size
from layersmith.modeling_layersmith import KEPT_ENTRIES

# Segments of the entries of one head, and the number of entries that are one unit.
_Head = tuple[tuple[Segment, ...], int]


def inner_size_of(model: ModelExperiments, i: int, name: str) -> int | None:
    """The size of a layer that an attribute sets; None if the subblock is not there."""
    inner, size = model.described.layer_facts(i).inner_sizes.get(name, (None, 0))
    if inner is None:
        return None
    config = model.blocks[i].subblock(inner.subblock)
    if config.no_op or config.replace_with_linear:
        return None
    return (config.inner_sizes or {}).get(name, size)


def find_inner(model: ModelExperiments, i: int, name: str) -> InnerAxis:
    """The axis of one size inside a subblock of layer ``i``; orders of units are the first guess.

    Raises:
        NoAxis: The size cannot change.
    """
    size, (inner, _) = inner_size_of(model, i, name), model.described.layer_facts(i).inner_sizes[name]
    if size is None or size < 2:
        raise NoAxis("there is nothing to make smaller")

    def other(block: BlockConfig, j: int, larger: bool) -> Resized | None:
        before = inner_size_of(model, j, name)
        if before is None or before < 2:
            return None
        after = other_size(before, larger)
        return Resized(inner_alternative(j, inner.subblock, name, after).block_config(block), after, before)

    governed = model.governed(model.experiment(f"inner {name}", other), i)
    if not governed:
        raise NoAxis(f"{name} changes no weight of the layer")
    lengths = {f"{s.module}.{KEPT_ENTRIES}{s.argument}": size * s.length // s.of for s in inner.shared}
    places = tuple(WeightAxis(kept, 0, (Segment("channels", length),)) for kept, length in lengths.items())
    readers = tuple(g.name for g in governed if g.name.endswith(".weight") and model.input_dim(i, g.name) == g.dim)
    attention = model.blocks[i].attention
    heads = attention.num_attention_heads or model.described.layer_facts(i).num_query_heads
    groups = [
        n
        for n in dict.fromkeys((heads, attention.num_key_value_heads))
        if n and n > 1 and all(g.unit % n == 0 for g in governed)
    ]
    return InnerAxis(
        name=name,
        subblock=inner.subblock,
        size=size,
        weights=tuple(_axis(g) for g in governed),
        readers=readers,
        places=places,
        groups=max(groups, default=1),
        role=_role(model, i, governed, readers) if inner.subblock == "attention" else "latent width",
    )


def _role(model: ModelExperiments, i: int, governed: Sequence[Governed], readers: Sequence[str]) -> str:
    matrices = [g for g in governed if len(model.base[i][g.name]) > 1]
    if all(g.unit == 1 for g in matrices):
        return "rank"
    read = sum(g.unit for g in matrices if g.name in readers)
    if not read:
        return "key head size"
    return "head size" if sum(g.unit for g in matrices) > 2 * read else "value head size"


def inner_alternative(layer: int, subblock: str, name: str, size: int) -> Alternative:
    """The alternative with a smaller size inside a subblock."""
    return Alternative(layer, subblock, f"{subblock}_size", name, size)


def _axis(g: Governed) -> WeightAxis:
    return WeightAxis(g.name, g.dim, (*[Segment("channels")] * g.unit, *([Segment(REST, g.rest)] if g.rest else [])))


# ---------------------------------------------------------------------------------------------- orders


def inner_guesses(axis: InnerAxis) -> Iterator[InnerAxis]:
    """Every possible order of the units; weights with the same parts have the same order."""
    lengths = [sum(s.unit for s in w.segments) for w in axis.places]
    heads: Sequence[_Head] = [((Segment("channels"),), 1)]
    if lengths:
        heads = list(_turned_heads(axis.size, max(lengths)))
    for groups in dict.fromkeys((1,) if axis.places else (axis.groups, 1)):
        for head, step in heads:
            units = axis.size // step
            layouts = partial(_layouts, head=head, groups=groups)
            for weights in combined_layouts(axis.weights, _parts, layouts):
                for places in combined_layouts(axis.places, _length, partial(_place_layouts, units=units)):
                    yield dataclasses.replace(axis, weights=weights, places=places, step=step, groups=groups)


def _parts(w: WeightAxis) -> tuple[int, int]:
    """The number of heads in a weight, and of entries that belong to none."""
    return sum(s.unit for s in w.segments if s.part != REST), sum(s.unit for s in w.segments if s.part == REST)


def _length(w: WeightAxis) -> int:
    return sum(s.unit for s in w.segments)


def _turned_heads(size: int, length: int) -> Iterator[_Head]:
    """The entries of a head of which a rotary embedding turns all, or the first or last: in halves, or in neighbours.

    Args:
        size: P.
        length: Entries of the embedding: one for each entry that turns, or one for two.
    """
    halves, neighbours = (Segment("channels"), Segment("channels")), (Segment("channels", 2),)
    for turned in dict.fromkeys((length, 2 * length)):
        units, odd = divmod(turned, 2)
        if odd or not units or turned > size or (size - turned) % units:
            continue
        others = (Segment("channels", (size - turned) // units),) if size > turned else ()
        for pairs in (halves, neighbours):
            for head in dict.fromkeys(((*pairs, *others), (*others, *pairs))):
                yield head, size // units


def _layouts(w: WeightAxis, head: tuple[Segment, ...], groups: int) -> list[Layout]:
    """Heads before or after entries of no head, or each with a share of these; for all groups, or group by group."""
    count, rest = _parts(w)
    in_group = count // groups
    heads = head * in_group
    if not rest:
        return [(heads, groups > 1)]
    layouts: list[Layout] = []
    if rest % groups == 0:
        share = (Segment(REST, rest // groups),)
        layouts += [((*heads, *share), groups > 1), ((*share, *heads), groups > 1)]
    if rest % count == 0 and in_group > 1:
        share = (Segment(REST, rest // count),)
        layouts = [((*share, *head) * in_group, groups > 1), ((*head, *share) * in_group, groups > 1), *layouts]
    return layouts


def _place_layouts(w: WeightAxis, units: int) -> list[Layout]:
    each, odd = divmod(_length(w), units)
    if odd or each not in (1, 2):
        return []
    return [((Segment("channels"),) * each, False), *([((Segment("channels", 2),), False)] if each == 2 else [])]
