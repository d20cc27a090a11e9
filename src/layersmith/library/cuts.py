"""How each kind of alternative is cut from the parent: its weights, the removed units, the weight that reads them.

The functions take a layer of the parent with the ranking of its units, and the alternative; the table of kinds in
:mod:`layersmith.library.alternative` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from layersmith.execution.parent import Parent
from layersmith.heterogeneous.plan import linear_records
from layersmith.library.axes.axis import Bundle, HeadsAxis, LayerAxes, WidthAxis, numbered
from layersmith.library.axes.layers import input_dim
from layersmith.library.slicing import (
    keep_experts,
    keep_groups,
    keep_head_size,
    keep_inner,
    keep_kv_heads,
    keep_query_heads,
    keep_state,
    narrow,
    pool_kv_heads,
    query_heads_of,
)

Tensors = dict[str, torch.Tensor]


class Change(Protocol):
    """The fields of an alternative that a cut uses."""

    @property
    def subblock(self) -> str: ...

    @property
    def method(self) -> str: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class RankedLayer:
    """A layer of the parent, its axes, and the ranking of their units.

    Attributes:
        parent: The parent.
        index: Index of the layer.
        axes: The axes of the layer.
        orders: The orders of the library.
        maps: The maps of the library.
    """

    parent: Parent
    index: int
    axes: LayerAxes
    orders: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]

    @property
    def weights(self) -> Tensors:
        """The parent's weights by name in the layer."""
        return self.parent.layer(self.index).state_dict()

    def order(self, name: str, attention: int = 0) -> torch.Tensor:
        return self.orders[numbered(f"{self.index}.{name}", attention)]

    def reads_its_input(self, weight: str) -> bool:
        """Whether a weight is a linear map's, so that the map's input holds the units that the weight reads."""
        return weight.endswith(".weight") and input_dim(self.parent.layers[self.index], weight) is not None


Cut = Callable[[RankedLayer, Change], Tensors]
Gone = Callable[[RankedLayer, Change], dict[str, torch.Tensor] | None]
Reader = Callable[[LayerAxes], "HeadsAxis | Bundle | None"]


def linear_map(layer: RankedLayer, change: Change) -> Tensors:
    """The least-squares map in place of a subblock."""
    parent = layer.parent
    ((module, _),) = linear_records(parent.descriptor, parent.layer(layer.index), change.subblock).items()
    weight = layer.maps[f"{layer.index}.{change.subblock}"].to(parent.runtime.device)
    return {f"{module}.linear.weight": parent.stored(weight)}


# ---------------------------------------------------------------------------------------------- widths


def _width_of(layer: RankedLayer, part: str) -> WidthAxis:
    axis = layer.axes.shared if part == "shared" else layer.axes.ffn
    assert axis is not None
    return axis


def width(part: str) -> Cut:
    """The most important channels of an FFN or of experts (part ``ffn``), or of shared experts (part ``shared``)."""

    def cut(layer: RankedLayer, change: Change) -> Tensors:
        axis = _width_of(layer, part)
        sizes = [bundle.size * change.size // axis.size for bundle in axis.bundles]
        kept = [layer.order(f"{part}.{b}")[..., :size] for b, size in enumerate(sizes)]
        return narrow(layer.weights, axis, kept)

    return cut


def channels_gone(part: str) -> Gone:
    def gone(layer: RankedLayer, change: Change) -> dict[str, torch.Tensor] | None:
        axis, result = _width_of(layer, part), {}
        for b, bundle in enumerate(axis.bundles):
            if bundle.members or not layer.reads_its_input(bundle.reader):
                return None
            units = layer.order(f"{part}.{b}")[bundle.size * change.size // axis.size :]
            reader = bundle.weight(bundle.reader)
            result[bundle.output] = reader.positions("channels", {"channels": bundle.size})[units].flatten()
        return result

    return gone


def width_reader(part: str) -> Reader:
    def reader(axes: LayerAxes) -> Bundle | None:
        axis = axes.shared if part == "shared" else axes.ffn
        assert axis is not None
        return axis.bundles[0] if len(axis.bundles) == 1 and not axis.bundles[0].members else None

    return reader


# ---------------------------------------------------------------------------------------------- heads


def _attentions(layer: RankedLayer, change: Change) -> Iterator[tuple[int, HeadsAxis, int]]:
    """Number and axis of each attention of the layer, and the number of heads that stay."""
    assert layer.axes.kv is not None
    for number, heads in enumerate(layer.axes.kv.attentions):
        yield number, heads, change.size // heads.together


def query_heads(layer: RankedLayer, change: Change) -> Tensors:
    weights, result = layer.weights, Tensors()
    for number, heads, left in _attentions(layer, change):
        kept = layer.order("queries", number)[:, : left // heads.shares].flatten()
        result |= keep_query_heads(weights, heads, kept)
    return result


def head_groups(layer: RankedLayer, change: Change) -> Tensors:
    weights, result = layer.weights, Tensors()
    for number, heads, left in _attentions(layer, change):
        result |= keep_groups(weights, heads, layer.order("attention", number)[:left])
    return result


def kv_heads(layer: RankedLayer, change: Change) -> Tensors:
    """The most important KV heads, or means of consecutive ones with the method ``pool``."""
    weights, result = layer.weights, Tensors()
    for number, heads, left in _attentions(layer, change):
        if change.method == "pool":
            pooled = pool_kv_heads(weights, heads, left)
            result |= {name: layer.parent.stored(weight) for name, weight in pooled.items()}
        else:
            result |= keep_kv_heads(weights, heads, layer.order("attention", number)[:left])
    return result


def heads_gone(units: Callable[[RankedLayer, int, HeadsAxis, int], torch.Tensor]) -> Gone:
    """The query heads of every attention that ``units`` returns."""

    def gone(layer: RankedLayer, change: Change) -> dict[str, torch.Tensor] | None:
        if change.method == "pool" or layer.axes.kv is None:
            return None
        result = {}
        for number, heads, left in _attentions(layer, change):
            if heads.blocks > 1 or not layer.reads_its_input(heads.reader):
                return None
            places = heads.weight(heads.reader).positions("queries", heads.sizes)
            result[heads.output] = places[units(layer, number, heads, left)].flatten()
        return result

    return gone


def gone_queries(layer: RankedLayer, number: int, heads: HeadsAxis, left: int) -> torch.Tensor:
    """Query heads that are removed while their KV heads stay."""
    return layer.order("queries", number)[:, left // heads.shares :].flatten()


def queries_of_gone_heads(layer: RankedLayer, number: int, heads: HeadsAxis, left: int) -> torch.Tensor:
    """Query heads whose KV head is removed."""
    return query_heads_of(heads, layer.order("attention", number)[left:])


def heads_reader(axes: LayerAxes) -> HeadsAxis | None:
    return axes.kv if axes.kv is not None and axes.kv.blocks == len(axes.kv.attentions) == 1 else None


# ---------------------------------------------------------------------------------------------- mixers and experts


def mixer_heads(layer: RankedLayer, change: Change) -> Tensors:
    axis = layer.axes.mixer
    assert axis is not None
    return keep_query_heads(layer.weights, axis, layer.order("mixer_heads")[:, : change.size // axis.size].flatten())


def mixer_groups(layer: RankedLayer, change: Change) -> Tensors:
    assert layer.axes.mixer is not None
    return keep_groups(layer.weights, layer.axes.mixer, layer.order("mixer")[: change.size])


def mixer_head_size(layer: RankedLayer, change: Change) -> Tensors:
    assert layer.axes.mixer_size is not None
    return keep_head_size(layer.weights, layer.axes.mixer_size, layer.order("mixer_size")[:, : change.size])


def state_size(layer: RankedLayer, change: Change) -> Tensors:
    assert layer.axes.state is not None
    return keep_state(layer.weights, layer.axes.state, layer.order("state")[: change.size])


def inner_size(layer: RankedLayer, change: Change) -> Tensors:
    """The most important units of a size inside a subblock; norms over them keep their mean square on the data."""
    axis = next(axis for axis in layer.axes.inner if axis.name == change.method)
    energies = {name: layer.order(f"energy.{name}") for name in axis.norms}
    kept = layer.order(f"inner.{axis.name}")[:, : change.size // axis.step]
    weights = keep_inner(layer.weights, axis, kept, energies)
    return {name: layer.parent.stored(w) if name in axis.norms else w for name, w in weights.items()}


def mixer_reader(axes: LayerAxes) -> HeadsAxis | None:
    return axes.mixer


def experts(layer: RankedLayer, change: Change) -> Tensors:
    """The most important experts, equally many of each of the router's groups."""
    axis, order = layer.axes.experts, layer.order("experts")
    assert axis is not None
    in_group, left = axis.size // axis.groups, change.size // axis.groups
    kept = torch.cat([order[order // in_group == group][:left] for group in range(axis.groups)])
    return keep_experts(layer.weights, axis, kept)
