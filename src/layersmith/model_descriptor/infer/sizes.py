"""Which config attributes set the sizes of a layer, found by building layers that differ in one attribute.

Everything is built on the meta device. An attribute that changes shapes in a layer governs them; which shapes says
what it is: key-value heads change what the projections give but not what the last one takes. What an FFN's sizes are is
told in ``ffn_sizes.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.experiment import Effect, Shapes, parameter_shapes
from layersmith.model_descriptor.infer.attributes import (
    AttributePath,
    merged,
    nested,
    numbers,
    numbers_of_layer,
    value_at,
)
from layersmith.model_descriptor.infer.ffn import FFNSizes, OwnExperts, experts_per_token, own_experts, unsaid_width
from layersmith.model_descriptor.infer.kv_heads import NOT_UNDERSTOOD, OF_QUERIES, find_kv_heads, keys_need_queries
from layersmith.model_descriptor.infer.mixers import MixerSizes, find_mixer
from layersmith.model_descriptor.infer.query_heads import find_query_heads
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import own_layers, with_overrides

# Of an attribute that is not set, to see whether it sets a size; at most one of them is what the size is without it.
ANY_SIZES = (24, 40)


@dataclass(frozen=True)
class Sizes:
    """The attributes that set a kind of layer's sizes; None where there is none.

    Attributes:
        kv_heads: number of key-value heads.
        width: width of a dense FFN.
        num_experts, expert_width, shared_width, experts_per_token: of a mixture of experts.
        config_width: what the config calls a width of 1, for the widths; some families halve what the config says.
        query_heads: number of query heads, and whatever must be equal to it.
        head_size: what sets the size of a head and has to be said when their number changes.
        no_query_heads, no_kv_heads: why there is no number of them, where that was seen.
        keys: number of heads of the keys in the cache, where it is no number of KV heads that can differ alone.
        heads_elsewhere: number of query heads in other kinds of layers that changes shapes of this one too.
        head_blocks: of the projection that heads end in, in a small model; each reads its share of the heads.
        head_pairs: whether two heads work together, one of either half of all, and end next to each other.
        resized: weights of an FFN whose width no attribute says, and the dimension of each that is as long as it.
        width_at, shared_width_at: a weight of the layer, and a dimension of it, that are as long as the width.
        mixer: of a Mamba or linear-attention mixer that keeps a state.
        flat: weights in which experts lie one after another along the first dimension, each as long as the width.
        experts_of_both: whether the number of experts, and of those that a token uses, is the attention's too.
        own_experts: what is built of these numbers in the FFN, where it is.
    """

    kv_heads: AttributePath | None = None
    width: AttributePath | None = None
    num_experts: AttributePath | None = None
    expert_width: AttributePath | None = None
    shared_width: AttributePath | None = None
    experts_per_token: AttributePath | None = None
    config_width: int = 1
    query_heads: tuple[AttributePath, ...] = ()
    head_size: tuple[AttributePath, int] | None = None
    width_at: tuple[str, int] | None = None
    shared_width_at: tuple[str, int] | None = None
    resized: tuple[tuple[str, int], ...] = ()
    mixer: MixerSizes | None = None
    flat: tuple[str, ...] = ()
    experts_of_both: bool = False
    own_experts: OwnExperts | None = None
    no_query_heads: str = ""
    head_blocks: int = 1
    head_pairs: bool = False
    no_kv_heads: str = ""
    keys: AttributePath | None = None
    heads_elsewhere: AttributePath | None = None


def shapes_of_layers(
    config: PretrainedConfig,
    layer_classes: Sequence[type[nn.Module]],
    layers_name: str,
    configure: Callable[[PretrainedConfig, int], PretrainedConfig],
) -> list[Shapes]:
    """Shapes of all layers, each built from what is made of the config for it."""
    with own_layers(layer_classes, configure, lambda layer, index: None):
        layers = stock_model(config).get_submodule(layers_name)
    return [parameter_shapes(layer) for layer in layers.children()]


def find_sizes(
    specimen: Specimen,
    layer_classes: Sequence[type[nn.Module]],
    layers_name: str,
    kinds: Sequence[LayerKind],
    of_layer: Sequence[int],
) -> list[Sizes]:
    """The attributes of every kind of layer.

    Args:
        specimen: the model.
        layer_classes: of its decoder layers.
        layers_name: of the list that holds them.
        kinds: the kinds of layers.
        of_layer: the kind of every layer.
    """
    layer_configs: list[PretrainedConfig] = []
    missing: list[str] = []

    built: dict[str, list[Shapes] | Exception] = {}

    def shapes(overrides: dict[str, Any]) -> list[Shapes]:
        """Shapes of all layers; kinds of layers, and attributes, ask for many of them more than once."""
        key = repr(overrides)
        if key not in built:
            try:
                built[key] = build(overrides)
            except Exception as error:  # whatever a family's own code raises for a size that it cannot take
                built[key] = error
        found = built[key]
        if isinstance(found, Exception):
            raise found
        return found

    def build(overrides: dict[str, Any]) -> list[Shapes]:
        def configure(own: PretrainedConfig, index: int) -> PretrainedConfig:
            layer_configs.append(own)
            changed = with_overrides(own, overrides)
            return changed if overrides else _noting_what_is_missing(changed, missing)

        return shapes_of_layers(specimen.config, layer_classes, layers_name, configure)

    try:
        base = shapes({})
    except TypeError:  # its layers are not built from a config
        return [Sizes()] * len(kinds)
    config = layer_configs[0]
    examples = [list(of_layer).index(kind) for kind in range(len(kinds))]
    effects: dict[AttributePath, list[Effect]] = {}
    without: list[AttributePath] = []

    def effects_of(path: AttributePath, value: int) -> list[Effect]:
        """What another value does to an example of every kind; nothing is noted where none can be built."""
        for other in (2 * value, value // 2, value + 1) if value else ANY_SIZES:
            if other < 1 or other == value:
                continue
            try:
                changed = shapes(nested(config, path, other))
            except Exception:  # whatever a family's own code raises for a size that it cannot take
                continue
            found = [Effect.between(base[i], changed[i], other) for i in examples]
            if any(found) or value or other == ANY_SIZES[-1]:
                return found  # else it may be what the size is anyway
        return []

    of_kinds = [numbers_of_layer(config, len(base), i) for i in examples]
    for path, value in numbers(config, len(base)):
        found = effects_of(path, value)
        for k, own_numbers in enumerate(of_kinds):
            if found and own_numbers[path] != value:
                found[k] = (effects_of(path, own_numbers[path]) or found)[k]
        if any(found):
            effects[path] = found
        elif found:
            without.append(path)
    found_sizes = []
    for k, kind in enumerate(kinds):
        own = {path: effect[k] for path, effect in effects.items() if effect[k]}
        trial = Trial(
            specimen,
            layer_classes,
            config,
            f"{layers_name}.{examples[k]}.",
            tuple(dict.fromkeys(missing)),
            partial(_of_layer, shapes, examples[k]),
            tuple(i for i, own_kind in enumerate(of_layer) if own_kind == k),
            numbers=of_kinds[k],
        )
        kv_heads, no_kv_heads, of_keys = find_kv_heads(trial, kind, base[examples[k]], own)
        named = list(of_kinds[k].items())
        idle = {*without, *effects} - own.keys()
        queries = find_query_heads(trial, kind, base[examples[k]], own, named, idle, kv_heads)
        unknown = no_kv_heads == NOT_UNDERSTOOD and queries.paths
        if unknown and keys_need_queries(trial, own, of_keys, queries.paths[0]):
            no_kv_heads = OF_QUERIES
        ffn = FFNSizes(trial, kind, base[examples[k]], own)
        mixer = find_mixer(trial, kind, base[examples[k]], own, without)
        heads = Sizes(
            kv_heads,
            query_heads=queries.paths,
            head_size=queries.pin,
            no_query_heads=queries.reason,
            head_blocks=queries.blocks,
            head_pairs=queries.pairs,
            no_kv_heads=no_kv_heads,
            keys=next((path for path in of_keys if path not in queries.paths), None),
            mixer=mixer,
        )
        if mixer is not None and (mixer.num_heads or mixer.state_dim) and mixer.is_alone:
            heads = replace(heads, query_heads=(), head_size=None)
        if ffn.count is None:
            width, factor, at = ffn.widest(inside=False)
            resized = unsaid_width(specimen, kind, base[examples[k]]) if width is None else ()
            at = resized[0] if resized else at
            found_sizes.append(replace(heads, width=width, config_width=factor, width_at=at, resized=resized))
            continue
        expert_width, factor, at = ffn.widest(inside=True)
        shared_width, shared_factor, shared_at = ffn.widest(inside=False)
        alike = shared_factor == factor
        per_token = experts_per_token(trial, without, ffn)
        found_sizes.append(
            replace(
                heads,
                num_experts=ffn.count,
                expert_width=expert_width,
                shared_width=shared_width if alike else None,
                experts_per_token=per_token,
                config_width=factor,
                width_at=at,
                shared_width_at=shared_at if alike else None,
                flat=ffn.flat,
                experts_of_both=ffn.of_both,
                own_experts=own_experts(ffn, per_token),
            )
        )

    def elsewhere(k: int) -> AttributePath | None:
        for other in found_sizes:
            for path in other.query_heads[:1]:
                more = nested(config, path, 2 * value_at(config, path))
                if other.head_size is not None:
                    more = merged(more, nested(config, *other.head_size))
                with suppress(Exception):  # whatever a family's own code raises for a size that it cannot take
                    if shapes(more)[examples[k]] != base[examples[k]]:
                        return path
        return None

    return [own if own.query_heads else replace(own, heads_elsewhere=elsewhere(k)) for k, own in enumerate(found_sizes)]


def _of_layer(shapes: Callable[[dict[str, Any]], list[Shapes]], index: int, overrides: dict[str, Any]) -> Shapes:
    return shapes(overrides)[index]


def _noting_what_is_missing(config: PretrainedConfig, missing: list[str]) -> PretrainedConfig:
    """The config, changed to note the attributes that it is asked for and does not have."""
    cls = type(config)

    class Noting(cls):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_"):
                missing.append(name)
            raise AttributeError(name)

    object.__setattr__(config, "__class__", Noting)
    return config


@dataclass(frozen=True)
class Trial:
    """Specimens whose layers have other configs, and the shapes of such a layer.

    Attributes:
        specimen: the model.
        layer_classes: of its layers.
        config: of a layer.
        prefix: of the names of a layer of the kind in question.
        missing: attributes that a layer asks for and its config does not have.
        built: gives the shapes of that layer with other values of attributes.
        alike: the layers of its kind.
        alone: whether only they get other values, and all others stay.
        numbers: attributes to what they are in that layer.
    """

    specimen: Specimen
    layer_classes: Sequence[type[nn.Module]]
    config: PretrainedConfig
    prefix: str
    missing: tuple[str, ...]
    built: Callable[[dict[str, Any]], Shapes]
    alike: tuple[int, ...] = ()
    alone: bool = False
    numbers: Mapping[AttributePath, int] = field(default_factory=dict)

    def ways(self) -> tuple[Trial, ...]:
        """All layers with other values, then only those of the kind: what is twice there may be so in these alone."""
        others = len(self.alike) < len(self.layer_names)
        return (self, replace(self, alone=True)) if others else (self,)

    @property
    def layer_name(self) -> str:
        return self.prefix.rstrip(".")

    @property
    def index(self) -> int:
        return int(self.layer_name.rpartition(".")[2])

    @property
    def layer_names(self) -> list[str]:
        layers = self.layer_name.rpartition(".")[0]
        return [name for name, _ in self.specimen.model.get_submodule(layers).named_children()]

    def value(self, path: AttributePath) -> int:
        return self.numbers.get(path) or value_at(self.config, path)

    def made(self, path: AttributePath, value: int, seed: int = 0) -> Specimen:
        """A specimen that has run, with another value of an attribute in the layers."""
        return self.made_with({path: value}, seed)

    def made_with(self, values: Mapping[AttributePath, Any], seed: int = 0) -> Specimen:
        """A specimen that has run, with other values of attributes in the layers."""
        with self._changed(values):
            return Specimen(self.specimen.config, seed)

    def _changed(self, values: Mapping[AttributePath, Any]) -> AbstractContextManager[None]:
        overrides = self._overrides(values)

        def configure(config: PretrainedConfig, index: int) -> PretrainedConfig:
            return config if self.alone and index not in self.alike else with_overrides(config, overrides)

        return own_layers(self.layer_classes, configure, lambda layer, index: None)

    def runs_unfused(self, values: Mapping[AttributePath, Any]) -> bool:
        """Whether a specimen with other values of attributes in the layers runs with Transformers' plain attention."""
        config = copy.deepcopy(self.specimen.config)
        config._attn_implementation = "eager"
        try:
            with self._changed(values):
                Specimen(config, 0)
        except UnsupportedModel:
            return False
        return True

    def _overrides(self, values: Mapping[AttributePath, Any]) -> dict[str, Any]:
        overrides: dict[str, Any] = {}
        for path, value in values.items():
            overrides = merged(overrides, nested(self.config, path, value))
        return overrides

    def shapes(self, path: AttributePath, value: int) -> Shapes:
        """The shapes of the layer with another value of an attribute."""
        return self.shapes_with({path: value})

    def shapes_with(self, values: Mapping[AttributePath, Any]) -> Shapes:
        return self.built(self._overrides(values))

    def runs(self, path: AttributePath, value: int) -> bool:
        try:
            self.made(path, value)
        except UnsupportedModel:
            return False
        return True
