"""Kinds of layers under experiment: their shapes, and small models that run, with other values of config attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith import upstream
from layersmith.errors import UnsupportedModel, first_line
from layersmith.model_descriptor.experiment import Effect, LayersByChange, Shapes
from layersmith.model_descriptor.infer.attributes import (
    AttributePath,
    merged,
    nested,
    numbers,
    numbers_of_layer,
    value_at,
)
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import heterogeneous_layers, with_overrides

# Values of an attribute that is not set, to see whether it sets a size. At most one of them is what the size is anyway.
ANY_SIZES = (24, 40)

Values = Mapping[AttributePath, Any]


class Survey:
    """What every number attribute of a config does to the layers of a small model.

    Attributes:
        specimen: The small model.
        layer_classes: Classes of its decoder layers.
        layers_name: Name of the list that holds them.
        of_layer: Number of the kind of every layer.
        missing: Attributes that layers ask for and their config does not have.
        base: Shapes of every layer; empty if layers are not built from a config.
    """

    def __init__(
        self,
        specimen: Specimen,
        layer_classes: Sequence[type[nn.Module]],
        layers_name: str,
        of_layer: Sequence[int],
    ):
        self.specimen, self.layer_classes, self.layers_name = specimen, layer_classes, layers_name
        self.of_layer = list(of_layer)
        self.missing: list[str] = []
        self._layer_configs: list[PretrainedConfig] = []
        self._builds = LayersByChange(self._build)
        self.base = self._builds.shapes({}) or []
        refusal = self._builds.refusal({})
        if refusal is not None and not isinstance(refusal, TypeError):
            raise UnsupportedModel(f"its layers cannot be built a second time ({first_line(refusal)}).") from refusal

    def _build(self, overrides: dict[str, Any]) -> list[Shapes]:
        def configure(config: PretrainedConfig, index: int) -> PretrainedConfig:
            if not self._layer_configs:
                self._layer_configs.append(config)
            changed = with_overrides(config, overrides)
            return changed if overrides else noting_what_is_missing(changed, self.missing)

        return shapes_of_layers(self.specimen.config, self.layer_classes, self.layers_name, configure)

    @property
    def layer_config(self) -> PretrainedConfig:
        """The config that the first layer is built from."""
        return self._layer_configs[0]

    @property
    def examples(self) -> list[int]:
        """The first layer of every kind."""
        return [self.of_layer.index(number) for number in range(max(self.of_layer) + 1)]

    def overrides(self, values: Values) -> dict[str, Any]:
        """Overrides of a layer's config that set attributes."""
        overrides: dict[str, Any] = {}
        for path, value in values.items():
            overrides = merged(overrides, nested(self.layer_config, path, value))
        return overrides

    def shapes(self, values: Values, layer: int) -> Shapes | None:
        """Shapes of a layer once all layers have other values of attributes; None if the family refuses them."""
        shapes = self._builds.shapes(self.overrides(values))
        return None if shapes is None else shapes[layer]

    def value(self, path: AttributePath) -> int:
        """The number at ``path`` in the first layer; 0 for None."""
        return value_at(self.layer_config, path)

    def refusal(self, values: Values) -> str:
        """Why layers cannot be built with these values, in one line; empty if they can."""
        return self._builds.reason(self.overrides(values))

    def trials(self, kinds: Sequence[LayerKind]) -> list[Trial]:
        """Every kind of layer, with the effects of all attributes on its first layer."""
        layer_numbers = [numbers_of_layer(self.layer_config, len(self.base), i) for i in self.examples]
        effects: dict[AttributePath, list[Effect]] = {}
        for path, value in numbers(self.layer_config, len(self.base)):
            by_kind = self._effects(path, value)
            for k, numbers_of_kind in enumerate(layer_numbers):
                if by_kind and numbers_of_kind[path] != value:
                    by_kind[k] = (self._effects(path, numbers_of_kind[path]) or by_kind)[k]
            if by_kind:
                effects[path] = by_kind
        idle = tuple(path for path, by_kind in effects.items() if not any(by_kind))
        return [
            Trial(
                survey=self,
                kind=kind,
                index=self.examples[k],
                effects={path: by_kind[k] for path, by_kind in effects.items() if by_kind[k]},
                idle=frozenset(path for path, by_kind in effects.items() if not by_kind[k]),
                idle_everywhere=idle,
                numbers=layer_numbers[k],
            )
            for k, kind in enumerate(kinds)
        ]

    def _effects(self, path: AttributePath, value: int) -> list[Effect]:
        """What another value does to the first layer of every kind; empty if the family takes no other value."""
        for other in (2 * value, value // 2, value + 1) if value else ANY_SIZES:
            if other < 1 or other == value or self.shapes({path: other}, 0) is None:
                continue
            pairs = [(self.base[i], self.shapes({path: other}, i) or {}) for i in self.examples]
            by_kind = [Effect.between(base, changed, other) for base, changed in pairs]
            if any(by_kind) or value or other == ANY_SIZES[-1]:
                return by_kind  # otherwise the size may be that number anyway
        return []


@dataclass(frozen=True)
class Trial:
    """One kind of layer, and small models in which layers have other values of attributes.

    Attributes:
        survey: What is known of the model.
        kind: The kind of layer.
        index: The first layer of that kind.
        effects: Attribute to what another value does to that layer, where it does anything.
        idle: Attributes whose other values change no shape of that layer.
        idle_everywhere: Those of them that change no shape of a layer of any kind.
        numbers: Every number attribute to its value in that layer.
        alone: Whether only layers of this kind get other values.
    """

    survey: Survey
    kind: LayerKind
    index: int
    effects: Mapping[AttributePath, Effect]
    idle: frozenset[AttributePath] = frozenset()
    idle_everywhere: tuple[AttributePath, ...] = ()
    numbers: Mapping[AttributePath, int] = field(default_factory=dict)
    alone: bool = False

    @property
    def specimen(self) -> Specimen:
        return self.survey.specimen

    @property
    def base(self) -> Shapes:
        """Shapes of the layer as it is."""
        return self.survey.base[self.index]

    @property
    def layer_name(self) -> str:
        return f"{self.survey.layers_name}.{self.index}"

    @property
    def prefix(self) -> str:
        """What the names of the layer's weights begin with."""
        return f"{self.layer_name}."

    def ways(self) -> tuple[Trial, ...]:
        """First all layers get other values, then only those of this kind: the others may not take them."""
        return (self,) if len(set(self.survey.of_layer)) == 1 else (self, replace(self, alone=True))

    def value(self, path: AttributePath) -> int:
        return self.numbers.get(path) or self.survey.value(path)

    def shapes(self, values: Values) -> Shapes | None:
        """Shapes of the layer with other values of attributes; None if the family refuses them."""
        return self.survey.shapes(values, self.index)

    def specimen_with(self, values: Values, seed: int = 0, plain_attention: bool = False) -> Specimen | None:
        """A small model that has run with other values in its layers; None if it does not run.

        Args:
            values: Values of attributes.
            seed: Seed of the weights.
            plain_attention: Whether the model uses the unfused attention of Transformers.
        """
        try:
            return self._made(values, seed, plain_attention)
        except UnsupportedModel:
            return None

    def refusal(self, values: Values) -> str:
        """Why no such model runs, in one line; empty if it runs."""
        try:
            self._made(values)
        except UnsupportedModel as error:
            return first_line(error.__cause__ or error)
        return ""

    def _made(self, values: Values, seed: int = 0, plain_attention: bool = False) -> Specimen:
        overrides, config = self.survey.overrides(values), self.specimen.config

        def configure(config: PretrainedConfig, index: int) -> PretrainedConfig:
            stays = self.alone and self.survey.of_layer[index] != self.survey.of_layer[self.index]
            return config if stays else with_overrides(config, overrides)

        with heterogeneous_layers(self.survey.layer_classes, configure, lambda layer, index: None):
            return Specimen(upstream.with_plain_attention(config) if plain_attention else config, seed)


@dataclass(frozen=True)
class Candidate:
    """An attribute that may be a certain size of a kind of layer.

    Attributes:
        trial: The kind of layer.
        path: The attribute.
        effect: What another value of it does to the layer, or to a part of it.
    """

    trial: Trial
    path: AttributePath
    effect: Effect

    def __str__(self) -> str:
        return ".".join(self.path)

    @property
    def value(self) -> int:
        return self.trial.value(self.path)


def shapes_of_layers(
    config: PretrainedConfig,
    layer_classes: Sequence[type[nn.Module]],
    layers_name: str,
    configure: Callable[[PretrainedConfig, int], PretrainedConfig],
) -> list[Shapes]:
    """Shapes of all layers of a model, each built from what ``configure`` makes of the config for it."""
    with heterogeneous_layers(layer_classes, configure, lambda layer, index: None):
        layers = stock_model(config).get_submodule(layers_name)
    return [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers.children()]


def noting_what_is_missing(config: PretrainedConfig, missing: list[str]) -> PretrainedConfig:
    """The config, changed to note the attributes that it is asked for and does not have."""
    cls = type(config)

    class Noting(cls):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_") and name not in missing:
                missing.append(name)
            raise AttributeError(name)

    object.__setattr__(config, "__class__", Noting)
    return config
