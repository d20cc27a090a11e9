"""Layers that are built alike and whose sizes other attributes set, e.g. those with a window and those without.

A kind of layer is what its classes are. Where two layers of a kind take their sizes from different attributes, as from
one number of heads for layers with a window and another for the rest, they are two kinds for all that is a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.model_descriptor.experiment import Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath, nested, value_at
from layersmith.model_descriptor.infer.sizes import Sizes, shapes_of_layers
from layersmith.modeling_layersmith import with_overrides


@dataclass(frozen=True)
class Split:
    """Layers of a kind in which some attributes that set sizes of its other layers do nothing.

    Attributes:
        kind: to which they belong by their classes.
        paths: the attributes that are tried.
        idle: those that do nothing.
        number: of the kind that they are.
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
    """Which kinds of layers are more than one kind.

    Args:
        config: of the model.
        classes: of its decoder layers.
        layers: the name of the list that holds them.
        of_layer: the kind of every layer.
        sizes: of every kind, found in its first layer.
    """
    found: list[Split] = []
    for k, own in enumerate(sizes):
        of_kind = [i for i, other in enumerate(of_layer) if other == k]
        named = (own.kv_heads, *own.query_heads, own.width, own.num_experts, own.expert_width, own.shared_width)
        paths = tuple(dict.fromkeys(path for path in named if path is not None))
        if len(of_kind) < 2 or not paths:
            continue
        idle = _idle(config, classes, layers, paths)
        for other in dict.fromkeys(idle[i] - idle[of_kind[0]] for i in of_kind):
            if other:
                found.append(Split(k, paths, other, len(sizes) + len(found)))
    return found


def split(
    config: PretrainedConfig,
    classes: Sequence[type[nn.Module]],
    layers: str,
    of_layer: Sequence[int],
    splits: Sequence[Split],
) -> list[int]:
    """The kind of every layer, where some kinds are more than one."""
    result = list(of_layer)
    idle = {paths: _idle(config, classes, layers, paths) for paths in dict.fromkeys(own.paths for own in splits)}
    for own in splits:
        for i, k in enumerate(of_layer):
            if k == own.kind and own.idle <= idle[own.paths][i]:
                result[i] = own.number
    return result


def _idle(
    config: PretrainedConfig, classes: Sequence[type[nn.Module]], layers: str, paths: Sequence[AttributePath]
) -> list[frozenset[AttributePath]]:
    """The attributes that change no shape of a layer, for every layer."""
    base = _shapes(config, classes, layers, None, 0)
    idle: list[set[AttributePath]] = [set() for _ in base]
    for path in paths:
        for factor in (2, 3):
            try:
                changed = _shapes(config, classes, layers, path, factor)
            except Exception:  # whatever a family's own code raises for a size that it cannot take
                continue
            for i, own in enumerate(base):
                if changed[i] == own:
                    idle[i].add(path)
            break
    return [frozenset(own) for own in idle]


def _shapes(
    config: PretrainedConfig, classes: Sequence[type[nn.Module]], layers: str, path: AttributePath | None, factor: int
) -> list[Shapes]:
    def configure(own: PretrainedConfig, index: int) -> PretrainedConfig:
        changes: dict[str, Any] = {} if path is None else nested(own, path, factor * value_at(own, path, index))
        return with_overrides(own, changes)

    return shapes_of_layers(config, classes, layers, configure)
