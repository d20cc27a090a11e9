"""The library of a parent: alternatives, the plans that make their weights, and layers built from them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.execution.exchange import LAYER_TYPE, share_buffers
from layersmith.execution.layerwise import NotLayerwise, split_layers
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import build
from layersmith.heterogeneous.plan import SUBBLOCKS, linear_records
from layersmith.library import ranking
from layersmith.library.alternative import (
    Alternative,
    changed_by_layer,
    child_blocks,
    no_op_of_other,
    pair_identity,
    search_space,
    why_no_linear,
)
from layersmith.library.axes.axis import Bundle, HeadsAxis, LayerAxes, WidthAxis, numbered
from layersmith.library.axes.feasible import any_orders, by_reason, no_maps, those_that_run
from layersmith.library.axes.find import find_axes, input_dim, meta_layers
from layersmith.library.axes.prove import prove
from layersmith.library.axes.trial import Trial
from layersmith.library.layerwise_statistics import gather_layerwise
from layersmith.library.slicing import (
    common_module,
    keep_experts,
    keep_groups,
    keep_head_size,
    keep_kv_heads,
    keep_query_heads,
    keep_state,
    members_of,
    narrow,
    pool_kv_heads,
    query_heads_of,
)
from layersmith.library.statistics import Probe, expert_holder, expert_reader, gather
from layersmith.library.stored_weights import Kept
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import LibraryRecipe
from layersmith.records import parse, to_data
from layersmith.run.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from layersmith.run.progress import SILENT, Progress


@dataclass(eq=False)
class Library:
    """All the alternatives of all the layers.

    Attributes:
        parent: whose they are.
        axes: what can be narrowed in each layer.
        alternatives: every one, the parent's own subblocks included.
        orders: to units, most important first: ``"{layer}.ffn.{bundle}"`` and ``"{layer}.shared.{bundle}"`` to
            channels (of each expert), ``"{layer}.attention"`` to KV heads, ``"{layer}.queries"`` to the query heads of
            each KV head, ``"{layer}.experts"`` to experts, ``"{layer}.mixer"`` to groups of mixer heads,
            ``"{layer}.mixer_heads"`` to the heads of each group, ``"{layer}.mixer_size"`` to the entries of each of
            its heads, ``"{layer}.state"`` to the numbers of a state.
        maps: ``"{layer}.{subblock}"`` to the weight ``[D, D]`` of its linear replacement.
        notes: what could not be offered, and why.
        importance: by the names of ``orders``, where it is known: see :func:`layersmith.library.ranking.error_curve`.
        kept: weights of alternatives that were refitted or trained.
        pairs: weights of what was trained together in a layer, by :func:`pair_identity`; they stand before ``kept``.
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

    @property
    def identity(self) -> str:
        """Digest of all that decides the weights of the alternatives."""
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
        """The weights in which the layer with this alternative differs from the parent's, by name in the layer.

        They are what the checkpoint will hold, in the dtype of the computation.
        """
        return self.sliced(alternative) | self._on_device(self.kept.of(alternative.identity))

    def _on_device(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        runtime = self.parent.runtime
        return {name: weight.to(runtime.device, runtime.dtype) for name, weight in weights.items()}

    def sliced(self, alternative: Alternative) -> dict[str, torch.Tensor]:
        """:meth:`weights` as they come from the parent's, whatever is kept."""
        i, kind = alternative.layer, alternative.kind
        if kind in ("parent", "no_op", "window", "experts_per_token"):
            return {}
        layer, own = self.parent.layer(i), self.axes[i]
        if kind == "linear":
            ((module, _),) = linear_records(self.parent.descriptor, layer, alternative.subblock).items()
            weight = self.maps[f"{i}.{alternative.subblock}"].to(self.parent.runtime.device)
            return {f"{module}.linear.weight": self.parent.stored(weight)}
        current = layer.state_dict()
        if kind in ("ffn_width", "expert_width", "shared_width"):
            part, axis = ("shared", own.shared) if kind == "shared_width" else ("ffn", own.ffn)
            assert axis is not None
            kept = [
                self.orders[f"{i}.{part}.{b}"][..., : bundle.size * alternative.size // axis.size]
                for b, bundle in enumerate(axis.bundles)
            ]
            return narrow(current, axis, kept)
        if kind == "experts":
            assert own.experts is not None
            return keep_experts(current, own.experts, self._experts(i, alternative.size))
        if kind == "state_size":
            assert own.state is not None
            return keep_state(current, own.state, self.orders[f"{i}.state"][: alternative.size])
        if kind == "mixer_head_size":
            assert own.mixer_size is not None
            return keep_head_size(current, own.mixer_size, self.orders[f"{i}.mixer_size"][:, : alternative.size])
        if kind in ("mixer_heads", "mixer_groups"):
            assert own.mixer is not None
            if kind == "mixer_groups":
                return keep_groups(current, own.mixer, self.orders[f"{i}.mixer"][: alternative.size])
            in_group = alternative.size // own.mixer.size
            return keep_query_heads(current, own.mixer, self.orders[f"{i}.mixer_heads"][:, :in_group].flatten())
        assert own.kv is not None
        result: dict[str, torch.Tensor] = {}
        for a, heads in enumerate(own.kv.attentions):
            left = alternative.size // heads.together
            if kind == "query_heads":
                within = self.orders[numbered(f"{i}.queries", a)]
                result |= keep_query_heads(current, heads, within[:, : left // heads.shares].flatten())
            elif alternative.method == "pool":
                pooled = pool_kv_heads(current, heads, left)
                result |= {name: self.parent.stored(weight) for name, weight in pooled.items()}
            else:
                keep = keep_groups if kind == "head_groups" else keep_kv_heads
                result |= keep(current, heads, self.orders[numbered(f"{i}.attention", a)][:left])
        return result

    def silenced(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """Which entries of the input of which modules of the layer become zero, where there is nothing more to it.

        None where an alternative does something else. That nothing in between sees the units that are gone, e.g. a
        norm over all of them, remains to be tried.
        """
        return None if self.kept.layer_of(alternative.identity) is not None else self.units_gone(alternative)

    def refitted(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """As :meth:`silenced`, where besides the weight that reads the units was refitted to what is left."""
        reader, kept, gone = self.reader(alternative), self.kept.of(alternative.identity), self.units_gone(alternative)
        if reader is None or gone is None or len(gone) != 1 or kept.keys() != {reader[0]}:
            return None
        whole, own = self.parent.layers[alternative.layer].get_parameter(reader[0]), kept[reader[0]]
        return gone if own.shape[reader[1]] + sum(map(len, gone.values())) == whole.shape[reader[1]] else None

    def units_gone(self, alternative: Alternative) -> dict[str, torch.Tensor] | None:
        """:meth:`silenced`, whatever is kept."""
        i, kind = alternative.layer, alternative.kind
        own = self.axes[i]
        if kind in ("ffn_width", "shared_width"):
            part, axis = ("shared", own.shared) if kind == "shared_width" else ("ffn", own.ffn)
            assert axis is not None
            result = {}
            for b, bundle in enumerate(axis.bundles):
                if bundle.members or not self._reads_its_input(i, bundle.reader):
                    return None
                gone = self.orders[f"{i}.{part}.{b}"][bundle.size * alternative.size // axis.size :]
                reader = bundle.weight(bundle.reader)
                result[bundle.output] = reader.positions("channels", {"channels": bundle.size})[gone].flatten()
            return result
        if kind not in ("kv_heads", "head_groups", "query_heads") or alternative.method == "pool" or own.kv is None:
            return None
        result = {}
        for a, heads in enumerate(own.kv.attentions):
            if heads.blocks > 1 or not self._reads_its_input(i, heads.reader):
                return None
            left = alternative.size // heads.together
            if kind == "query_heads":
                gone = self.orders[numbered(f"{i}.queries", a)][:, left // heads.shares :].flatten()
            else:
                gone = query_heads_of(heads, self.orders[numbered(f"{i}.attention", a)][left:])
            places = heads.weight(heads.reader).positions("queries", heads.sizes)
            result[heads.output] = places[gone].flatten()
        return result

    def reader(self, alternative: Alternative) -> tuple[str, int] | None:
        """Name and input dimension of the one projection that makes a changed subblock's output, if there is one."""
        own, kind = self.axes[alternative.layer], alternative.kind
        found: HeadsAxis | Bundle | None = None
        if kind in ("ffn_width", "shared_width"):
            axis = own.shared if kind == "shared_width" else own.ffn
            assert axis is not None
            found = axis.bundles[0] if len(axis.bundles) == 1 and not axis.bundles[0].members else None
        elif kind in ("kv_heads", "head_groups", "query_heads", "window"):
            found = own.kv if own.kv is not None and own.kv.blocks == len(own.kv.attentions) == 1 else None
        elif kind in ("mixer_heads", "mixer_groups", "mixer_head_size", "state_size"):
            found = own.mixer
        if found is None or not found.reader or not self._reads_its_input(alternative.layer, found.reader):
            return None
        return found.reader, found.reader_dim

    def _reads_its_input(self, i: int, weight: str) -> bool:
        """Whether a weight is that of a linear map, whose input holds what it reads."""
        return weight.endswith(".weight") and input_dim(self.parent.layers[i], weight) is not None

    def _experts(self, i: int, count: int) -> torch.Tensor:
        """The most important experts, equally many of each of the router's groups."""
        axis, order = self.axes[i].experts, self.orders[f"{i}.experts"]
        assert axis is not None
        in_group = axis.size // axis.groups
        return torch.cat([order[order // in_group == g][: count // axis.groups] for g in range(axis.groups)])

    def layer(self, *alternatives: Alternative) -> nn.Module:
        """The decoder layer with these alternatives (of one layer) in it; the rest is shared with the parent."""
        i = alternatives[0].layer
        changed = [a for a in alternatives if a.kind != "parent"]
        if not changed:
            return self.parent.layer(i)
        skeleton = self._skeleton(i, changed)
        configs = {
            id(own): own for m in skeleton.modules() for own in vars(m).values() if isinstance(own, PretrainedConfig)
        }
        layer = copy.deepcopy(skeleton, configs)
        original = self.parent.layer(i)
        tensors: dict[str, torch.Tensor] = original.state_dict()
        tensors |= self.weights_together(changed)
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
        """Of what :meth:`layer` gives, which is not made for that."""
        changed = [a for a in alternatives if a.kind != "parent"]
        layer = self._skeleton(changed[0].layer, changed) if changed else self.parent.layers[alternatives[0].layer]
        return sum(p.numel() for p in layer.parameters())

    def _skeleton(self, index: int, changed: Sequence[Alternative]) -> nn.Module:
        """The layer on the meta device. All layers that can be the same are built so at once, and kept."""
        configs: dict[str, Any] = {a.subblock: a.subblock_config(self.parent.blocks[index]) for a in changed}
        key = fingerprint({subblock: config.to_dict() for subblock, config in configs.items()})
        if (key, index) not in self._skeletons:
            offered = set(self.alternatives)
            alike = [
                i
                for i in range(len(self.parent.blocks))
                if i == index or all(dataclasses.replace(a, layer=i) in offered for a in changed)
            ]
            blocks = [dataclasses.replace(b, **configs) if i in alike else b for i, b in enumerate(self.parent.blocks)]
            made = meta_layers(self.parent.descriptor, self.parent.config, blocks)
            self._skeletons |= {(key, i): made[i] for i in alike}
        return self._skeletons[key, index]

    def layers(self, chosen: Sequence[Alternative]) -> dict[int, nn.Module]:
        """The decoder layers in which a solution differs from the parent."""
        return {i: self.layer(*alternatives) for i, alternatives in changed_by_layer(chosen).items()}

    def weights_together(self, changed: Sequence[Alternative]) -> dict[str, torch.Tensor]:
        """:meth:`weights` of all alternatives of one layer; of those that were trained together, what came of that."""
        own: dict[str, torch.Tensor] = {}
        for alternative in changed:
            own |= self.weights(alternative)
        return own | self._on_device(self.pairs.of(pair_identity(changed)))

    def blocks(self, chosen: Sequence[Alternative]) -> list[BlockConfig]:
        """The block configs of the child that a solution makes."""
        return child_blocks(self.parent.blocks, chosen)

    def compose(self, chosen: Sequence[Alternative]) -> PreTrainedModel:
        """The child as a model of its own; weights that did not change are shared with the parent."""
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

    # ------------------------------------------------------------------------------------------ on disk

    def write(self, folder: Path) -> None:
        tensors = {f"order.{k}": v for k, v in self.orders.items()} | {f"map.{k}": v for k, v in self.maps.items()}
        write_tensors(folder / "tensors.safetensors", tensors)
        data = {"alternatives": [to_data(a) for a in self.alternatives], "notes": list(self.notes)}
        write_json(folder / "library.json", data | {"axes": [to_data(a) for a in self.axes]})
        write_json(folder / "importance.json", {k: [list(point) for point in v] for k, v in self.importance.items()})
        self.kept.write(folder)

    @staticmethod
    def read(folder: Path, parent: Parent) -> Library:
        data = read_json(folder / "library.json")
        tensors = read_tensors(folder / "tensors.safetensors")
        curves = folder / "importance.json"
        return Library(
            parent,
            [parse(LayerAxes, entry, "library.json") for entry in data["axes"]],
            [parse(Alternative, entry, "library.json") for entry in data["alternatives"]],
            {k.removeprefix("order."): v for k, v in tensors.items() if k.startswith("order.")},
            {k.removeprefix("map."): v for k, v in tensors.items() if k.startswith("map.")},
            data["notes"],
            read_json(curves) if curves.is_file() else {},
            Kept.read(folder),
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
    trial = Trial(parent, tokens)
    axes = prove(trial, find_axes(parent.descriptor, parent.config, parent.blocks))
    found = survey_of(parent.descriptor, parent.blocks, axes, parent.layers, recipe)
    maps = no_maps(parent.descriptor, parent.layers, found.alternatives)
    alternatives, notes = those_that_run(trial, Library(parent, axes, found.alternatives, any_orders(axes), maps, []))
    return dataclasses.replace(found, alternatives=alternatives, notes=[*found.notes, *notes])


def survey_of(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: list[LayerAxes],
    layers: Sequence[nn.Module],
    recipe: LibraryRecipe,
) -> Survey:
    """What a recipe asks for and a model's axes allow; its layers may lie on the meta device."""
    no_linear = {s: why_no_linear(descriptor, layers, s) for s in SUBBLOCKS}
    ffn_ranking = choose_ffn_ranking(axes, recipe)
    alternatives = search_space(descriptor, blocks, axes, no_linear, recipe, ffn_ranking)
    return Survey(axes, alternatives, ffn_ranking, notes_on(descriptor, blocks, axes, no_linear))


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
    of_layers: Iterable[dict[str, torch.Tensor]] | None = None
    if parent.stream is not None:
        with suppress(NotLayerwise):
            layerwise = split_layers(parent, Library(parent, axes, alternatives, {}, {}, []))
            folder = checkpoint.parent if checkpoint else None
            of_layers = gather_layerwise(layerwise, probes, tokens, batch_sequences, folder, progress)
    if of_layers is None:
        of_all = gather(
            parent,
            probes,
            tokens,
            batch_sequences=batch_sequences,
            memory_bytes=recipe.statistics_gib * 1024**3,
            checkpoint=checkpoint,
            inputs=inputs,
            progress=progress,
        )
        of_layers = repeat(of_all, len(axes))
    orders, maps = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    importance: dict[str, list[tuple[int, float]]] = {}
    for i, (own, means) in enumerate(zip(axes, of_layers, strict=True)):
        layer = parent.layer(i)
        for part, axis in (("ffn", own.ffn), ("shared", own.shared)):
            for b, bundle in enumerate(axis.bundles if axis is not None else ()):
                name = f"{i}.{part}.{b}"
                if name in means:
                    costs = ranking.channel_costs(output_weight(layer, bundle), means[name])
                    orders[name] = ranking.by_method(costs, ffn_ranking)
                    importance[name] = ranking.error_curve(costs, orders[name])
                elif f"{name}.channels" in means:
                    norms = torch.stack(
                        [_matrix(*own_weight).float().square().sum(0).cpu() for own_weight in _readers(layer, bundle)]
                    )
                    costs = means[f"{name}.channels"] * norms
                    orders[name] = ranking.by_cost(costs if bundle.members else costs[0])
        for heads, name, within in (
            (own.kv, f"{i}.attention", f"{i}.queries"),
            (own.mixer, f"{i}.mixer", f"{i}.mixer_heads"),
        ):
            for a, one in enumerate(heads.attentions if heads is not None else ()):
                if (own_name := numbered(name, a)) in means:
                    weight = _matrix(layer.get_parameter(one.reader), one.reader_dim)
                    of_one = ranking.head_orders(weight, one, means[own_name])
                    orders[own_name], orders[numbered(within, a)], by_head = of_one
                    importance[own_name] = ranking.error_curve(by_head, orders[own_name])
        if own.mixer_size is not None and (name := f"{i}.mixer") in means:
            weight = _matrix(layer.get_parameter(own.mixer_size.reader), own.mixer_size.reader_dim)
            orders[f"{i}.mixer_size"] = ranking.head_size_order(weight, own.mixer_size, means[name])
        if (name := f"{i}.state") in means:
            orders[name] = ranking.by_cost(means[name])
        if (name := f"{i}.experts.members") in means:
            orders[f"{i}.experts"] = ranking.by_method(means[name], "iterative")
            importance[f"{i}.experts"] = ranking.error_curve(means[name].double().cpu(), orders[f"{i}.experts"])
        for subblock in SUBBLOCKS:
            if (name := f"{i}.{subblock}.linear") + ".input" in means:
                solved = ranking.least_squares(means[f"{name}.input"], means[f"{name}.output"])
                maps[f"{i}.{subblock}"] = solved.float()
    return Library(parent, axes, alternatives, orders, maps, found.notes, importance)


def output_weight(layer: nn.Module, bundle: Bundle) -> torch.Tensor:
    """The weight ``[outputs, inputs]`` of the projection that reads a bundle, whichever way round it is stored."""
    return _matrix(layer.get_parameter(bundle.reader), bundle.reader_dim)


def _matrix(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """``[outputs, inputs]``; of a stack of matrices the outputs of all."""
    return weight.detach().movedim(dim, -1).flatten(0, -2)


def _readers(layer: nn.Module, bundle: Bundle) -> list[tuple[torch.Tensor, int]]:
    return members_of(layer.state_dict(), bundle, bundle.weight(bundle.reader))


def choose_ffn_ranking(axes: Sequence[LayerAxes], recipe: LibraryRecipe) -> str:
    """What ``auto`` means: iterative where every layer's channel moments fit in the memory for statistics."""
    if recipe.ffn_ranking != "auto":
        return recipe.ffn_ranking
    needed = sum(8 * axis.ffn.size**2 for axis in axes if axis.ffn is not None and not axis.of_experts)
    return "iterative" if needed <= recipe.statistics_gib * 1024**3 else "contribution"


def probes_for(
    parent: Parent, axes: Sequence[LayerAxes], alternatives: Sequence[Alternative], ffn_ranking: str
) -> list[Probe]:
    """What has to be watched to make these alternatives."""
    kinds = {(a.layer, a.kind) for a in alternatives if a.method != "pool"}
    linear = {(a.layer, a.subblock) for a in alternatives if a.kind == "linear"}
    probes = []
    for i, own in enumerate(axes):
        layer = parent.layers[i]
        for part, axis, kind in (
            ("ffn", own.ffn, "expert_width" if own.of_experts else "ffn_width"),
            ("shared", own.shared, "shared_width"),
        ):
            if axis is not None and (i, kind) in kinds:
                probes += _width_probes(layer, i, part, axis, ffn_ranking)
        for heads, name, of_kind in (
            (own.kv, f"{i}.attention", ("kv_heads", "head_groups", "query_heads")),
            (own.mixer or own.mixer_size, f"{i}.mixer", ("mixer_heads", "mixer_groups", "mixer_head_size")),
        ):
            if heads is None or not kinds & {(i, kind) for kind in of_kind}:
                continue
            for a, one in enumerate(heads.attentions if isinstance(heads, HeadsAxis) else (heads,)):
                blocks = one.blocks if isinstance(one, HeadsAxis) else 1
                channels = _matrix(layer.get_parameter(one.reader), one.reader_dim).shape[1] * blocks
                probes.append(Probe(numbered(name, a), i, one.output, "moment", 8 * channels**2, blocks=blocks))
        if own.state is not None and (i, "state_size") in kinds:
            module = common_module(layer, [w.name for w in own.state.weights])
            probes.append(Probe(f"{i}.state", i, module, "state", 8 * own.state.size, state=own.state))
        if own.experts is not None and (i, "experts") in kinds:
            bundle = expert_reader(parent, i, own)
            size = 8 * bundle.members * (bundle.size + bundle.members)
            probes.append(Probe(f"{i}.experts", i, expert_holder(layer, own, bundle), "reader", size, bundle))
        for subblock in SUBBLOCKS:
            if (i, subblock) in linear:
                ((module, record),) = linear_records(parent.descriptor, layer, subblock).items()
                probes.append(Probe(f"{i}.{subblock}.linear", i, module, "cross", 16 * record["size"] ** 2))
    return probes


def _width_probes(layer: nn.Module, i: int, part: str, axis: WidthAxis, ffn_ranking: str) -> list[Probe]:
    probes = []
    for b, bundle in enumerate(axis.bundles):
        name, module = f"{i}.{part}.{b}", bundle.output
        plain = not bundle.members and module != bundle.reader and input_dim(layer, bundle.reader) is not None
        if plain:
            kind = "moment" if ffn_ranking == "iterative" else "energy"
            size = bundle.size**2 if kind == "moment" else bundle.size
            probes.append(Probe(name, i, module, kind, 8 * size))
        else:
            size = max(1, bundle.members) * (bundle.size + bundle.members)
            holder = common_module(layer, [w.name for w in bundle.weights])
            if bundle.flat:  # a module around theirs takes the members apart
                holder = holder.rpartition(".")[0]
            probes.append(Probe(name, i, holder, "reader", 8 * size, bundle))
    return probes


def notes_on(
    descriptor: Any, blocks: Sequence[BlockConfig], axes: Sequence[LayerAxes], no_linear: Mapping[str, Sequence[str]]
) -> list[str]:
    """Sentences about what the library does not offer, or does not know exactly."""
    notes = []
    if not descriptor.attn_no_op_supported():
        notes.append(f"{descriptor.__name__} has no attention no-op, so no attention is removed.")
    if not descriptor.mlp_no_op_supported():
        notes.append(f"{descriptor.__name__} has no FFN no-op, so no FFN is removed.")
    for subblock, reasons in no_linear.items():
        there = [i for i, block in enumerate(blocks) if not block.subblock(subblock).no_op]
        notes += by_reason(
            {i: reasons[i] for i in there if reasons[i]}, len(there), f"The {subblock} is not replaced by a linear map"
        )
    words = {
        "ffn": "FFNs are not narrowed",
        "attention": "heads are not reduced",
        "experts": "experts are not removed",
        "shared": "shared experts are not narrowed",
        "mixer": "heads of mixers are not reduced",
        "mixer_size": "heads of mixers are not made smaller",
        "state": "states of mixers are not made smaller",
    }
    for subblock, what in words.items():
        found = {i: own.reasons[subblock] for i, own in enumerate(axes) if subblock in own.reasons}
        notes += by_reason(found, len(axes), what)
    estimates = getattr(descriptor, "estimates_cache", lambda index: False)
    why = "a layer does not keep keys and values of every token there, but something else too"
    notes += by_reason(
        {i: why for i in range(len(blocks)) if estimates(i)}, len(blocks), "What the KV cache takes is estimated"
    )
    return notes
