"""The library of a parent: alternatives, the plans that make their weights, and layers built from them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layersmith import schema
from layersmith.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from layersmith.block_config import BlockConfig
from layersmith.execution import exchanged, share_buffers
from layersmith.heterogeneous.build import build
from layersmith.heterogeneous.plan import SUBBLOCKS, linear_records
from layersmith.library import ranking
from layersmith.library.alternative import Alternative, linear_is_possible, search_space
from layersmith.library.axes import LayerAxes, find_axes, meta_layers
from layersmith.library.proof import prove
from layersmith.library.statistics import Probe, gather
from layersmith.library.weights import keep_kv_heads, narrow_ffn, pool_kv_heads
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.parent import Parent
from layersmith.progress import SILENT, Progress
from layersmith.recipe import LibraryRecipe


@dataclass(eq=False)
class Library:
    """All the alternatives of all the layers.

    Attributes:
        parent: whose they are.
        axes: what can be narrowed in each layer.
        alternatives: every one, the parent's own subblocks included.
        orders: ``"{layer}.ffn"`` or ``"{layer}.attention"`` to channels or KV heads, most important first.
        maps: ``"{layer}.{subblock}"`` to the weight ``[D, D]`` of its linear replacement.
        notes: what could not be offered, and why.
    """

    parent: Parent
    axes: Sequence[LayerAxes]
    alternatives: Sequence[Alternative]
    orders: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    notes: Sequence[str]
    _skeletons: dict[str, list[nn.Module]] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Digest of all that decides the weights of the alternatives."""
        tensors = {k: v.tolist() for k, v in self.orders.items()}
        maps = {k: [float(v.double().sum()), float(v.double().square().sum())] for k, v in self.maps.items()}
        return fingerprint([self.parent.identity, [a.identity for a in self.alternatives], tensors, maps])

    def with_parent(self, parent: Parent) -> Library:
        """The same library over another copy of the parent's weights."""
        return Library(parent, self.axes, self.alternatives, self.orders, self.maps, self.notes)

    def weights(self, alternative: Alternative) -> dict[str, torch.Tensor]:
        """The weights in which the layer with this alternative differs from the parent's, by name in the layer.

        They are what the checkpoint will hold, in the dtype of the computation.
        """
        i, kind = alternative.layer, alternative.kind
        if kind in ("parent", "no_op"):
            return {}
        layer, own = self.parent.layers[i], self.axes[i]
        if kind == "linear":
            ((module, _),) = linear_records(self.parent.descriptor, layer, alternative.subblock).items()
            weight = self.maps[f"{i}.{alternative.subblock}"].to(self.parent.runtime.device)
            return {f"{module}.linear.weight": self.parent.stored(weight)}
        current = dict(layer.named_parameters())
        if kind == "ffn_width":
            assert own.ffn is not None
            return narrow_ffn(current, own.ffn, self.orders[f"{i}.ffn"][: alternative.size])
        assert own.kv is not None
        if alternative.method == "pool":
            pooled = pool_kv_heads(current, own.kv, alternative.size)
            return {name: self.parent.stored(weight) for name, weight in pooled.items()}
        return keep_kv_heads(current, own.kv, self.orders[f"{i}.attention"][: alternative.size])

    def layer(self, *alternatives: Alternative) -> nn.Module:
        """The decoder layer with these alternatives (of one layer) in it; the rest is shared with the parent."""
        i = alternatives[0].layer
        changed = [a for a in alternatives if a.kind != "parent"]
        if not changed:
            return self.parent.layers[i]
        layer = copy.deepcopy(self._skeleton(i, changed))
        original = self.parent.layers[i]
        tensors: dict[str, torch.Tensor] = dict(original.named_parameters())
        for alternative in changed:
            tensors |= self.weights(alternative)
        state = {name: tensors[name] for name, _ in layer.named_parameters()}
        state |= {name: buffer for name, buffer in original.state_dict().items() if name in dict(layer.named_buffers())}
        layer.load_state_dict(state, strict=True, assign=True)
        share_buffers(original, layer)
        return layer.eval().requires_grad_(False)

    def _skeleton(self, index: int, changed: Sequence[Alternative]) -> nn.Module:
        """The layer on the meta device. All layers are built with the same change at once, and kept."""
        configs = {a.subblock: a.subblock_config(self.parent.blocks[index]) for a in changed}
        key = fingerprint({subblock: config.to_dict() for subblock, config in configs.items()})
        if key not in self._skeletons:
            blocks = [dataclasses.replace(block, **configs) for block in self.parent.blocks]  # type: ignore[arg-type]
            self._skeletons[key] = meta_layers(self.parent.descriptor, self.parent.config, blocks)
        return self._skeletons[key][index]

    def layers(self, chosen: Sequence[Alternative]) -> dict[int, nn.Module]:
        """The decoder layers in which a choice differs from the parent."""
        by_layer: dict[int, list[Alternative]] = {}
        for alternative in chosen:
            if alternative.kind != "parent":
                by_layer.setdefault(alternative.layer, []).append(alternative)
        return {i: self.layer(*alternatives) for i, alternatives in by_layer.items()}

    def blocks(self, chosen: Sequence[Alternative]) -> list[BlockConfig]:
        """The block configs of the child that a choice makes."""
        blocks = list(self.parent.blocks)
        for alternative in chosen:
            blocks[alternative.layer] = alternative.block_config(blocks[alternative.layer])
        return blocks

    def compose(self, chosen: Sequence[Alternative]) -> PreTrainedModel:
        """The child as a model of its own; weights that did not change are shared with the parent."""
        parent = self.parent
        child = build(
            parent.config, self.blocks(chosen), dtype=parent.runtime.dtype, device="meta", descriptor=parent.descriptor
        )
        with exchanged(parent, self.layers(chosen)):
            child.load_state_dict(parent.model.state_dict(), strict=True, assign=True)
            share_buffers(parent.model, child)
        child.tie_weights()
        child.generation_config = copy.deepcopy(parent.model.generation_config)
        return child.eval()

    # ------------------------------------------------------------------------------------------ on disk

    def write(self, folder: Path) -> None:
        tensors = {f"order.{k}": v for k, v in self.orders.items()} | {f"map.{k}": v for k, v in self.maps.items()}
        write_tensors(folder / "tensors.safetensors", tensors)
        data = {"alternatives": [schema.to_data(a) for a in self.alternatives], "notes": list(self.notes)}
        write_json(folder / "library.json", data | {"axes": [schema.to_data(a) for a in self.axes]})

    @staticmethod
    def read(folder: Path, parent: Parent) -> Library:
        data = read_json(folder / "library.json")
        tensors = read_tensors(folder / "tensors.safetensors")
        return Library(
            parent,
            [schema.parse(LayerAxes, entry, "library.json") for entry in data["axes"]],
            [schema.parse(Alternative, entry, "library.json") for entry in data["alternatives"]],
            {k.removeprefix("order."): v for k, v in tensors.items() if k.startswith("order.")},
            {k.removeprefix("map."): v for k, v in tensors.items() if k.startswith("map.")},
            data["notes"],
        )


@dataclass(frozen=True)
class Survey:
    """What can be changed in a parent, before anything is measured.

    Attributes:
        axes: proved, one a layer.
        alternatives: all of them, the parent's own subblocks included.
        ffn_ranking: how channels will be ranked.
        notes: what cannot be offered, and why.
    """

    axes: list[LayerAxes]
    alternatives: list[Alternative]
    ffn_ranking: str
    notes: list[str]


def survey(parent: Parent, recipe: LibraryRecipe) -> Survey:
    """Find the axes of a parent, prove them, and list the alternatives that the recipe asks for."""
    vocab_size = parent.language_config.vocab_size
    tokens = torch.arange(32)[None] * 31 % vocab_size  # any ids will do for a proof
    axes = prove(parent, find_axes(parent.descriptor, parent.config, parent.blocks), tokens)
    return survey_of(parent.descriptor, parent.blocks, axes, parent.layers, recipe)


def survey_of(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: list[LayerAxes],
    layers: Sequence[nn.Module],
    recipe: LibraryRecipe,
) -> Survey:
    """What a recipe asks for and a model's axes allow; its layers may lie on the meta device."""
    linear_possible = {s: linear_is_possible(descriptor, layers, s) for s in SUBBLOCKS}
    ffn_ranking = choose_ffn_ranking(axes, recipe)
    alternatives = search_space(descriptor, blocks, axes, linear_possible, recipe, ffn_ranking)
    return Survey(axes, alternatives, ffn_ranking, notes_on(descriptor, axes, linear_possible))


def build_library(
    parent: Parent,
    recipe: LibraryRecipe,
    found: Survey,
    tokens: torch.Tensor,
    *,
    batch_sequences: int,
    checkpoint: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> Library:
    """Measure and rank: the library of a parent.

    Args:
        parent: the parent.
        recipe: how alternatives are made.
        found: which alternatives.
        tokens: ``[N, T]`` calibration rows.
        batch_sequences: rows in one forward pass.
        checkpoint, inputs: see :func:`layersmith.library.statistics.gather`.
        progress: told of rows done.
    """
    axes, alternatives, ffn_ranking = found.axes, found.alternatives, found.ffn_ranking
    probes = probes_for(parent, axes, alternatives, ffn_ranking)
    means = gather(
        parent,
        probes,
        tokens,
        batch_sequences=batch_sequences,
        memory_bytes=recipe.statistics_gib * 1024**3,
        checkpoint=checkpoint,
        inputs=inputs,
        progress=progress,
    )
    orders: dict[str, torch.Tensor] = {}
    maps: dict[str, torch.Tensor] = {}
    for i, own in enumerate(axes):
        layer = parent.layers[i]
        if (name := f"{i}.ffn") in means and own.ffn is not None:
            costs = ranking.channel_costs(output_weight(layer, own.ffn.output), means[name])
            orders[name] = _order(costs, ffn_ranking)
        if (name := f"{i}.attention") in means and own.kv is not None:
            group = own.kv.num_heads // own.kv.size
            costs = ranking.channel_costs(output_weight(layer, own.kv.output), means[name], own.kv.head_dim * group)
            orders[name] = _order(costs, "iterative")
        for subblock in SUBBLOCKS:
            if (name := f"{i}.{subblock}.linear") + ".input" in means:
                solved = ranking.least_squares(means[f"{name}.input"], means[f"{name}.output"])
                maps[f"{i}.{subblock}"] = solved.float()
    return Library(parent, axes, alternatives, orders, maps, found.notes)


def _order(costs: torch.Tensor, method: str) -> torch.Tensor:
    if method == "iterative" and costs.ndim == 2:
        return ranking.by_iterative_removal(costs)
    return ranking.by_contribution(costs)


def output_weight(layer: nn.Module, name: str) -> torch.Tensor:
    """The weight ``[outputs, inputs]`` of a projection, whichever way round its class stores it."""
    module = layer.get_submodule(name)
    weight = module.get_parameter("weight")
    return weight.T if type(module).__name__ == "Conv1D" else weight


def choose_ffn_ranking(axes: Sequence[LayerAxes], recipe: LibraryRecipe) -> str:
    """What ``auto`` means: iterative where every layer's channel moments fit in the memory for statistics."""
    if recipe.ffn_ranking != "auto":
        return recipe.ffn_ranking
    needed = sum(8 * axis.ffn.size**2 for axis in axes if axis.ffn is not None)
    return "iterative" if needed <= recipe.statistics_gib * 1024**3 else "contribution"


def probes_for(
    parent: Parent, axes: Sequence[LayerAxes], alternatives: Sequence[Alternative], ffn_ranking: str
) -> list[Probe]:
    """What has to be watched to make these alternatives."""
    kinds = {(a.layer, a.subblock, a.kind, a.method) for a in alternatives}
    hidden = parent.language_config.hidden_size
    probes = []
    for i, own in enumerate(axes):
        if own.ffn is not None and any(k[:3] == (i, "ffn", "ffn_width") for k in kinds):
            kind = "moment" if ffn_ranking == "iterative" else "energy"
            size = own.ffn.size**2 if kind == "moment" else own.ffn.size
            probes.append(Probe(f"{i}.ffn", i, own.ffn.output, kind, 8 * size))
        if own.kv is not None and (i, "attention", "kv_heads", "contribution") in kinds:
            channels = own.kv.num_heads * own.kv.head_dim
            probes.append(Probe(f"{i}.attention", i, own.kv.output, "moment", 8 * channels**2))
        for subblock in SUBBLOCKS:
            if any(k[:3] == (i, subblock, "linear") for k in kinds):
                ((module, _),) = linear_records(parent.descriptor, parent.layers[i], subblock).items()
                probes.append(Probe(f"{i}.{subblock}.linear", i, module, "cross", 16 * hidden**2))
    return probes


def notes_on(descriptor: Any, axes: Sequence[LayerAxes], linear_possible: Mapping[str, bool]) -> list[str]:
    """Sentences about what the library does not offer."""
    notes = []
    if not descriptor.attn_no_op_supported():
        notes.append(f"{descriptor.__name__} has no attention no-op, so no attention is removed.")
    if not descriptor.mlp_no_op_supported():
        notes.append(f"{descriptor.__name__} has no FFN no-op, so no FFN is removed.")
    for subblock, possible in linear_possible.items():
        if not possible:
            notes.append(f"No single module is the {subblock}, so no linear map replaces it.")
    words = {"ffn": "FFNs are not narrowed", "attention": "KV heads are not reduced"}
    for subblock, what in words.items():
        by_reason: dict[str, list[int]] = {}
        for i, own in enumerate(axes):
            if subblock in own.reasons:
                by_reason.setdefault(own.reasons[subblock], []).append(i)
        for reason, layers in by_reason.items():
            where = "any layer" if len(layers) == len(axes) else f"layers {', '.join(map(str, layers))}"
            notes.append(f"{what} in {where}: {reason}.")
    return notes
