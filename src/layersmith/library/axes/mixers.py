"""Finds the axes of Mamba and linear-attention mixers, and the possible orders of the parts of their fused weights.

The heads of one group share the weights that write to the state and read it, as query heads share a KV head. A mixer's
heads are therefore a ``HeadsAxis`` whose KV heads are the groups and whose query heads are the heads.

Shapes: H heads, P size of a head, N size of the state, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter

from layersmith.block_config import BlockConfig, MambaConfig
from layersmith.library.axes.axis import (
    REST,
    HeadsAxis,
    HeadSizeAxis,
    Layout,
    NoAxis,
    Segment,
    StateAxis,
    WeightAxis,
    combined_layouts,
)
from layersmith.library.axes.experiments import Governed, ModelExperiments, Resized, other_size
from layersmith.library.axes.heads import NO_READER, heads_reader, takes


def keeps_state(model: ModelExperiments, i: int) -> bool:
    """Whether a layer has a mixer with a state of fixed size."""
    attention = model.blocks[i].attention
    if attention.no_op or attention.replace_with_linear:
        return False
    return attention.mamba is not None or model.described.layer_facts(i).has_mixer


def mixer_heads(model: ModelExperiments, i: int) -> HeadsAxis:
    """The heads of the mixer of layer ``i``.

    Raises:
        NoAxis: The number of heads or groups cannot change.
    """
    mamba = _sizes(model, i)
    if mamba.num_heads == 1:
        raise NoAxis("its state has no heads")
    heads = {(g.name, g.dim): g for g in _governed(model, i, "mixer heads", _other_heads)}
    if not heads:
        raise NoAxis("no attribute of its config changes the number of its heads alone")
    count, num_heads = mamba.num_groups, mamba.num_heads
    if num_heads % count:
        raise NoAxis(f"its {num_heads} heads do not split evenly over {count} groups")
    group = num_heads // count
    of_groups = _governed(model, i, "mixer groups", partial(_other, "num_groups")) if count > 1 else []
    groups = {(g.name, g.dim): g for g in of_groups}
    heads_are_groups = count > 1 and not groups and group == 1
    weights = []
    for name, dim in dict.fromkeys([*heads, *groups]):
        pieces = [
            *(_pieces("queries", heads[name, dim].unit, mamba.head_dim) if (name, dim) in heads else ()),
            *(_pieces("kv", groups[name, dim].unit, mamba.state_dim) if (name, dim) in groups else ()),
        ]
        taken = sum(s.unit * (num_heads if s.part == "queries" else count) for s in pieces)
        if (rest := model.base[i][name][dim] - taken) < 0:
            raise NoAxis(f"the parts of {name} cannot be separated")
        weights.append(WeightAxis(name, dim, (*pieces, *([Segment(REST, rest)] if rest else []))))
    reader, head_dim = heads_reader(model, i, weights)
    if heads_are_groups:
        count = num_heads
    elif group == 1 and not groups:
        raise NoAxis("each group has one head, and no attribute of its config changes the number of groups")
    return HeadsAxis(
        size=count,
        num_heads=num_heads,
        head_dim=head_dim,
        weights=tuple(weights),
        reader=reader,
        fewer_queries=group > 1,
        fewer_groups=heads_are_groups or bool(groups),
    )


def mixer_state(model: ModelExperiments, i: int) -> StateAxis:
    """The size of the state of the mixer of layer ``i``.

    Raises:
        NoAxis: The size cannot change.
    """
    mamba = _sizes(model, i)
    if mamba.state_dim < 2:
        raise NoAxis("its state has one number already")
    weights = []
    for g in _governed(model, i, "state", partial(_other, "state_dim")):
        parts = (Segment("state"),) * g.unit
        weights.append(WeightAxis(g.name, g.dim, (*parts, Segment(REST, g.rest)) if g.rest else parts))
    if not weights:
        raise NoAxis("no attribute of its config changes the size of its state alone")
    return StateAxis(mamba.state_dim, tuple(weights))


def mixer_head_size(model: ModelExperiments, i: int) -> HeadSizeAxis:
    """The size of the heads of the mixer of layer ``i``.

    Raises:
        NoAxis: The size cannot change.
    """
    mamba = _sizes(model, i)
    if mamba.num_heads == 1:
        raise NoAxis("its state has no heads")
    if mamba.head_dim < 2:
        raise NoAxis("its heads have one entry already")
    weights = []
    for g in _governed(model, i, "mixer head size", partial(_other, "head_dim")):
        number, odd = divmod(g.unit, mamba.num_heads)
        if odd and g.unit > 1:
            raise NoAxis(f"the parts of {g.name} cannot be separated")
        parts = (Segment("entries"),) if odd else (Segment("channels"),) * number
        weights.append(WeightAxis(g.name, g.dim, (*parts, *([Segment(REST, g.rest)] if g.rest else []))))
    if not weights:
        raise NoAxis(
            "one attribute sets both the size of its heads and that of its state"
            if model.described.layer_facts(i).square_state
            else "no attribute of its config changes the size of its heads alone"
        )
    readers = [w.name for w in weights if takes(model, i, w)]
    if len(readers) != 1:
        raise NoAxis(NO_READER)
    return HeadSizeAxis(
        size=mamba.head_dim,
        num_heads=mamba.num_heads,
        groups=mamba.num_groups,
        weights=tuple(weights),
        reader=readers[0],
    )


def _sizes(model: ModelExperiments, i: int) -> MambaConfig:
    mamba = model.blocks[i].attention.mamba
    if mamba is None:
        raise NoAxis(
            model.described.layer_facts(i).mixer_problem
            or "no attribute of its config changes the heads of its mixer or the size of its state alone"
        )
    return mamba


# Gives a mixer with a smaller or a larger size, the new size and the old one; None if the size is 1.
_MixerChange = Callable[[MambaConfig, bool], tuple[MambaConfig, int, int] | None]


def _governed(model: ModelExperiments, i: int, name: str, other: _MixerChange) -> list[Governed]:
    def change(block: BlockConfig, j: int, larger: bool) -> Resized | None:
        mamba = block.attention.mamba
        resized = other(mamba, larger) if mamba is not None else None
        if resized is None:
            return None
        attention = dataclasses.replace(block.attention, mamba=resized[0])
        return Resized(dataclasses.replace(block, attention=attention), resized[1], resized[2])

    experiment = model.experiment(name, change)
    return model.governed(experiment, i) if experiment.sizes[i] is not None else []


def _other_heads(mamba: MambaConfig, larger: bool) -> tuple[MambaConfig, int, int] | None:
    if mamba.num_heads < 2:
        return None
    group = mamba.num_heads // mamba.num_groups
    other = other_size(mamba.num_heads, True) if group == 1 else other_size(group, larger) * mamba.num_groups
    return dataclasses.replace(mamba, num_heads=other), other, mamba.num_heads


def _other(field: str, mamba: MambaConfig, larger: bool) -> tuple[MambaConfig, int, int] | None:
    size = getattr(mamba, field)
    if size < 2:
        return None
    other = other_size(size, larger)
    return dataclasses.replace(mamba, **{field: other}), other, size


def _pieces(part: str, unit: int, size: int) -> tuple[Segment, ...]:
    """The entries of a unit, split into as many pieces of ``size`` as fit and then single entries."""
    wide, narrow = divmod(unit, size) if size > 1 else (0, unit)
    return (Segment(part, size),) * wide + (Segment(part),) * narrow


# ---------------------------------------------------------------------------------------------- orders


_segments = attrgetter("segments")


def head_guesses(axis: HeadsAxis) -> Iterator[HeadsAxis]:
    """Every possible order of the parts of heads and groups; weights with the same parts have the same order."""
    for weights in combined_layouts(axis.weights, _segments, lambda w: _head_layouts(w, axis.size)):
        yield dataclasses.replace(axis, weights=weights)


def state_guesses(axis: StateAxis, mamba: MambaConfig) -> Iterator[StateAxis]:
    """Every possible order of the entries of the state and those of heads."""
    for weights in combined_layouts(axis.weights, _segments, lambda w: _state_layouts(w, mamba)):
        yield dataclasses.replace(axis, weights=weights)


def head_size_guesses(axis: HeadSizeAxis) -> Iterator[HeadSizeAxis]:
    """Every possible order of the entries of heads and those of no head."""
    for weights in combined_layouts(axis.weights, _segments, lambda w: _head_size_layouts(w, axis.groups)):
        yield dataclasses.replace(axis, weights=weights)


def _head_layouts(w: WeightAxis, groups: int) -> list[Layout]:
    """Heads before or after the entries that a group shares, for all groups at once or group by group."""
    heads = [s for s in w.segments if s.part == "queries"]
    wide, narrow = [s for s in heads if s.unit > 1], [s for s in heads if s.unit == 1]
    shared = [s for s in w.segments if s.part == "kv"]
    rest = [s for s in w.segments if s.part == REST]
    rest_per_group = [Segment(REST, s.unit // groups) for s in rest]
    orders: list[Layout] = [((*wide, *shared, *rest, *narrow), False)]
    if groups > 1 and all(s.unit % groups == 0 for s in rest) and len(w.segments) > 1:
        orders.append(((*shared, *rest_per_group, *wide, *narrow), True))
        orders.append(((*wide, *shared, *rest_per_group, *narrow), True))
    orders.append(((*shared, *rest, *wide, *narrow), False))
    if len(heads) > 1 and not narrow:
        orders.append(((Segment("queries", sum(s.unit for s in wide)), *shared, *rest), False))
    return list(dict.fromkeys(orders))


def _head_size_layouts(w: WeightAxis, groups: int) -> list[Layout]:
    """Entries of heads before or after the rest, for all groups at once or group by group."""
    parts = tuple(s for s in w.segments if s.part != REST)
    rest = sum(s.unit for s in w.segments if s.part == REST)
    if not rest:
        wide = (Segment(parts[0].part, len(parts)),)
        return [(segments, False) for segments in dict.fromkeys((parts, wide))]
    orders: list[Layout] = [((*parts, Segment(REST, rest)), False), ((Segment(REST, rest), *parts), False)]
    if groups > 1 and rest % groups == 0:
        rest_per_group = Segment(REST, rest // groups)
        orders += [((rest_per_group, *parts), True), ((*parts, rest_per_group), True)]
    return orders


def _state_layouts(w: WeightAxis, mamba: MambaConfig) -> list[Layout]:
    parts = [s for s in w.segments if s.part == "state"]
    rest = sum(s.unit for s in w.segments if s.part == REST)
    if not rest:
        orders: list[list[Segment]] = [parts, [Segment("state", len(parts))]]
    else:
        # One number per head may follow the state.
        before = [b for b in dict.fromkeys((rest - mamba.num_heads, rest, 0)) if b >= 0]
        orders = [[Segment(REST, b), *parts, Segment(REST, rest - b)] for b in before]
        if (n := mamba.num_groups) > 1 and len(parts) % n == 0 and rest % n == 0:
            of_group, rest_of_group = parts[: len(parts) // n], [Segment(REST, rest // n)]
            orders += [[*of_group, *rest_of_group] * n, [*rest_of_group, *of_group] * n]
    return [(tuple(s for s in order if s.unit), False) for order in orders]
