"""Finds the widths of FFNs and of experts: bundles of weights that share their channels.

Shapes: F intermediate channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from layersmith.library.axes.axis import Bundle, NoAxis, WidthAxis
from layersmith.library.axes.experiments import (
    Governed,
    ModelExperiments,
    SizeExperiment,
    other_ffn_width,
    other_shared_width,
)
from layersmith.library.axes.experts import members_of
from layersmith.library.axes.layers import input_dim


def find_width(model: ModelExperiments, i: int) -> WidthAxis:
    """The width of a dense FFN, or of routed experts.

    Raises:
        NoAxis: The width cannot change.
    """
    block = model.blocks[i]
    if block.ffn.no_op or block.ffn.replace_with_linear:
        raise NoAxis("there is no FFN to narrow")
    moe = block.ffn.moe
    size = block.ffn.intermediate_size if moe is None else moe.expert_intermediate_dim
    if size is None:
        raise NoAxis("its config has no width")
    if size < 2:
        raise NoAxis("it has one channel already")
    return _width_axis(model, i, model.experiment("width", other_ffn_width), size)


def find_shared_width(model: ModelExperiments, i: int) -> WidthAxis:
    """The width of shared experts.

    Raises:
        NoAxis: The width cannot change.
    """
    moe = model.blocks[i].ffn.moe
    assert moe is not None
    assert moe.shared_expert_intermediate_dim is not None
    experiment = model.experiment("shared", other_shared_width)
    return _width_axis(model, i, experiment, moe.shared_expert_intermediate_dim)


def has_shared_width(model: ModelExperiments, i: int) -> bool:
    """Whether shared experts have a width that can differ from that of the others."""
    moe = model.blocks[i].ffn.moe
    if moe is None or (moe.shared_expert_intermediate_dim or 0) < 2:
        return False
    shared, routed = model.experiment("shared", other_shared_width), model.experiment("width", other_ffn_width)
    if shared.problem or not shared.effects[i]:
        return False
    changed = shared.effects[i].shapes.keys() | shared.effects[i].came_or_went
    if routed.problem:
        return True
    return not changed & (routed.effects[i].shapes.keys() | routed.effects[i].came_or_went)


def _width_axis(model: ModelExperiments, i: int, made: SizeExperiment, size: int) -> WidthAxis:
    governed = model.governed(made, i)
    if not governed:
        raise NoAxis("its width changes no weight of the layer")
    experts = members_of(model, i)
    stacked = [g for g in governed if g.name in experts.stacks and g.name not in experts.flat]
    flat = [
        dataclasses.replace(g, dim=1, unit=g.unit // experts.count)
        for g in governed
        if g.name in experts.flat and g.dim == 0 and g.unit % experts.count == 0
    ]
    listed = [g for g in governed if experts.number_of(g.name) is not None]
    single = [g for g in governed if g not in stacked and g not in listed and g.name not in experts.flat]
    # Stacks of another number of matrices, e.g. shared experts: every matrix of a stack has separate channels.
    others: dict[int, list[Governed]] = {}
    for g in [g for g in single if len(model.base[i][g.name]) == 3 and g.dim > 0]:
        others.setdefault(model.base[i][g.name][0], []).append(g)
        single.remove(g)
    bundles = []
    if stacked:
        bundles.append(_bundle(size, stacked, experts.count, stacked=True))
    if flat:
        bundles.append(dataclasses.replace(_bundle(size, flat, experts.count, stacked=True), flat=True))
    if listed:
        first = [g for g in listed if experts.number_of(g.name) == 0]
        templates = [dataclasses.replace(g, name=experts.template(g.name)) for g in first]
        bundles.append(_bundle(size, templates, experts.count, stacked=False))
    if single:
        bundles.append(_bundle(size, single, 0, stacked=False))
    bundles += [_bundle(size, members, number, stacked=True) for number, members in others.items()]
    return WidthAxis(size, tuple(_with_reader(model, i, bundle) for bundle in bundles))


def _bundle(size: int, governed: Sequence[Governed], members: int, stacked: bool) -> Bundle:
    """Weights with the same channels; if all have several entries per channel, each entry counts as a channel."""
    least = min(g.unit for g in governed)
    weights = tuple(dataclasses.replace(g, unit=g.unit // least).axis("channels") for g in governed)
    return Bundle(size=size * least, weights=weights, members=members, stacked=stacked)


def _with_reader(model: ModelExperiments, i: int, bundle: Bundle) -> Bundle:
    """The bundle with its reader, if exactly one weight is known to have the channels as its input."""
    readers = []
    for w in bundle.weights:
        name = w.name.format(0)
        if bundle.stacked or len(model.base[i][name]) != 2 or not name.endswith(".weight"):
            continue
        if input_dim(model.skeleton[i], name) == w.dim:
            readers.append(w)
    return dataclasses.replace(bundle, reader=readers[0].name) if len(readers) == 1 else bundle
