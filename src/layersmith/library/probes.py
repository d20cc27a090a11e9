"""The sums over the parent's activations that a library needs; see :mod:`.statistics` for the sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from layersmith.execution.parent import Parent
from layersmith.heterogeneous.plan import SUBBLOCKS, linear_records
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import HeadsAxis, InnerAxis, LayerAxes, WidthAxis, numbered
from layersmith.library.axes.layers import input_dim
from layersmith.library.ranking import as_matrix
from layersmith.library.slicing import common_module
from layersmith.library.statistics import Probe, expert_holder, expert_reader

_OF_HEADS = {"kv_heads", "head_groups", "query_heads"}
_OF_MIXERS = {"mixer_heads", "mixer_groups", "mixer_head_size"}


def probes_for(
    parent: Parent, axes: Sequence[LayerAxes], alternatives: Sequence[Alternative], ffn_ranking: str
) -> list[Probe]:
    """The probes that ranking these alternatives needs; pooled heads need none."""
    probes: list[Probe] = []
    for i, layer_axes in enumerate(axes):
        kinds = {a.kind for a in alternatives if a.layer == i and a.method != "pool"}
        layer = parent.layers[i]
        probes += _of_widths(layer, i, layer_axes, kinds, ffn_ranking)
        probes += _of_heads(layer, i, layer_axes, kinds)
        if layer_axes.state is not None and "state_size" in kinds:
            module = common_module(layer, [w.name for w in layer_axes.state.weights])
            state, size = layer_axes.state, 8 * layer_axes.state.size
            probes.append(Probe(name=f"{i}.state", layer=i, module=module, kind="state", bytes=size, state=state))
        for axis in layer_axes.inner:
            if any((a.layer, a.method, a.kind) == (i, axis.name, f"{axis.subblock}_size") for a in alternatives):
                probes += _of_inner(layer, i, axis)
        if layer_axes.experts is not None and "experts" in kinds:
            bundle = expert_reader(parent, i, layer_axes)
            size = 8 * bundle.members * (bundle.size + bundle.members)
            holder = expert_holder(layer, layer_axes, bundle)
            probes.append(Probe(name=f"{i}.experts", layer=i, module=holder, kind="reader", bytes=size, bundle=bundle))
        for subblock in SUBBLOCKS:
            if any((a.layer, a.subblock, a.kind) == (i, subblock, "linear") for a in alternatives):
                ((module, record),) = linear_records(parent.descriptor, layer, subblock).items()
                size = 16 * record["size"] ** 2
                name = f"{i}.{subblock}.linear"
                probes.append(Probe(name=name, layer=i, module=module, kind="cross", bytes=size))
    return probes


def _of_inner(layer: nn.Module, i: int, axis: InnerAxis) -> Iterator[Probe]:
    module, size = common_module(layer, [w.name for w in axis.weights]), 8 * axis.sizes["channels"]
    yield Probe(name=f"{i}.inner.{axis.name}", layer=i, module=module, kind="state", bytes=size, state=axis)
    for name in axis.norms:
        of_norm = name.removesuffix(".weight")
        yield Probe(name=f"{i}.energy.{name}", layer=i, module=of_norm, kind="energy", bytes=8 * axis.size)


def _of_widths(layer: nn.Module, i: int, axes: LayerAxes, kinds: set[str], ffn_ranking: str) -> Iterator[Probe]:
    routed = "expert_width" if axes.of_experts else "ffn_width"
    for part, axis, kind in (("ffn", axes.ffn, routed), ("shared", axes.shared, "shared_width")):
        if axis is not None and kind in kinds:
            yield from _of_width(layer, i, part, axis, ffn_ranking)


def _of_width(layer: nn.Module, i: int, part: str, axis: WidthAxis, ffn_ranking: str) -> Iterator[Probe]:
    for b, bundle in enumerate(axis.bundles):
        name, module = f"{i}.{part}.{b}", bundle.output
        plain = not bundle.members and module != bundle.reader and input_dim(layer, bundle.reader) is not None
        if plain:
            kind = "moment" if ffn_ranking == "iterative" else "energy"
            size = bundle.size**2 if kind == "moment" else bundle.size
            yield Probe(name=name, layer=i, module=module, kind=kind, bytes=8 * size)
        else:
            size = max(1, bundle.members) * (bundle.size + bundle.members)
            holder = common_module(layer, [w.name for w in bundle.weights])
            if bundle.flat:  # the module around theirs separates the members
                holder = holder.rpartition(".")[0]
            yield Probe(name=name, layer=i, module=holder, kind="reader", bytes=8 * size, bundle=bundle)


def _of_heads(layer: nn.Module, i: int, axes: LayerAxes, kinds: set[str]) -> Iterator[Probe]:
    for heads, name, of_kind in (
        (axes.kv, "attention", _OF_HEADS),
        (axes.mixer or axes.mixer_size, "mixer", _OF_MIXERS),
    ):
        if heads is None or not kinds & of_kind:
            continue
        for a, axis in enumerate(heads.attentions if isinstance(heads, HeadsAxis) else (heads,)):
            blocks = axis.blocks if isinstance(axis, HeadsAxis) else 1
            channels = as_matrix(layer.get_parameter(axis.reader), axis.reader_dim).shape[1] * blocks
            yield Probe(
                name=numbered(f"{i}.{name}", a),
                layer=i,
                module=axis.output,
                kind="moment",
                bytes=8 * channels**2,
                blocks=blocks,
            )
