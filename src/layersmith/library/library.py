"""The library of a parent: its alternatives, and decoder layers and children with them."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import TypedDict

from layersmith.block_config import BlockConfig
from layersmith.errors import InputError, some_of
from layersmith.execution.exchange import LAYER_TYPE, share_buffers
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import build
from layersmith.library.alternative import (
    Alternative,
    changed_by_layer,
    child_blocks,
    no_op_of_other,
    pair_identity,
)
from layersmith.library.axes.axis import LayerAxes
from layersmith.library.axes.layers import meta_layers
from layersmith.library.cuts import RankedLayer
from layersmith.library.stored_weights import Kept
from layersmith.records import parse, to_data
from layersmith.run.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors

# Shape of ``importance.json``: points of a curve by its name.
CURVES = dict[str, list[Annotated[list[float], Len(2, 2)]]]


class LibraryData(TypedDict):
    """What ``library.json`` holds."""

    axes: list[Any]
    alternatives: list[Any]
    notes: list[str]


def parse_alternatives(data: LibraryData, where: Path) -> tuple[list[LayerAxes], list[Alternative]]:
    """Axes and alternatives from JSON data.

    Raises:
        InputError: An alternative is of a layer without axes.
        UsageError: They are not what :meth:`Library.write` writes.
    """
    axes = [parse(LayerAxes, entry, f"{where}: axes.") for entry in data["axes"]]
    alternatives = [parse(Alternative, entry, f"{where}: alternatives.") for entry in data["alternatives"]]
    if unknown := [a.key for a in alternatives if a.layer >= len(axes)]:
        raise InputError(f"{where}: {some_of(unknown)}, but there are {len(axes)} layers.")
    return axes, alternatives


@dataclass(eq=False)
class Library:
    """All the alternatives of all the layers.

    Attributes:
        parent: The model that they are made from.
        axes: The axes of each layer.
        alternatives: All alternatives, the parent's subblocks included.
        orders: Units by name, most important first. ``"{layer}.ffn.{bundle}"`` and ``"{layer}.shared.{bundle}"`` hold
            channels (of each expert), ``"{layer}.attention"`` KV heads, ``"{layer}.queries"`` the query heads of each
            KV head, ``"{layer}.experts"`` experts, ``"{layer}.mixer"`` groups of mixer heads, ``"{layer}.mixer_heads"``
            the heads of each group, ``"{layer}.mixer_size"`` the entries of each head, ``"{layer}.state"`` the numbers
            of a state, ``"{layer}.inner.{attribute}"`` the units of a size inside a subblock in each group of heads.
            ``"{layer}.energy.{weight}"`` is no order but the mean squares of what a norm over such units takes.
        maps: The weight ``[D, D]`` of each linear replacement, by ``"{layer}.{subblock}"``.
        notes: Sentences about what is not offered, and why.
        importance: Error curves of :func:`.ranking.error_curve`, by the names of ``orders``.
        kept: Weights of alternatives that were refitted or trained.
        pairs: Weights of alternatives trained together, by :func:`pair_identity`; they precede ``kept``.
    """

    parent: Parent
    axes: Sequence[LayerAxes]
    alternatives: Sequence[Alternative]
    orders: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    notes: Sequence[str]
    importance: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    pairs: Kept = field(default_factory=Kept)
    _skeletons: dict[tuple[str, int], nn.Module] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.alternatives)} alternatives of {len(self.axes)} layers"]
        for i in range(len(self.axes)):
            kinds = Counter(a.kind for a in self.alternatives if a.layer == i)
            lines.append(f"{i:5}  " + ", ".join(f"{kind} x {n}" if n > 1 else kind for kind, n in kinds.items()))
        return "\n".join(lines)

    @property
    def identity(self) -> str:
        """Digest of everything that the weights of the alternatives depend on."""
        tensors = {k: v.tolist() for k, v in self.orders.items()}
        maps = {k: [float(v.double().sum()), float(v.double().square().sum())] for k, v in self.maps.items()}
        of_kept = [self.kept.identity] if self.kept.identity else []
        return fingerprint([self.parent.identity, [a.identity for a in self.alternatives], tensors, maps, *of_kept])

    def with_parent(self, parent: Parent) -> Library:
        """The same library over another copy of the parent's weights."""
        return dataclasses.replace(self, parent=parent, _skeletons={})

    def with_kept(self, kept: Kept, pairs: Kept | None = None) -> Library:
        """The same library with other refitted and trained weights."""
        return dataclasses.replace(self, kept=kept, pairs=self.pairs if pairs is None else pairs)

    def weights(self, alternative: Alternative) -> dict[str, torch.Tensor]:
        """The weights of the layer with this alternative that differ from the parent's, by name in the layer.

        They have the values that the checkpoint will hold, in the dtype of the computation. An alternative in a number
        format has the weights of its shape until quantized ones are kept for it.
        """
        shape = alternative.shape
        kept = self.kept.of(shape.identity) | (self.kept.of(alternative.identity) if alternative.format else {})
        return self.sliced(shape) | self._on_device(kept)

    def _on_device(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        runtime = self.parent.runtime
        return {name: weight.to(runtime.device, runtime.dtype) for name, weight in weights.items()}

    def sliced(self, alternative: Alternative) -> dict[str, torch.Tensor]:
        """:meth:`weights` as they are cut from the parent's, without refitting or training."""
        cut = alternative.traits.cut
        return {} if cut is None else cut(self._ranked(alternative.layer), alternative)

    def _ranked(self, i: int) -> RankedLayer:
        return RankedLayer(parent=self.parent, index=i, axes=self.axes[i], orders=self.orders, maps=self.maps)

    def silenced(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """Entries of modules' inputs that become zero, if an alternative does nothing else; None otherwise.

        The caller must try whether a module before them, e.g. a norm, depends on the removed units.
        """
        return None if self.kept.layer_of(alternative.identity) is not None else self.units_gone(alternative)

    def refitted(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """:meth:`silenced`, if the weight that reads the units was also refitted to those that stay; else None."""
        reader, kept, gone = self.reader(alternative), self.kept.of(alternative.identity), self.units_gone(alternative)
        if reader is None or gone is None or len(gone) != 1 or kept.keys() != {reader[0]}:
            return None
        whole, refitted = self.parent.layers[alternative.layer].get_parameter(reader[0]), kept[reader[0]]
        return gone if refitted.shape[reader[1]] + sum(map(len, gone.values())) == whole.shape[reader[1]] else None

    def units_gone(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """:meth:`silenced`, whether or not weights were refitted or trained."""
        gone = alternative.traits.gone
        return None if gone is None else gone(self._ranked(alternative.layer), alternative)

    def reader(self, alternative: Alternative) -> tuple[str, int] | None:
        """Name and input dimension of the only projection that computes a changed subblock's output, else None."""
        layer, find = self._ranked(alternative.layer), alternative.traits.reader
        units = find(layer.axes) if find is not None else None
        if units is None or not units.reader or not layer.reads_its_input(units.reader):
            return None
        return units.reader, units.reader_dim

    def last_projection(self, i: int, subblock: str) -> tuple[str, int] | None:
        """:meth:`reader` of a subblock, also where it is the parent's; None if no alternative has one."""
        members = (a for a in self.alternatives if a.layer == i and a.subblock == subblock)
        return next((reader for a in members if (reader := self.reader(a)) is not None), None)

    def layer(self, *alternatives: Alternative) -> nn.Module:
        """The decoder layer with these alternatives, all of one layer; other weights are shared with the parent."""
        i = alternatives[0].layer
        changed = [a for a in alternatives if not a.is_parent]
        if not changed:
            return self.parent.layer(i)
        skeleton = self._skeleton(i, changed)
        configs = {id(v): v for m in skeleton.modules() for v in vars(m).values() if isinstance(v, PretrainedConfig)}
        layer = copy.deepcopy(skeleton, configs)
        original = self.parent.layer(i)
        tensors = original.state_dict() | self.weights_together(changed)
        layer.load_state_dict({name: tensors[name] for name in layer.state_dict()}, strict=True, assign=True)
        share_buffers(original, layer)
        for alternative in changed:
            if alternative.kind == "window":
                setattr(layer, LAYER_TYPE, alternative.method)
        return layer.eval().requires_grad_(False)

    def without(self, i: int, subblock: str) -> nn.Module:
        """Layer ``i`` of the parent without one of its subblocks."""
        return self.layer(Alternative(i, subblock, "no_op"))

    def alone(self, alternative: Alternative) -> nn.Module:
        """The layer with this alternative in it and without the other subblock."""
        return self.layer(alternative, no_op_of_other(alternative))

    def num_parameters(self, *alternatives: Alternative) -> int:
        """Parameters of what :meth:`layer` builds, without building it."""
        changed = [a for a in alternatives if not a.is_parent]
        layer = self._skeleton(changed[0].layer, changed) if changed else self.parent.layers[alternatives[0].layer]
        return sum(p.numel() for p in layer.parameters())

    def _skeleton(self, index: int, changed: Sequence[Alternative]) -> nn.Module:
        """The layer on the meta device. All layers that offer the same alternatives are built at once, and kept."""
        configs: dict[str, Any] = {a.subblock: a.subblock_config(self.parent.blocks[index]) for a in changed}
        key = fingerprint({subblock: config.to_dict() for subblock, config in configs.items()})
        if (key, index) not in self._skeletons:
            offered = set(self.alternatives)
            blocks = list(self.parent.blocks)
            alike = {index}
            shapes = [a.shape for a in changed]
            alike.update(i for i in range(len(blocks)) if offered >= {dataclasses.replace(a, layer=i) for a in shapes})
            for i in alike:
                blocks[i] = dataclasses.replace(blocks[i], **configs)
            made = meta_layers(self.parent.descriptor, self.parent.config, blocks)
            self._skeletons |= {(key, i): made[i] for i in alike}
        return self._skeletons[key, index]

    def layers(self, chosen: Sequence[Alternative]) -> dict[int, nn.Module]:
        """The decoder layers that a solution changes."""
        return {i: self.layer(*alternatives) for i, alternatives in changed_by_layer(chosen).items()}

    def weights_together(self, changed: Sequence[Alternative]) -> dict[str, torch.Tensor]:
        """:meth:`weights` of all alternatives of one layer, jointly trained or quantized if they are in ``pairs``."""
        weights: dict[str, torch.Tensor] = {}
        for alternative in changed:
            weights |= self.weights(alternative)
        shapes = [a.shape for a in changed if not a.shape.is_parent]
        for identity in dict.fromkeys((pair_identity(shapes), pair_identity(changed))):
            weights |= self._on_device(self.pairs.of(identity))
        return weights

    def blocks(self, chosen: Sequence[Alternative]) -> list[BlockConfig]:
        """The block configs of the child that a solution makes."""
        return child_blocks(self.parent.blocks, chosen)

    def compose(self, chosen: Sequence[Alternative]) -> PreTrainedModel:
        """The child as a model; weights that did not change are shared with the parent."""
        parent = self.parent
        child = build(
            parent.config, self.blocks(chosen), dtype=parent.runtime.dtype, device="meta", descriptor=parent.descriptor
        )
        tensors = parent.tensors()
        for i, changed in changed_by_layer(chosen).items():
            prefix = parent.descriptor.layer_block_name(i)
            tensors |= {f"{prefix}.{name}": weight for name, weight in self.weights_together(changed).items()}
        child.load_state_dict({name: tensors[name] for name in child.state_dict()}, strict=True, assign=True)
        share_buffers(parent.model, child)
        child.tie_weights()
        child.generation_config = copy.deepcopy(parent.model.generation_config)
        return child.eval()


def write_library(library: Library, folder: Path) -> None:
    """Write a library's alternatives, orders of units, importance and kept weights into a folder."""
    tensors = {f"order.{k}": v for k, v in library.orders.items()} | {f"map.{k}": v for k, v in library.maps.items()}
    write_tensors(folder / "tensors.safetensors", tensors)
    data = {"alternatives": [a.to_data() for a in library.alternatives], "notes": list(library.notes)}
    write_json(folder / "library.json", data | {"axes": [to_data(a) for a in library.axes]})
    write_json(folder / "importance.json", {k: [list(point) for point in v] for k, v in library.importance.items()})
    library.kept.write(folder)


def read_library(folder: Path, parent: Parent) -> Library:
    """What :func:`write_library` wrote.

    Raises:
        InputError: A file is damaged, or the parent has another number of layers.
    """
    data = read_json(folder / "library.json", LibraryData)
    axes, alternatives = parse_alternatives(data, folder / "library.json")
    if len(axes) != len(parent.blocks):
        raise InputError(f"{folder / 'library.json'}: of {len(axes)} layers, but the parent has {len(parent.blocks)}.")
    tensors = read_tensors(folder / "tensors.safetensors")
    curves = folder / "importance.json"
    return Library(
        parent=parent,
        axes=axes,
        alternatives=alternatives,
        orders={k.removeprefix("order."): v for k, v in tensors.items() if k.startswith("order.")},
        maps={k.removeprefix("map."): v for k, v in tensors.items() if k.startswith("map.")},
        notes=data["notes"],
        importance=read_json(curves, CURVES) if curves.is_file() else {},
        kept=Kept.read(folder),
    )
