"""Builds a language model whose decoder layers differ from one another. layersmith wrote this file and the checkpoint.

Load the folder that holds this file with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``; this
needs torch and Transformers, and no layersmith. The entry ``layersmith`` of ``config.json`` is the plan of the model:
for each decoder layer its config overrides, its replaced modules, and its slot in the KV cache. This file builds the
stock Transformers class of the config's ``model_type`` with the layers of the plan, for any model family.

It is longer than a module should be because it must work alone in every folder that layersmith writes. For the same
reason it uses some private names of Transformers itself.
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
# Transformers repeats it in its error if a program builds the model from its config without this file.
HOW_TO_LOAD = "none: the layers of this model differ; pass trust_remote_code=True, or import layersmith before"

# ---------------------------------------------------------------------------------------------- replaced modules


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError("a replaced module was called without a tensor")


class MatchingZeros(nn.Module):
    """Returns zeros like its first tensor argument, in the place of a subblock that then adds nothing.

    Args:
        size: Size of the last dimension. Default: the input's.
    """

    def __init__(self, size: int | None = None):
        super().__init__()
        self.size = size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = first_tensor(args, kwargs)
        return torch.zeros_like(given) if self.size is None else given.new_zeros(*given.shape[:-1], self.size)


class Same(nn.Module):
    """Returns its first tensor argument unchanged, in the place of a removed norm."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return first_tensor(args, kwargs)


class LinearSubblock(nn.Module):
    """One linear map in the place of a whole subblock; ``[..., hidden_size] -> [..., hidden_size]``."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.linear(first_tensor(args, kwargs))


class PassArgument(nn.Module):
    """Returns one of its arguments, in the place of a subblock that adds the residual itself.

    Args:
        argument: Position or name of the argument.
    """

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
        cls: Class of a module that returns one tensor.
        size: Length of the tuple.
        as_list: Return a list instead of a tuple.
        names: Field names; with them the result is a namedtuple.
        passes: Pairs of a place in the tuple and the position or name of the argument that is returned there.
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

    The keys of a record:
        ``is``: ``"zeros"``, ``"same"``, ``"argument"`` or ``"linear"``.
        ``returns``: Length of the tuple that the module returns; 0 for a tensor.
        ``list``, ``names``, ``passes``: The arguments of :func:`return_tuple_of_size`.
        ``of``: Position or name of the argument to return.
        ``size``: Size of the linear map, or of the zeros where it differs from the input's.
        ``attributes``: Attributes that the model reads from the original module, with their values.
        ``empty``: Weights of the original module of which the model reads only the dtype or device.
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


# ---------------------------------------------------------------------------------------------- building layers

LAYER_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
_INDEX_NAMES = (*LAYER_INDEX_NAMES, "idx", "i")
_construction = threading.RLock()


@contextmanager
def heterogeneous_layers(
    layer_classes: Sequence[type[nn.Module]],
    configure: Callable[[PretrainedConfig, int], PretrainedConfig],
    finish: Callable[[nn.Module, int], None],
) -> Iterator[None]:
    """While open, each decoder layer that is constructed gets a config for its index and is finished by a callback.

    The classes are restored when the context closes, also after an error.

    Args:
        layer_classes: The decoder layer classes of the model.
        configure: ``(config of the model, layer index) -> config of the layer``; must not change its argument.
        finish: Called with each constructed layer and its index.
    """
    originals = [(cls, cls.__init__, "__init__" in vars(cls)) for cls in layer_classes]
    built_from: dict[int, tuple[nn.Module, PretrainedConfig]] = {}  # holds the module, so that its id is not reused
    under_construction: set[int] = set()  # a listed class may call another listed class's __init__
    late_buffers = _LateBuffers()
    constructed = 0

    def patch(cls: type[nn.Module], original: Callable[..., None]) -> None:
        signature = inspect.signature(original)

        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nonlocal constructed
            if id(self) in under_construction or late_buffers.building:
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
            late_buffers.note(self, bound.arguments[config_name])

        __init__.__wrapped__ = original  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]

    with _construction, _initialized_by(built_from), late_buffers.by_layer():
        try:
            for cls, original, _ in originals:
                patch(cls, original)
            yield
        finally:
            for cls, original, is_defined_here in originals:
                if is_defined_here:
                    cls.__init__ = original  # type: ignore[method-assign]
                else:
                    del cls.__init__


@contextmanager
def _initialized_by(built_from: dict[int, tuple[nn.Module, PretrainedConfig]]) -> Iterator[None]:
    """While open, a model initializes the weights of a module by the config that the module was built from.

    Some families read sizes from the model's config there, e.g. the number of heads of a mixer.
    """
    original = PreTrainedModel._initialize_weights

    def _initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        _, layer_config = built_from.get(id(module), (module, None))
        model_config = self.config
        if type(layer_config) is type(model_config):
            self.config = layer_config
        try:
            original(self, module, *args, **kwargs)
        finally:
            self.config = model_config

    PreTrainedModel._initialize_weights = _initialize_weights  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original  # type: ignore[method-assign]


class _LateBuffers:
    """Buffers that a model adds to its layers once they are built, with sizes from the model's config.

    A layer with another config gets the buffers that a model of that config would give it.
    """

    def __init__(self) -> None:
        self.building = False  # a model of a layer's config is being built
        self.layers: dict[int, tuple[nn.Module, PretrainedConfig, set[str]]] = {}

    def note(self, layer: nn.Module, config: PretrainedConfig) -> None:
        """Record the buffers of a layer before its model adds others."""
        self.layers[id(layer)] = layer, config, {name for name, _ in layer.named_buffers()}

    @contextmanager
    def by_layer(self) -> Iterator[None]:
        """While open, a model that is constructed ends with buffers of each layer's sizes."""
        original = PreTrainedModel.post_init

        def post_init(model: PreTrainedModel) -> None:
            original(model)
            if not self.building:
                self.exchange(model)

        PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
        try:
            yield
        finally:
            PreTrainedModel.post_init = original  # type: ignore[method-assign]

    def exchange(self, model: PreTrainedModel) -> None:
        wanted: dict[str, tuple[PretrainedConfig, list[str]]] = {}  # the late buffers of the layers with each config
        for path, module in model.named_modules():
            _, config, before = self.layers.pop(id(module), (None, None, set()))
            if type(config) is type(model.config) and (late := unsaved_buffers(module) - before):
                assert config is not None
                wanted.setdefault(_config_key(config), (config, []))[1].extend(f"{path}.{name}" for name in late)
        wanted.pop(_config_key(model.config) if wanted else "", None)
        for config, names in wanted.values():
            for name, values in self.built_by(type(model), config, names).items():
                path, _, buffer_name = name.rpartition(".")
                part = model.get_submodule(path)
                buffer = part._buffers[buffer_name]
                assert buffer is not None
                part.__dict__.setdefault(_LAYER_BUFFERS, {})[buffer_name] = values.to(buffer.dtype), buffer.shape
        if wanted:
            place_layer_buffers(model)

    def built_by(
        self, cls: type[PreTrainedModel], config: PretrainedConfig, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The named buffers of a model of a config, as far as initializing its weights sets them."""
        self.building = True
        try:
            with torch.device("meta"):
                model = cls(with_overrides(config, {}))
        finally:
            self.building = False
        for name in names:
            path, _, buffer_name = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            if (buffer := buffers.get(buffer_name)) is not None:
                buffers[buffer_name] = torch.full_like(buffer, torch.nan, device="cpu")
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            # initialize_weights would skip modules without weights in classes that do not come with Transformers.
            for module in model.modules():
                model._init_weights(module)
        # A buffer that is not set there keeps the model's size; where the size matters, the layer does not run.
        return {n: b for n, b in model.named_buffers() if n in names and not b.isnan().any()}


_LAYER_BUFFERS = "_layersmith_buffers"


def _config_key(config: PretrainedConfig) -> str:
    """A key that equal configs share. It leaves out the plan of a child, which is the same for all layers."""
    return repr(sorted((k, repr(v)) for k, v in vars(config).items() if k not in ("layersmith", "block_configs")))


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers of a module that are not in its ``state_dict``."""
    return {name for name, _ in module.named_buffers()} - module.state_dict().keys()


def place_layer_buffers(model: nn.Module, of_model: bool = False) -> None:
    """Replace buffers that have the model's sizes by those of each layer's sizes.

    Args:
        model: A model, or one of its layers.
        of_model: Do the reverse: put empty buffers of the model's sizes there, for code that fills all layers alike.
    """
    for part in model.modules():
        for name, (values, shape) in part.__dict__.get(_LAYER_BUFFERS, {}).items():
            old = part._buffers[name]
            assert old is not None
            new = torch.empty(shape, dtype=old.dtype, device=old.device) if of_model else values
            part._buffers[name] = new.to(old.device, old.dtype)


def _config_argument(arguments: dict[str, Any]) -> str | None:
    return next((name for name, value in arguments.items() if isinstance(value, PretrainedConfig)), None)


def _index_argument(arguments: dict[str, Any]) -> int | None:
    for name in _INDEX_NAMES:
        if type(arguments.get(name)) is int:
            return arguments[name]
    return None


def with_overrides(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """A copy of a config with some attributes set; a mapping for a nested config sets its attributes."""
    # The plan of a child is only read. Copying it for each layer would take most of the time.
    shared = [config.__dict__.get(name) for name in ("layersmith", "block_configs")]
    changed = copy.deepcopy(config, {id(part): part for part in shared if part is not None})
    for name, value in overrides.items():
        if value is None:
            continue
        current = changed.__dict__.get(name)
        if isinstance(current, PretrainedConfig) and isinstance(value, dict):
            setattr(changed, name, with_overrides(current, value))
        elif name in (getattr(changed, "per_layer_attributes", None) or ()):
            # The family's config already differs by layer, so the override goes into the entries of all layers.
            entries = {int(i): entry for i, entry in changed.to_dict()["per_layer_config"].items()}
            every = sorted({*range(changed.num_hidden_layers), *entries})
            changed.per_layer_config = {i: entries.get(i, {}) | {name: value} for i in every}
        elif type(value) is float and type(current) is int:
            # The config class declares a multiple as an int, since stock models have whole ones; a layer's may not be.
            changed.__dict__[name] = value
        else:
            setattr(changed, name, value)
    return changed


def resize(layer: nn.Module, shapes: dict[str, list[int | None]]) -> None:
    """Replace weights of a layer by random ones of other shapes, for sizes that no config attribute sets.

    A None in a shape keeps that dimension. Integers of the modules that were equal to a changed dimension, e.g.
    ``in_features``, change with it.
    """
    for name, shape in shapes.items():
        path, _, weight_name = name.rpartition(".")
        module = layer.get_submodule(path)
        old = module.get_parameter(weight_name)
        lengths = [before if after is None else after for before, after in zip(old.shape, shape, strict=True)]
        new = torch.empty(lengths, dtype=old.dtype, device=old.device)
        if not new.is_meta:
            nn.init.normal_(new, std=0.02)
        setattr(module, weight_name, nn.Parameter(new, requires_grad=old.requires_grad))
        changed = {a: b for a, b in zip(old.shape, lengths, strict=True) if a != b}
        for attribute, value in list(vars(module).items()):
            if type(value) is int and value in changed:
                setattr(module, attribute, changed[value])


def renumber(layer: nn.Module, numbers: dict[str, dict[str, int | float]]) -> None:
    """Set plain numbers of a layer's modules, where a config attribute would change other modules too."""
    for name, values in numbers.items():
        vars(layer.get_submodule(name)).update(values)


KEPT_ENTRIES = "kept_"


def take_entries(layer: nn.Module, shared: dict[str, dict[str, int]]) -> None:
    """Let modules of a layer take only some entries of arguments that all layers share, such as rotary embeddings.

    Which entries of the last dimension these are is a weight of the module, with the name of the argument.

    Args:
        layer: A decoder layer.
        shared: Module to the name of an argument to the number of entries that it takes.
    """

    def taken(given: Any, kept: torch.Tensor) -> Any:
        if isinstance(given, torch.Tensor):
            return given.index_select(-1, kept.to(given.device))
        return type(given)(taken(part, kept) for part in given) if isinstance(given, tuple | list) else given

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        buffers = module._buffers
        kept = {name: buffer for name in kwargs if (buffer := buffers.get(KEPT_ENTRIES + name)) is not None}
        return args, {n: taken(given, kept[n]) if n in kept else given for n, given in kwargs.items()}

    for name, lengths in shared.items():
        module = layer.get_submodule(name)
        for argument, length in lengths.items():
            module.register_buffer(KEPT_ENTRIES + argument, torch.arange(length))
        module.register_forward_pre_hook(before, with_kwargs=True)


# ---------------------------------------------------------------------------------------------- the KV cache


def cache_slots(has_attention: Sequence[bool], layer_types: Sequence[str] | None = None) -> list[int]:
    """The cache slot of every layer.

    Transformers reads the length of the cached sequence from slot 0, and the mask sizes of a layer type (full or
    sliding) from the first slot of that type. If the layer there has no attention, the slot stays empty and every
    generated token is taken for the first. So the first attention layer of a type uses the first slot of the type; all
    other layers use the slot of their index.
    """
    types = list(layer_types) if layer_types else [""] * len(has_attention)
    slots = list(range(len(has_attention)))
    for layer_type in set(types):
        members = [i for i, other in enumerate(types) if other == layer_type]
        first = next((i for i in members if has_attention[i]), None)
        if first is not None:
            slots[first] = members[0]
    return slots


def cache_layer_types(has_attention: Sequence[bool], layer_types: Sequence[str]) -> list[str]:
    """``layer_types`` in which every type of attention has a layer that fills its cache slots.

    The type of a layer without attention matters only to its cache slot. So if no layer of its type has attention any
    more, it takes the type of the first layer that has.
    """
    kept = [kind for kind, present in zip(layer_types, has_attention, strict=True) if present and _has_keys(kind)]
    gone = {kind for kind in layer_types if _has_keys(kind)} - set(kept)
    return [kept[0] if kept and kind in gone else kind for kind in layer_types]


def _has_keys(layer_type: str) -> bool:
    """Whether layers of a type cache keys and values rather than a state of fixed size."""
    stateful = ("linear", "conv", "mamba", "recurrent", "moe", "mlp", "dummy")
    return not any(word in layer_type for word in stateful)


def set_cache_slot(layer: nn.Module, slot: int, within: Sequence[str] | None = None) -> None:
    """Let the attention of a decoder layer use ``slot`` of the KV cache.

    A layer with several attentions uses as many consecutive slots.

    Args:
        layer: A decoder layer.
        slot: Index of the slot in the cache.
        within: Names of the modules that make up the attention. Default: the whole layer.
    """
    inside = tuple(f"{name}." for name in within or ())
    numbered = [
        (module, name)
        for path, module in layer.named_modules()
        for name in LAYER_INDEX_NAMES
        if path and type(module.__dict__.get(name)) is int and (within is None or f"{path}.".startswith(inside))
    ]
    indices = sorted({getattr(module, name) for module, name in numbered})
    for module, name in numbered:
        setattr(module, name, slot * len(indices) + indices.index(getattr(module, name)))


def rounded_cache(x: torch.Tensor, name: str) -> torch.Tensor:
    """Keys or values ``[batch, heads, tokens, head size]`` as a KV cache in a number format gives them back.

    ``fp8`` is E4M3 without a scale, as vLLM has it. ``int4`` has 16 levels between the least and the largest number of
    each head and token, as the quantized cache of Transformers. Gradients pass as if nothing was rounded.
    """
    numbers = x.detach().float()
    if name == "fp8":
        rounded = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    elif name == "int4":
        low, high = (bound.half().float() for bound in (numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)))
        scale = ((high - low) / 15).half().float()
        levels = (numbers - low) / torch.where(scale == 0, 1.0, scale)
        rounded = levels.round().clamp(0, 15) * scale + low
    else:
        raise ValueError(f"no KV cache has the number format {name}")
    return rounded.to(x.dtype) + (x - x.detach())


class RoundingCache:
    """Rounds keys and values before a cache keeps them; without a cache they are only rounded."""

    def __init__(self, cache: Any, name: str):
        self._cache, self._name = cache, name

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = rounded_cache(keys, self._name), rounded_cache(values, self._name)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def round_cache_of(layer: nn.Module, name: str) -> None:
    """Let a decoder layer keep its keys and values in a number format."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "past_key_values": RoundingCache(kwargs.get("past_key_values"), name)}

    layer.register_forward_pre_hook(before, with_kwargs=True)


# ---------------------------------------------------------------------------------------------- the plan in config.json


@contextmanager
def layers_of_plan(config: PretrainedConfig) -> Iterator[None]:
    """Open :func:`heterogeneous_layers` for the plan in the entry ``layersmith`` of a config."""
    plan = config.layersmith
    records = plan["layers"]

    def configure(layer_config: PretrainedConfig, index: int) -> PretrainedConfig:
        return with_overrides(layer_config, records[index]["config"]) if index < len(records) else layer_config

    def finish(layer: nn.Module, index: int) -> None:
        if index >= len(records):
            return
        resize(layer, records[index].get("shapes", {}))
        renumber(layer, records[index].get("numbers", {}))
        take_entries(layer, records[index].get("shared_entries", {}))
        for name, record in records[index]["modules"].items():
            layer.set_submodule(name, make_replacement(record))
        set_cache_slot(layer, records[index]["cache_slot"], records[index].get("cached"))
        if name := records[index].get("kv_cache_format"):
            round_cache_of(layer, name)

    with heterogeneous_layers([_import(name) for name in plan["decoder_layers"]], configure, finish):
        yield


@contextmanager
def built_layer_types(config: PretrainedConfig) -> Iterator[None]:
    """While open, a child's config has the layer types that select the classes of its layers.

    They can differ from the types that its cache needs (see :func:`cache_layer_types`), which the config has otherwise.
    """
    built_types = (getattr(config, "layersmith", None) or {}).get("built_layer_types")
    if not built_types:
        yield
        return
    language = _text_config(config)
    cache_types = language.layer_types
    language.layer_types = built_types
    try:
        yield
    finally:
        language.layer_types = cache_types


def _import(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    cls: Any = None
    if module.startswith("transformers.models."):
        cls = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module) or issubclass(cls, PreTrainedModel):
        raise ValueError(f"decoder layer class {name}: only layers of Transformers' models can be named in a plan")
    return cls


def without_guard(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a checkpoint's config without the two entries that :func:`finish_folder` wrote as a guard.

    They make code that would build all layers alike stop with an error: ``attn_implementation``, which no program has,
    says in the error how to load the checkpoint, and ``per_layer_config`` stops who names another one. Code that
    follows the plan needs neither. Entries that the parent's config already had stay.
    """
    config = copy.deepcopy(config)
    plan = getattr(config, "layersmith", None)
    if plan is None and not getattr(config, "block_configs", None):
        return config
    for part in {id(c): c for c in (config, _text_config(config))}.values():
        if getattr(part, "is_heterogeneous", False):
            native = (plan or {}).get("native_per_layer_config")
            part.per_layer_config = {int(i): entry for i, entry in native.items()} if native else None
    if config._attn_implementation == HOW_TO_LOAD:
        config._attn_implementation = None
    return config


def as_parent(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config without anything that makes its layers differ: the config of the parent."""
    config = without_guard(config)
    if built_types := (getattr(config, "layersmith", None) or {}).get("built_layer_types"):
        _text_config(config).layer_types = built_types
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
    except ValueError:  # the config has several text configs
        return config


# ---------------------------------------------------------------------------------------------- model classes


class HeterogeneousMixin:
    """Makes a stock model class build, load and save layers that differ. See :func:`heterogeneous_class`."""

    layers_of: Callable[[PretrainedConfig], Any] = staticmethod(layers_of_plan)
    completed: Callable[[PretrainedConfig], PretrainedConfig] = staticmethod(without_guard)

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = type(self).completed(config)
        with type(self).layers_of(config), built_layer_types(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Like the stock method, but missing, unused or misshapen weights are an error; none is made up."""
        wants_info = kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None)
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, config=without_guard(config), output_loading_info=True, **kwargs
        )
        if not model.can_generate():  # a model without a head does not use the head of the checkpoint
            prefix = cls.base_model_prefix + "."  # type: ignore[attr-defined]
            info["unexpected_keys"] = [name for name in info["unexpected_keys"] if name.startswith(prefix)]
        refuse_incomplete(info, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    def initialize_weights(self) -> None:
        # The stock method fills buffers of all layers with values of the sizes in the model's config.
        place_layer_buffers(self, of_model=True)  # type: ignore[arg-type]
        super().initialize_weights()  # type: ignore[misc]
        place_layer_buffers(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Like the stock method; the folder also gets this file and the guard (see :func:`without_guard`)."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for cls in (type(self), type(self.config)):  # type: ignore[attr-defined]
            copy_remote_code(cls, Path(save_directory))
        finish_folder(Path(save_directory))

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        self._tell_layers("_attn_implementation_internal")

    def set_experts_implementation(self, experts_implementation: Any, *args: Any, **kwargs: Any) -> None:
        super().set_experts_implementation(experts_implementation, *args, **kwargs)  # type: ignore[misc]
        self._tell_layers("_experts_implementation_internal")

    def _tell_layers(self, name: str) -> None:
        """Give an attribute of the model's config to the configs of the layers, which stock code cannot reach."""
        value = getattr(_text_config(self.config), name)  # type: ignore[attr-defined]
        for module in self.modules():  # type: ignore[attr-defined]
            layer_config = getattr(module, "config", None)
            if isinstance(layer_config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
                setattr(layer_config, name, value)

    def _get_static_cache_init_shape(self) -> None:
        # The stock method would give every layer the KV heads of the model's config. With None, each layer takes its
        # shape from its first keys.
        return None


def heterogeneous_class(
    stock_class: type[PreTrainedModel],
    layers_of: Callable[[PretrainedConfig], Any] | None = None,
    completed: Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> type[PreTrainedModel]:
    """A subclass of ``stock_class`` with :class:`HeterogeneousMixin` and the same name.

    Args:
        stock_class: A model class of Transformers.
        layers_of: Opens the context in which a model of a config is built. Default: :func:`layers_of_plan`.
        completed: Adds the plan to a config without one. Default: :func:`without_guard`.
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
    """Raise ``ValueError`` if loading left weights of the model unset or weights of the checkpoint unused.

    Args:
        info: What ``from_pretrained(output_loading_info=True)`` returns with the model.
        where: Path or name of the checkpoint, for the message.
    """
    for key, what in (
        ("missing_keys", "has no weights for"),
        ("mismatched_keys", "has weights of another shape for"),
        ("unexpected_keys", "has weights that the model of its config.json does not have:"),
    ):
        names = sorted(
            name if isinstance(name, str) else f"{name[0]} ({list(name[1])} instead of {list(name[2])})"
            for name in info.get(key) or ()
        )
        names = [name for name in names if not name.endswith(("inv_freq", "masked_bias"))]
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {what} {', '.join(names[:3])}{rest}; nothing was loaded.")


def finish_folder(folder: Path) -> None:
    """Add this file, its entry in ``auto_map`` and the guard to the folder of a saved model."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["auto_map"] = {**data.get("auto_map", {}), **AUTO_MAP}
    plan = data["layersmith"]
    language = data[plan["text_config"]] if plan.get("text_config") else data
    native = plan.get("native_per_layer_config") or {}
    guard = {i: native.get(i, {}) | entry for i, entry in plan["per_layer_config"].items()}
    language["per_layer_config"] = native | guard
    data["attn_implementation"] = HOW_TO_LOAD
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / FILE_NAME).write_bytes(Path(__file__).read_bytes())


def remote_code(config: PretrainedConfig) -> dict[str, str]:
    """The ``auto_map`` of a config whose classes come with its checkpoint; empty for any other config.

    The config class was imported from the checkpoint, so the user has allowed its code to run.
    """
    if not type(config).__module__.startswith("transformers_modules."):
        return {}
    plan = getattr(config, "layersmith", None) or {}
    return dict(plan.get("remote") or getattr(config, "auto_map", None) or {})


def remote_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model class that comes with a checkpoint; None if no class does."""
    name = remote_code(config).get("AutoModelForCausalLM")
    if name is None or FILE_NAME.removesuffix(".py") in name:
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, config._name_or_path)


def copy_remote_code(cls: type, folder: Path) -> None:
    """Copy the Python files of a class that came with a checkpoint into a folder."""
    for base in cls.__mro__:
        if base.__module__.startswith("transformers_modules."):
            for file in Path(inspect.getfile(base)).parent.glob("*.py"):
                if file.name not in ("__init__.py", FILE_NAME):
                    (folder / file.name).write_bytes(file.read_bytes())
            return


def model_class_for(config: PretrainedConfig, mappings: Sequence[Any]) -> type[PreTrainedModel] | None:
    """The model class for a config in the first auto mapping of Transformers that has one.

    The text config of a multimodal model may be in no mapping, although its causal model is built from it. Then the
    class is looked up by the multimodal config.
    """
    for mapping in mappings:
        if (model_class := model_class_in(mapping, type(config))) is not None:
            return model_class
    for mapping in mappings:
        for name in sorted(mapping._model_mapping, key=len, reverse=True):
            if config.model_type.startswith(name) and name in CONFIG_MAPPING:
                model_class = model_class_in(mapping, CONFIG_MAPPING[name])
                if model_class is not None and model_class.config_class is type(config):
                    return model_class
    return None


def model_class_in(mapping: Any, config_class: type[PretrainedConfig]) -> type[PreTrainedModel] | None:
    """The model class for a config class in an auto mapping of Transformers; None if it has none.

    Transformers may have registered a factory of this file in the mapping; that is not a model class.
    """
    if config_class not in mapping:
        return None
    entry = mapping[config_class]
    entry = entry[0] if isinstance(entry, tuple) else entry
    return entry if isinstance(entry, type) and issubclass(entry, PreTrainedModel) else None


class _Factory:
    """Loads the stock class of the config's ``model_type``, made heterogeneous. ``auto_map`` names the subclasses."""

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
        """Does nothing: Transformers calls this on remote classes, and ``finish_folder`` writes ``auto_map``."""


class HeterogeneousModel(_Factory):
    """``AutoModel`` for a layersmith checkpoint."""

    mappings = (MODEL_MAPPING,)


class HeterogeneousModelForCausalLM(_Factory):
    """``AutoModelForCausalLM`` for a layersmith checkpoint."""

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
