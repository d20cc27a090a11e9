"""Builds a library: gathers statistics of the parent's activations and ranks the units of every axis by them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import nn

from layersmith.execution.layerwise import NotLayerwise, split_layers
from layersmith.execution.parent import Parent, as_stored
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library import ranking
from layersmith.library.axes.axis import Bundle, HeadsAxis, LayerAxes, WidthAxis, numbered
from layersmith.library.layerwise_statistics import gather_layerwise
from layersmith.library.library import Library
from layersmith.library.probes import probes_for
from layersmith.library.ranking import as_matrix
from layersmith.library.slicing import members_of
from layersmith.library.statistics import Calibration, gather
from layersmith.library.survey import Survey
from layersmith.recipe import LibraryRecipe
from layersmith.run import ranks

Tensors = dict[str, torch.Tensor]


def build_library(parent: Parent, recipe: LibraryRecipe, survey: Survey, calibration: Calibration) -> Library:
    """The library of a parent: gather statistics and rank all units by them.

    All processes of a launcher call this. The rankings are in the library of the first.

    Args:
        parent: The parent.
        recipe: The memory for statistics.
        survey: The axes and alternatives.
        calibration: The rows over which statistics are gathered.
    """
    library = Library(
        parent=parent, axes=survey.axes, alternatives=survey.alternatives, orders={}, maps={}, notes=survey.notes
    )
    mine = _rank(library, recipe, survey, calibration)
    of_all = {i: of_layer for of_process in ranks.to_first(mine) for i, of_layer in of_process.items()}
    rankings = _Rankings(survey.ffn_ranking)
    for _, of_layer in sorted(of_all.items()):
        rankings.add(of_layer)
    library.orders, library.maps, library.importance = rankings.orders, rankings.maps, rankings.importance
    return library


def _rank(library: Library, recipe: LibraryRecipe, survey: Survey, calibration: Calibration) -> dict[int, _Rankings]:
    """The rankings of each layer of which this process has the means."""
    parent, rankings = library.parent, {}
    with closing(_means(library, recipe, survey, calibration)) as means:
        for i, of_layer in means:
            rankings[i] = _Rankings(survey.ffn_ranking)
            rankings[i].add_layer(parent.layer(i), i, survey.axes[i], of_layer)
            # As they will be stored: the first process gets those of all layers.
            rankings[i].maps = {name: as_stored(weight, parent.dtype) for name, weight in rankings[i].maps.items()}
    return rankings


def _means(
    library: Library, recipe: LibraryRecipe, survey: Survey, calibration: Calibration
) -> Generator[tuple[int, Tensors], None, None]:
    """The means of layers: of all of them in the first process, or of a divided parent in each those of its layers."""
    parent = library.parent
    probes = probes_for(parent, survey.axes, survey.alternatives, survey.ffn_ranking)
    if parent.stream is not None:
        with suppress(NotLayerwise):
            yield from gather_layerwise(split_layers(parent, library, by_all=True), probes, calibration)
            return
    means = gather(parent, probes, calibration, memory_bytes=recipe.statistics_gib * 1024**3)
    if ranks.is_first():
        yield from zip(range(len(survey.axes)), repeat(means))


@dataclass
class _Rankings:
    """Orders, maps and importance curves of a library, under its names; see :class:`Library`."""

    ffn_ranking: str
    orders: Tensors = field(default_factory=dict)
    maps: Tensors = field(default_factory=dict)
    importance: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, others: _Rankings) -> None:
        self.orders |= others.orders
        self.maps |= others.maps
        self.importance |= others.importance

    def add_layer(self, layer: nn.Module, i: int, axes: LayerAxes, means: Tensors) -> None:
        """Rank all units of a layer for which there are means."""
        for part, width in (("ffn", axes.ffn), ("shared", axes.shared)):
            if width is not None:
                self._add_width(layer, f"{i}.{part}", width, means)
        for heads, name, within in ((axes.kv, "attention", "queries"), (axes.mixer, "mixer", "mixer_heads")):
            if heads is not None:
                self._add_heads(layer, f"{i}.{name}", f"{i}.{within}", heads, means)
        if axes.mixer_size is not None and (name := f"{i}.mixer") in means:
            weight = as_matrix(layer.get_parameter(axes.mixer_size.reader), axes.mixer_size.reader_dim)
            self.orders[f"{i}.mixer_size"] = ranking.head_size_order(weight, axes.mixer_size, means[name])
        if (name := f"{i}.state") in means:
            self.orders[name] = ranking.by_cost(means[name])
        for axis in axes.inner:
            if (name := f"{i}.inner.{axis.name}") in means:
                self.orders[name] = ranking.by_cost(means[name].view(axis.groups, -1))
                self.orders |= {energy: means[energy] for n in axis.norms if (energy := f"{i}.energy.{n}") in means}
        if (name := f"{i}.experts.members") in means:
            order = ranking.by_method(means[name], "iterative")
            self.orders[f"{i}.experts"] = order
            self.importance[f"{i}.experts"] = ranking.error_curve(means[name].double().cpu(), order)
        for subblock in SUBBLOCKS:
            name = f"{i}.{subblock}.linear"
            if f"{name}.input" in means:
                solved = ranking.least_squares(means[f"{name}.input"], means[f"{name}.output"])
                self.maps[f"{i}.{subblock}"] = solved.float()

    def _add_width(self, layer: nn.Module, prefix: str, axis: WidthAxis, means: Tensors) -> None:
        for b, bundle in enumerate(axis.bundles):
            name = f"{prefix}.{b}"
            if name in means:
                costs = ranking.channel_costs(output_weight(layer, bundle), means[name])
                self.orders[name] = ranking.by_method(costs, self.ffn_ranking)
                self.importance[name] = ranking.error_curve(costs, self.orders[name])
            elif f"{name}.channels" in means:
                readers = members_of(layer.state_dict(), bundle, bundle.weight(bundle.reader))
                norms = torch.stack([as_matrix(*reader).float().square().sum(0).cpu() for reader in readers])
                costs = means[f"{name}.channels"] * norms
                self.orders[name] = ranking.by_cost(costs if bundle.members else costs[0])

    def _add_heads(self, layer: nn.Module, groups: str, within: str, axis: HeadsAxis, means: Tensors) -> None:
        for a, heads in enumerate(axis.attentions):
            name = numbered(groups, a)
            if name in means:
                weight = as_matrix(layer.get_parameter(heads.reader), heads.reader_dim)
                self.orders[name], self.orders[numbered(within, a)], costs = ranking.head_orders(
                    weight, heads, means[name]
                )
                self.importance[name] = ranking.error_curve(costs, self.orders[name])


def output_weight(layer: nn.Module, bundle: Bundle) -> torch.Tensor:
    """The weight ``[outputs, inputs]`` of the projection that reads a bundle, whichever way round it is stored."""
    return as_matrix(layer.get_parameter(bundle.reader), bundle.reader_dim)
