"""Models whose layers differ, for stock Transformers. Written by layersmith; needs only torch and Transformers.

A copy of it lies in every checkpoint that layersmith writes, named in ``auto_map``, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` builds the model where layersmith is not
installed. The layersmith package itself uses this same file.

The checkpoint's ``config.json`` says everything that is built here, in its entry ``layersmith``: for every decoder
layer the config attributes that differ from the model's own, the modules that are replaced, and the slot of the KV
cache that its attention uses. No model family is known by name.

It is longer than a module should be because it has to be one file.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

FILE_NAME = "modeling_layersmith.py"
AUTO_MAP = {
    "AutoModel": "modeling_layersmith.HeterogeneousModel",
    "AutoModelForCausalLM": "modeling_layersmith.HeterogeneousModelForCausalLM",
}

# ---------------------------------------------------------------------------------------------- replaced modules


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError("a replaced module was called without a tensor")


class MatchingZeros(nn.Module):
    """Zeros of the shape, dtype and device of its first tensor argument: a subblock that adds nothing.

    Args:
        size: of the last dimension, where it is another one.
    """

    def __init__(self, size: int | None = None):
        super().__init__()
        self.size = size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _first_tensor(args, kwargs)
        return torch.zeros_like(given) if self.size is None else given.new_zeros(*given.shape[:-1], self.size)


class Same(nn.Module):
    """Its first tensor argument, unchanged: a norm that is not there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _first_tensor(args, kwargs)


class LinearSubblock(nn.Module):
    """One linear map in the place of a whole subblock; ``[..., hidden_size] -> [..., hidden_size]``."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.linear(_first_tensor(args, kwargs))


class PassArgument(nn.Module):
    """One of its arguments, by position or name: a subblock that adds the residual itself, and adds nothing to it."""

    def __init__(self, argument: int | str):
        super().__init__()
        self.argument = argument

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]


def return_tuple_of_size(
    cls: type[nn.Module],
    size: int,
    as_list: bool = False,
    names: Sequence[str] = (),
    passes: Sequence[tuple[int, int | str]] = (),
) -> type[nn.Module]:
    """A subclass of ``cls`` that returns ``(output, None, ...)`` of length ``size``, as attention layers do.

    Args:
        cls: a class of modules.
        size: of the tuple.
        as_list: whether it is a list.
        names: of its parts, if they have some.
        passes: places in the tuple at which it gives one of its arguments, and that argument's position or name.
    """
    named: Any = namedtuple("Parts", names)  # type: ignore[misc]
    made = named._make if names else list if as_list else tuple

    class ReturnsTuple(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            parts = [super().forward(*args, **kwargs), *[None] * (size - 1)]
            given: dict[Any, Any] = dict(enumerate(args)) | kwargs
            for place, argument in passes:
                parts[place] = given.get(argument)
            return made(parts)

    ReturnsTuple.passes = passes
    ReturnsTuple.__name__ = ReturnsTuple.__qualname__ = f"{cls.__name__}ReturnsTuple{size}"
    return ReturnsTuple


def make_replacement(record: dict[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """The module that a plan's record describes.

    A record is ``{"is": "zeros" | "same" | "argument" | "linear", "returns": tuple size or 0}``; ``"list": True`` if
    the tuple is a list, ``"names"`` its fields if it has some, ``"passes"`` the places in it that hold arguments, with
    each one's position or name, ``"of"`` names the argument, ``"size"`` the size of the linear map, or of the zeros
    where that is not the input's, ``"attributes"`` what the model asks of the module that was there, and ``"empty"``
    the weights of it whose dtype or device the model asks.
    """
    kinds: dict[str, type[nn.Module]] = {
        "zeros": MatchingZeros,
        "same": Same,
        "argument": PassArgument,
        "linear": LinearSubblock,
    }
    cls = kinds[record["is"]]
    if record.get("returns"):
        form = (record.get("list", False), record.get("names", ()), record.get("passes", ()))
        cls = return_tuple_of_size(cls, record["returns"], *form)
    size = record.get("size")
    arguments = {"zeros": [size], "argument": [record.get("of")], "linear": [size, dtype]}.get(record["is"], [])
    module = cls(*arguments)
    for name, value in record.get("attributes", {}).items():
        setattr(module, name, value)
    for name in record.get("empty", ()):
        module.register_buffer(name, torch.empty(0), persistent=False)
    return module


# ---------------------------------------------------------------------------------------------- layers of their own

LAYER_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
_INDEX_NAMES = (*LAYER_INDEX_NAMES, "idx", "i")
_construction = threading.RLock()


@contextmanager
def own_layers(
    layer_classes: Sequence[type[nn.Module]],
    configure: Callable[[PretrainedConfig, int], PretrainedConfig],
    finish: Callable[[nn.Module, int], None],
) -> Iterator[None]:
    """While open, a decoder layer that is constructed gets its own config and is finished by a callback.

    Args:
        layer_classes: the decoder layer classes of the model.
        configure: ``(model's config, layer index) -> layer's config``; must not change what it is given.
        finish: called with each layer after its construction, and its index.

    The classes are as before when the context closes, however it closes.
    """
    originals = [(cls, cls.__init__, "__init__" in vars(cls)) for cls in layer_classes]
    built_from: dict[int, tuple[nn.Module, PretrainedConfig]] = {}  # with the module, so that its id stays its own
    under_construction: set[int] = set()  # a listed class may call another listed class's __init__
    given = _GivenBuffers()
    constructed = 0

    def patch(cls: type[nn.Module], original: Callable[..., None]) -> None:
        signature = inspect.signature(original)

        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nonlocal constructed
            if id(self) in under_construction or given.asking:
                original(self, *args, **kwargs)
                return
            bound = signature.bind(self, *args, **kwargs)
            config_name = _config_argument(bound.arguments)
            if config_name is None:
                raise TypeError(f"{cls.__name__} is built without a config; its layers cannot differ")
            index = _index_argument(bound.arguments)
            if index is None:
                index = constructed
            constructed += 1
            bound.arguments[config_name] = configure(bound.arguments[config_name], index)
            under_construction.add(id(self))
            try:
                original(*bound.args, **bound.kwargs)
            finally:
                under_construction.discard(id(self))
            built_from.update((id(m), (m, bound.arguments[config_name])) for m in self.modules())
            finish(self, index)
            given.note(self, bound.arguments[config_name])

        __init__.__wrapped__ = original  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]

    with _construction, _initialized_by(built_from), given.by_layer():
        try:
            for cls, original, _ in originals:
                patch(cls, original)
            yield
        finally:
            for cls, original, is_own in originals:
                if is_own:
                    cls.__init__ = original  # type: ignore[method-assign]
                else:
                    del cls.__init__


@contextmanager
def _initialized_by(built_from: dict[int, tuple[nn.Module, PretrainedConfig]]) -> Iterator[None]:
    """While open, a model starts the weights of a module by the config that the module was built from.

    Some families read sizes off the model's own config there, e.g. how many numbers a mixer's heads start with.
    """
    original = PreTrainedModel._initialize_weights

    def _initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        _, own = built_from.get(id(module), (module, None))
        models = self.config
        if own is not None and type(own) is type(models):
            self.config = own
        try:
            original(self, module, *args, **kwargs)
        finally:
            self.config = models

    PreTrainedModel._initialize_weights = _initialize_weights  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original  # type: ignore[method-assign]


class _GivenBuffers:
    """Buffers that a model, once it has its layers, gives them all by its own config.

    A layer whose config is another gets what a model of that config gives its layers.
    """

    def __init__(self) -> None:
        self.asking = False  # a model of a layer's config is being built
        self.layers: dict[int, tuple[nn.Module, PretrainedConfig, set[str]]] = {}

    def note(self, layer: nn.Module, config: PretrainedConfig) -> None:
        """Take down what a layer has before its model gives it more."""
        self.layers[id(layer)] = layer, config, {name for name, _ in layer.named_buffers()}

    @contextmanager
    def by_layer(self) -> Iterator[None]:
        """While open, a model that is constructed has each layer's own in the end."""
        original = PreTrainedModel.post_init

        def post_init(model: PreTrainedModel) -> None:
            original(model)
            if not self.asking:
                self.exchange(model)

        PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
        try:
            yield
        finally:
            PreTrainedModel.post_init = original  # type: ignore[method-assign]

    def exchange(self, model: PreTrainedModel) -> None:
        wanted: dict[str, tuple[PretrainedConfig, list[str]]] = {}  # of each config, the names of what layers are given
        for path, module in model.named_modules():
            _, config, before = self.layers.pop(id(module), (None, None, set()))
            if type(config) is type(model.config) and (late := unsaved_buffers(module) - before):
                assert config is not None
                wanted.setdefault(_said(config), (config, []))[1].extend(f"{path}.{name}" for name in late)
        wanted.pop(_said(model.config) if wanted else "", None)
        for config, names in wanted.values():
            for name, values in self.given_by(type(model), config, names).items():
                path, _, own_name = name.rpartition(".")
                part = model.get_submodule(path)
                models = part._buffers[own_name]
                assert models is not None
                part.__dict__.setdefault(_OWN, {})[own_name] = values.to(models.dtype), models.shape
        if wanted:
            give_own_buffers(model)

    def given_by(
        self, cls: type[PreTrainedModel], config: PretrainedConfig, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Buffers that a model of a config has, those that it sets when it starts its weights."""
        self.asking = True
        try:
            with torch.device("meta"):
                model = cls(with_overrides(config, {}))
        finally:
            self.asking = False
        for name in names:
            path, _, own_name = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            if (buffer := buffers.get(own_name)) is not None:
                buffers[own_name] = torch.full_like(buffer, torch.nan, device="cpu")
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            # Not initialize_weights: of a class that is not Transformers' own, that leaves out what has no weights.
            for module in model.modules():
                model._init_weights(module)
        # What it does not set then is left as it is; where its size matters, the layer does not run.
        return {n: b for n, b in model.named_buffers() if n in names and not b.isnan().any()}


_OWN = "_layersmith_own_buffers"


def _said(config: PretrainedConfig) -> str:
    """What a config says, but for a child's plan, which speaks of all layers."""
    return repr(sorted((k, repr(v)) for k, v in vars(config).items() if k not in ("layersmith", "block_configs")))


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that a ``state_dict`` does not hold."""
    return {name for name, _ in module.named_buffers()} - module.state_dict().keys()


def give_own_buffers(model: nn.Module, models: bool = False) -> None:
    """Put the buffers of layers whose sizes differ where those stand that a model, or another one, gives all layers.

    Args:
        model: or a layer.
        models: put fresh ones of the model's shape there instead, for what fills all alike.
    """
    for part in model.modules():
        for name, (own, shape) in part.__dict__.get(_OWN, {}).items():
            there = part._buffers[name]
            assert there is not None
            new = torch.empty(shape, dtype=there.dtype, device=there.device) if models else own
            part._buffers[name] = new.to(there.device, there.dtype)


def _config_argument(arguments: dict[str, Any]) -> str | None:
    return next((name for name, value in arguments.items() if isinstance(value, PretrainedConfig)), None)


def _index_argument(arguments: dict[str, Any]) -> int | None:
    for name in _INDEX_NAMES:
        if type(arguments.get(name)) is int:
            return arguments[name]
    return None


def with_overrides(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """A copy of a config with some attributes set; a mapping for a nested config sets its attributes."""
    # A child's plan speaks of all layers and is only read: copies for every layer of it would be most of the work.
    shared = [config.__dict__.get(name) for name in ("layersmith", "block_configs")]
    own = copy.deepcopy(config, {id(part): part for part in shared if part is not None})
    for name, value in overrides.items():
        if value is None:
            continue
        nested = own.__dict__.get(name)
        if isinstance(nested, PretrainedConfig) and isinstance(value, dict):
            setattr(own, name, with_overrides(nested, value))
        elif name in (getattr(own, "per_layer_attributes", None) or ()):
            # A family whose own config differs by layer: the override holds whichever layer asks, also one without an
            # entry there.
            entries = {int(i): entry for i, entry in own.to_dict()["per_layer_config"].items()}
            every = sorted({*range(own.num_hidden_layers), *entries})
            own.per_layer_config = {i: entries.get(i, {}) | {name: value} for i in every}
        elif type(value) is float and type(nested) is int:
            # A multiple that is a whole number in every stock config, and so said to be one: a layer's own need not be.
            own.__dict__[name] = value
        else:
            setattr(own, name, value)
    return own


def resize(layer: nn.Module, shapes: dict[str, list[int | None]]) -> None:
    """Give weights of a layer other shapes, for sizes that no config attribute says; what they hold is fresh.

    None in a shape is a length that stays. Plain numbers of their modules that were equal to a size that changes, e.g.
    ``in_features``, change with it.
    """
    for name, shape in shapes.items():
        path, _, own_name = name.rpartition(".")
        module = layer.get_submodule(path)
        old = module.get_parameter(own_name)
        lengths = [was if own is None else own for was, own in zip(old.shape, shape, strict=True)]
        new = torch.empty(lengths, dtype=old.dtype, device=old.device)
        if not new.is_meta:
            nn.init.normal_(new, std=0.02)
        setattr(module, own_name, nn.Parameter(new, requires_grad=old.requires_grad))
        changed = {a: b for a, b in zip(old.shape, lengths, strict=True) if a != b}
        for attribute, value in list(vars(module).items()):
            if type(value) is int and value in changed:
                setattr(module, attribute, changed[value])


def renumber(layer: nn.Module, numbers: dict[str, dict[str, int]]) -> None:
    """Give modules of a layer other plain numbers, where a config attribute would change those of others too."""
    for name, values in numbers.items():
        vars(layer.get_submodule(name)).update(values)


# ---------------------------------------------------------------------------------------------- the KV cache


def cache_slots(has_attention: Sequence[bool], layer_types: Sequence[str] | None = None) -> list[int]:
    """The cache slot of every layer.

    Transformers reads the length of the sequence so far from slot 0, and the mask sizes of a layer type (full or
    sliding) from the first slot of that type. If the layer there has no attention, nothing ever fills the slot and
    every later token is taken for the first. So the first attention layer of a type moves into the first slot of the
    type; all others keep the slot of their own index.
    """
    types = list(layer_types) if layer_types else [""] * len(has_attention)
    slots = list(range(len(has_attention)))
    for own in set(types):
        members = [i for i, layer_type in enumerate(types) if layer_type == own]
        first = next((i for i in members if has_attention[i]), None)
        if first is not None:
            slots[first] = members[0]
    return slots


def cache_layer_types(has_attention: Sequence[bool], layer_types: Sequence[str]) -> list[str]:
    """``layer_types`` under which no type of attention is left without a layer that fills its slots.

    The type of a layer without attention matters to its cache slot alone. So if no layer of its type has attention
    any more, it takes the type of the first one that has.
    """
    kept = [own for own, present in zip(layer_types, has_attention, strict=True) if present and _has_keys(own)]
    gone = {own for own in layer_types if _has_keys(own)} - set(kept)
    return [kept[0] if kept and own in gone else own for own in layer_types]


def _has_keys(layer_type: str) -> bool:
    """Whether layers of a type keep keys and values, not a state."""
    stateful = ("linear", "conv", "mamba", "recurrent", "moe", "mlp", "dummy")
    return not any(word in layer_type for word in stateful)


def set_cache_slot(layer: nn.Module, slot: int, within: Sequence[str] | None = None) -> None:
    """Let the attention inside a decoder layer use ``slot`` of the KV cache.

    A layer with several attentions has as many slots, one after another.

    Args:
        layer: the layer.
        slot: of the cache.
        within: the modules that make up the attention; default: all of the layer.
    """
    inside = tuple(f"{name}." for name in within or ())
    numbered = [
        (module, name)
        for path, module in layer.named_modules()
        for name in LAYER_INDEX_NAMES
        if path and type(module.__dict__.get(name)) is int and (within is None or f"{path}.".startswith(inside))
    ]
    own = sorted({getattr(module, name) for module, name in numbered})
    for module, name in numbered:
        setattr(module, name, slot * len(own) + own.index(getattr(module, name)))


# ---------------------------------------------------------------------------------------------- the plan in config.json


@contextmanager
def layers_of_plan(config: PretrainedConfig) -> Iterator[None]:
    """Open :func:`own_layers` for the plan that a config carries under ``layersmith``."""
    plan = config.layersmith
    records = plan["layers"]

    def configure(layer_config: PretrainedConfig, index: int) -> PretrainedConfig:
        return with_overrides(layer_config, records[index]["config"]) if index < len(records) else layer_config

    def finish(layer: nn.Module, index: int) -> None:
        if index >= len(records):
            return
        resize(layer, records[index].get("shapes", {}))
        renumber(layer, records[index].get("numbers", {}))
        for name, record in records[index]["modules"].items():
            layer.set_submodule(name, make_replacement(record))
        set_cache_slot(layer, records[index]["cache_slot"], records[index].get("cached"))

    with own_layers([_import(name) for name in plan["decoder_layers"]], configure, finish):
        yield


@contextmanager
def built_layer_types(config: PretrainedConfig) -> Iterator[None]:
    """While open, a child's config has the layer types that its layers are built by.

    Where these differ from those of its cache (see :func:`cache_layer_types`), they say which class a layer has.
    """
    own = (getattr(config, "layersmith", None) or {}).get("built_layer_types")
    if not own:
        yield
        return
    language = _text_config(config)
    of_cache = language.layer_types
    language.layer_types = own
    try:
        yield
    finally:
        language.layer_types = of_cache


def _import(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    if not module.startswith("transformers."):
        raise ValueError(f"decoder layer class {name}: only classes of Transformers itself can be named in a plan")
    return getattr(importlib.import_module(module), attribute)


def without_guard(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a checkpoint's config without the ``per_layer_config`` that layersmith wrote.

    That entry is there so that code which builds all layers alike stops with an error. The plan says the same and
    more, so whoever follows the plan takes the guard off first. What a family's own config has there stays.
    """
    config = copy.deepcopy(config)
    plan = getattr(config, "layersmith", None)
    if plan is None and not getattr(config, "block_configs", None):
        return config
    for own in {id(c): c for c in (config, _text_config(config))}.values():
        if getattr(own, "is_heterogeneous", False):
            native = (plan or {}).get("native_per_layer_config")
            own.per_layer_config = {int(i): entry for i, entry in native.items()} if native else None
    return config


def as_parent(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a child's config without all that makes its layers differ; of any other config a plain copy."""
    config = without_guard(config)
    if own := (getattr(config, "layersmith", None) or {}).get("built_layer_types"):
        _text_config(config).layer_types = own
    remote = (getattr(config, "layersmith", None) or {}).get("remote")
    for name in ("block_configs", "layersmith", "auto_map"):
        if name in config.__dict__ and (name != "auto_map" or "modeling_layersmith" in str(config.auto_map)):
            delattr(config, name)
    if remote:
        config.auto_map = dict(remote)
    return config


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several of them
        return config


# ---------------------------------------------------------------------------------------------- model classes


class HeterogeneousMixin:
    """What a stock model class needs for layers that differ; :func:`heterogeneous_class` mixes it in."""

    layers_of: Callable[[PretrainedConfig], Any] = staticmethod(layers_of_plan)
    completed: Callable[[PretrainedConfig], PretrainedConfig] = staticmethod(without_guard)

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = type(self).completed(config)
        with type(self).layers_of(config), built_layer_types(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As the stock method, but weights that are missing or of another shape are an error, never invented."""
        wants_info = kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None)
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, config=without_guard(config), output_loading_info=True, **kwargs
        )
        if not model.can_generate():  # a model without a head has no use for the checkpoint's
            prefix = cls.base_model_prefix + "."  # type: ignore[attr-defined]
            info["unexpected_keys"] = [name for name in info["unexpected_keys"] if name.startswith(prefix)]
        refuse_incomplete(info, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    def initialize_weights(self) -> None:
        # What the stock method gives all layers has the shape that the model's own config says.
        give_own_buffers(self, models=True)  # type: ignore[arg-type]
        super().initialize_weights()  # type: ignore[misc]
        give_own_buffers(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the stock method; the folder also gets this file and the guard against building it without."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for cls in (type(self), type(self.config)):  # type: ignore[attr-defined]
            copy_remote_code(cls, Path(save_directory))
        finish_folder(Path(save_directory))

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        # Layers hold configs of their own, which the stock method does not reach.
        for module in self.modules():  # type: ignore[attr-defined]
            own = getattr(module, "config", None)
            if isinstance(own, PretrainedConfig) and not isinstance(module, PreTrainedModel):
                text_config = _text_config(self.config)  # type: ignore[attr-defined]
                own._attn_implementation_internal = text_config._attn_implementation_internal

    def _get_static_cache_init_shape(self) -> None:
        # The stock method would give every layer the KV heads of the model's config. None: let each layer's first
        # keys say its shape.
        return None


def heterogeneous_class(
    stock_class: type[PreTrainedModel],
    layers_of: Callable[[PretrainedConfig], Any] | None = None,
    completed: Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> type[PreTrainedModel]:
    """``stock_class`` with :class:`HeterogeneousMixin`, under the stock class's own name.

    Args:
        stock_class: a model class of Transformers.
        layers_of: opens the context in which a model of a given config is built; default: the config's plan.
        completed: adds the plan to a config that has none; default: takes the guard off, no more.
    """
    if issubclass(stock_class, HeterogeneousMixin) and layers_of is None:
        return stock_class
    body: dict[str, Any] = {"__module__": stock_class.__module__, "__doc__": stock_class.__doc__}
    if layers_of is not None:
        body["layers_of"] = staticmethod(layers_of)
    if completed is not None:
        body["completed"] = staticmethod(completed)
    return type(stock_class.__name__, (HeterogeneousMixin, stock_class), body)


def refuse_incomplete(info: dict[str, Any], where: str) -> None:
    """Raise ``ValueError`` if a load left weights unset, or left weights of the checkpoint unused."""
    for key, what in (
        ("missing_keys", "has no weights for"),
        ("mismatched_keys", "has weights of another shape for"),
        ("unexpected_keys", "has weights that its config.json knows no place for:"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in info.get(key) or ())
        names = [name for name in names if not name.endswith(("inv_freq", "masked_bias"))]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {what} {', '.join(names[:3])}{more}; nothing was loaded.")


def finish_folder(folder: Path) -> None:
    """Make a saved heterogeneous model self-contained: this file, ``auto_map``, and the guard."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["auto_map"] = {**data.get("auto_map", {}), **AUTO_MAP}
    plan = data["layersmith"]
    language = data[plan["text_config"]] if plan.get("text_config") else data
    native = plan.get("native_per_layer_config") or {}
    guard = {i: native.get(i, {}) | entry for i, entry in plan["per_layer_config"].items()}
    language["per_layer_config"] = native | guard
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / FILE_NAME).write_bytes(Path(__file__).read_bytes())


def remote_code(config: PretrainedConfig) -> dict[str, str]:
    """The ``auto_map`` of a config whose classes come with its checkpoint; empty for all others.

    Its config class has run from there, so running code from there was allowed.
    """
    if not type(config).__module__.startswith("transformers_modules."):
        return {}
    plan = getattr(config, "layersmith", None) or {}
    return dict(plan.get("remote") or getattr(config, "auto_map", None) or {})


def remote_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The causal model class that comes with a checkpoint, if there is one."""
    name = remote_code(config).get("AutoModelForCausalLM")
    if name is None or FILE_NAME.removesuffix(".py") in name:
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, config._name_or_path)


def copy_remote_code(cls: type, folder: Path) -> None:
    """Copy the code of a class that came with a checkpoint."""
    for base in cls.__mro__:
        if base.__module__.startswith("transformers_modules."):
            for file in Path(inspect.getfile(base)).parent.glob("*.py"):
                if file.name not in ("__init__.py", FILE_NAME):
                    (folder / file.name).write_bytes(file.read_bytes())
            return


def model_class_for(config: PretrainedConfig, mappings: Sequence[Any]) -> type[PreTrainedModel] | None:
    """The class that Transformers has for a config in one of its auto mappings, the first one that has any.

    A multimodal type's text config may be in none, though its causal model is built from that alone.
    """
    for mapping in mappings:
        if (found := model_class_in(mapping, type(config))) is not None:
            return found
    for mapping in mappings:
        for name in sorted(mapping._model_mapping, key=len, reverse=True):
            if config.model_type.startswith(name) and name in CONFIG_MAPPING:
                found = model_class_in(mapping, CONFIG_MAPPING[name])
                if found is not None and found.config_class is type(config):
                    return found
    return None


def model_class_in(mapping: Any, config_class: type[PretrainedConfig]) -> type[PreTrainedModel] | None:
    """The model class that one of Transformers' auto mappings has for a config class.

    Transformers registers what ``auto_map`` names in the mapping where it has nothing, so that a factory of this file
    may stand there; that is no model class.
    """
    if config_class not in mapping:
        return None
    found = mapping[config_class]
    found = found[0] if isinstance(found, tuple) else found
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


class _Factory:
    """What ``auto_map`` names: finds the stock class of the config's ``model_type`` and makes it heterogeneous."""

    mappings: tuple[Any, ...] = ()

    @classmethod
    def _class_for(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        stock = remote_class(config) or model_class_for(config, cls.mappings)
        if stock is None:
            raise ValueError(f"this version of Transformers has no model class for {type(config).__name__}")
        return heterogeneous_class(stock) if hasattr(config, "layersmith") else stock

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path)
        kwargs.pop("trust_remote_code", None)
        return cls._class_for(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        return cls._class_for(config)._from_config(without_guard(config), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Transformers calls this on remote classes; ``save_pretrained`` above writes ``auto_map`` itself."""


class HeterogeneousModel(_Factory):
    """``AutoModel`` for a layersmith checkpoint."""

    mappings = (MODEL_MAPPING,)


class HeterogeneousModelForCausalLM(_Factory):
    """``AutoModelForCausalLM`` for a layersmith checkpoint."""

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
