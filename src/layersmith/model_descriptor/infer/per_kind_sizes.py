"""Layers that are built alike and whose sizes other attributes set, e.g. those with a window and those without.

A kind of layer is what its classes are. Where two layers of a kind take their sizes from different attributes, as from
one number of heads for layers with a window and another for the rest, they count as two kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from layersmith.model_descriptor.experiment import LayersByChange, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath, nested, value_at
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.trial import shapes_of_layers
from layersmith.modeling_layersmith import with_overrides


@dataclass(frozen=True)
class Split:
    """Layers of a kind in which some attributes that set sizes of its other layers do nothing.

    Attributes:
        kind: Number of the kind to which they belong by their classes.
        paths: The attributes that are tried.
        idle: Those of them that do nothing.
        number: Number of the kind that these layers become.
    """

    kind: int
    paths: tuple[AttributePath, ...]
    idle: frozenset[AttributePath]
    number: int


def splits_of(
    config: PretrainedConfig,
    classes: Sequence[type[nn.Module]],
    layers: str,
    of_layer: Sequence[int],
    sizes: Sequence[Sizes],
) -> list[Split]:
    """Kinds of layers that are more than one kind.

    Args:
        config: Config of the model.
        classes: Classes of its decoder layers.
        layers: Name of the list that holds them.
        of_layer: Number of the kind of every layer.
        sizes: Sizes of every kind, from its first layer.
    """
    splits: list[Split] = []
    for k, of_first in enumerate(sizes):
        of_kind = [i for i, other in enumerate(of_layer) if other == k]
        heads = (of_first.kv_heads, *of_first.query_heads)
        named = (*heads, of_first.width, of_first.num_experts, of_first.expert_width, of_first.shared_width)
        paths = tuple(dict.fromkeys(path for path in named if path is not None))
        if len(of_kind) < 2 or not paths:
            continue
        idle = _idle(config, classes, layers, paths)
        for other in dict.fromkeys(idle[i] - idle[of_kind[0]] for i in of_kind):
            if other:
                splits.append(Split(kind=k, paths=paths, idle=other, number=len(sizes) + len(splits)))
    return splits


def split(
    config: PretrainedConfig,
    classes: Sequence[type[nn.Module]],
    layers: str,
    of_layer: Sequence[int],
    splits: Sequence[Split],
) -> list[int]:
    """The kind of every layer, where some kinds are more than one."""
    result = list(of_layer)
    idle = {paths: _idle(config, classes, layers, paths) for paths in dict.fromkeys(part.paths for part in splits)}
    for part in splits:
        for i, k in enumerate(of_layer):
            if k == part.kind and part.idle <= idle[part.paths][i]:
                result[i] = part.number
    return result


def _idle(
    config: PretrainedConfig, classes: Sequence[type[nn.Module]], layers: str, paths: Sequence[AttributePath]
) -> list[frozenset[AttributePath]]:
    """The attributes that change no shape of a layer, for every layer."""

    def build(change: tuple[AttributePath, int] | None) -> list[Shapes]:
        def configure(layer_config: PretrainedConfig, index: int) -> PretrainedConfig:
            if change is None:
                return layer_config
            path, factor = change
            return with_overrides(
                layer_config, nested(layer_config, path, factor * value_at(layer_config, path, index))
            )

        return shapes_of_layers(config, classes, layers, configure)

    builds = LayersByChange(build)
    base = builds.shapes(None) or []
    idle: list[set[AttributePath]] = [set() for _ in base]
    for path in paths:
        tried = (builds.shapes((path, factor)) for factor in (2, 3))
        changed = next((shapes for shapes in tried if shapes is not None), None)
        for i, shapes in enumerate(changed or ()):
            if shapes == base[i]:
                idle[i].add(path)
    return [frozenset(paths_of_layer) for paths_of_layer in idle]
