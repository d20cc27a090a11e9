"""The plan: a record of what a descriptor changes in each layer, stored in the checkpoint as data.

A checkpoint must load where the descriptor's code is not installed. So the callbacks of the descriptor run on a copy of
each layer, and the plan records which modules they replaced and what the new modules compute.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, NotRequired

import torch
from annotated_types import Len
from pydantic import Field, NonNegativeInt
from torch import nn
from transformers import PretrainedConfig
from typing_extensions import TypedDict

from layersmith.block_config import BlockConfig, has_attention
from layersmith.errors import UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.conventions import READ_BY_MODELS
from layersmith.modeling_layersmith import MatchingZeros, PassArgument, cache_slots
from layersmith.upstream import is_heterogeneous, per_layer_entries

SUBBLOCKS = ("attention", "ffn")
_Size = Annotated[int, Field(ge=1, le=2**31)]
_Replacement = TypedDict(
    "_Replacement",
    {
        "is": Literal["zeros", "same", "argument", "linear"],
        "of": NotRequired[int | str],
        "returns": NotRequired[Annotated[int, Field(ge=0, le=64)]],
        "list": NotRequired[bool],
        "names": NotRequired[list[str]],
        "passes": NotRequired[list[Annotated[list[int | str], Len(2, 2)]]],
        "size": NotRequired[_Size | None],
        "attributes": NotRequired[dict[str, str | int | float | bool | None]],
        "empty": NotRequired[list[str]],
    },
)


class _Layer(TypedDict):
    config: dict[str, Any]
    modules: dict[str, _Replacement]
    cache_slot: NonNegativeInt
    shapes: NotRequired[dict[str, list[_Size | None]]]
    numbers: NotRequired[dict[str, dict[str, int | float]]]
    shared_entries: NotRequired[dict[str, dict[str, Annotated[int, Field(ge=1, le=2**16)]]]]
    cached: NotRequired[list[str]]
    kv_cache_format: NotRequired[Literal["fp8", "int4"]]


class Plan(TypedDict):
    """The entry ``layersmith`` of a child's ``config.json``; see :func:`make_plan`."""

    decoder_layers: list[Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")]]
    layers: list[_Layer]
    per_layer_config: dict[str, dict[str, Any]]
    text_config: NotRequired[str]
    native_per_layer_config: NotRequired[dict[Annotated[str, Field(pattern=r"^\d+$")], dict[str, Any]]]
    built_layer_types: NotRequired[list[str]]
    remote: NotRequired[dict[str, str]]


NO_LINEAR = "no linear map can replace it"


def no_op_records(descriptor: type[ModelDescriptor], layer: nn.Module, *subblocks: str) -> dict[str, dict[str, Any]]:
    """The replacements that the descriptor's no-op callbacks make in a layer.

    Args:
        descriptor: Descriptor of the parent's model family.
        layer: A decoder layer as its class builds it, on any device; it is not changed.
        subblocks: ``"attention"``, ``"ffn"`` or both; both together may replace more than each alone.

    Returns:
        Module name in the layer to a record for ``make_replacement``.

    Raises:
        UnsupportedModel: The descriptor has no such callback, or a plan cannot describe what the callback does.
    """
    what = " and ".join(subblocks)
    # The tensors are shared with the original: only the tree of modules is copied.
    trial = copy.deepcopy(layer, {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]})
    before = dict(trial.named_modules())
    plain_before = _plain_attributes(trial)
    for subblock in subblocks:
        supported = descriptor.attn_no_op_supported() if subblock == "attention" else descriptor.mlp_no_op_supported()
        if not supported:
            raise UnsupportedModel(f"{descriptor.__name__} has no {subblock} no-op.")
        (descriptor.attn_no_op_post_init if subblock == "attention" else descriptor.mlp_no_op_post_init)(trial)
    if _plain_attributes(trial) != plain_before:
        raise UnsupportedModel(f"{descriptor.__name__}: its {what} no-op changes more than modules of the layer.")
    records: dict[str, dict[str, Any]] = {}
    for name, module in trial.named_modules():
        if before.get(name) is not module and not any(name.startswith(f"{outer}.") for outer in records):
            records[name] = _observe(module, f"{descriptor.__name__}: the {what} no-op's {name}")
    return records


def linear_records(
    descriptor: type[ModelDescriptor], layer: nn.Module, subblock: str, planned: bool = False
) -> dict[str, dict[str, Any]]:
    """Like :func:`no_op_records`, for one linear map in the place of a subblock; the norm before it stays.

    The map replaces the module that the no-op replaces by zeros, and has the same attributes. ``size`` is the hidden
    size.

    Args:
        descriptor: Descriptor of the parent's model family.
        layer: A decoder layer as its class builds it.
        subblock: ``"attention"`` or ``"ffn"``.
        planned: Whether the parent's layer was checked before. A layer without attention may be built as another type
            of layer, for which the check may fail.

    Raises:
        UnsupportedModel: A linear map cannot replace the subblock.
    """
    zeros = {name: r for name, r in no_op_records(descriptor, layer, subblock).items() if r["is"] == "zeros"}
    if len(zeros) != 1:
        raise UnsupportedModel(f"{descriptor.__name__}: no single module is the {subblock}; {NO_LINEAR}.")
    ((name, record),) = zeros.items()
    if not planned and (reason := descriptor.why_no_linear_layer(layer, subblock, name)):
        raise UnsupportedModel(f"{descriptor.__name__}: {reason}; {NO_LINEAR}.")
    return {name: record | {"is": "linear", "size": hidden_size_of(layer)}}


def hidden_size_of(layer: nn.Module) -> int:
    """The hidden size of a decoder layer: the dimension that most of its matrices have."""
    counts: dict[int, int] = {}
    for parameter in layer.parameters():
        for size in set(parameter.shape) if parameter.ndim >= 2 else ():
            counts[size] = counts.get(size, 0) + 1
    if not counts:
        raise UnsupportedModel(f"{type(layer).__name__}: its weights do not show its hidden size.")
    for module in layer.modules():
        hidden_size = getattr(getattr(module, "config", None), "hidden_size", None)
        if hidden_size in counts:
            return int(hidden_size)
    return max(counts, key=lambda size: counts[size])


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    hidden = {"_modules", "_parameters", "_buffers"}
    plain = {name: value for name, value in vars(layer).items() if name not in hidden}
    return {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool | type(None))}


def _copied_attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes that a callback copied from the original module, because the model reads them."""
    hidden = set(vars(nn.Module())) | {"argument", "size"}
    return {name: value for name, value in _plain_attributes(module).items() if name not in hidden}


def _observe(module: nn.Module, what: str) -> dict[str, Any]:
    """The record of a module without weights, by calling it on a random tensor.

    Args:
        module: The module.
        what: The module in words, for errors.
    """
    if any(True for _ in module.parameters()):
        raise UnsupportedModel(f"{what} has weights, which a plan cannot describe.")
    attributes: dict[str, Any] = {"attributes": copied} if (copied := _copied_attributes(module)) else {}
    if empty := [name for name, buffer in module.named_buffers() if not buffer.numel()]:
        attributes["empty"] = empty
    argument = getattr(module, "argument", None) if isinstance(module, PassArgument) else None
    with torch.device("cpu"):  # the layer may be under construction on the meta device
        probe = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        try:
            if argument is not None:
                output = module(**{argument: probe}) if isinstance(argument, str) else module(*[probe] * (argument + 1))
            else:
                output = module(probe)
        except TypeError:
            output = module(hidden_states=probe)
    returns: dict[str, Any] = {"returns": 0}
    if isinstance(module, MatchingZeros) and module.size is not None:
        attributes["size"] = module.size
    if isinstance(output, tuple | list):
        if any(rest is not None for rest in output[1:]):
            raise UnsupportedModel(f"{what} returns more than one tensor, which a plan cannot describe.")
        returns = {"returns": len(output), **({"list": True} if isinstance(output, list) else {})}
        if names := getattr(output, "_fields", ()):
            returns["names"] = list(names)
        if passes := getattr(module, "passes", ()):
            returns["passes"] = [list(pair) for pair in passes]
        output = output[0]
    with torch.device("cpu"):
        if argument is not None:
            return {"is": "argument", "of": argument, **returns, **attributes}
        if torch.equal(output, probe):
            return {"is": "same", **returns, **attributes}
        if not output.any():
            return {"is": "zeros", **returns, **attributes}
    raise UnsupportedModel(f"{what} returns neither its input nor zeros, which a plan cannot describe.")


def make_plan(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    block_configs: Sequence[BlockConfig],
    layers: Sequence[nn.Module],
    layer_class_names: Sequence[str],
    text_config: str = "",
    of_parent: Sequence[nn.Module] | None = None,
) -> dict[str, Any]:
    """The entry ``layersmith`` of a child's ``config.json``.

    Args:
        descriptor: Descriptor of the parent's model family.
        config: Config of the model.
        block_configs: The block config of every layer.
        layers: The decoder layers of the stock model, on the meta device.
        layer_class_names: Full names of the decoder layer classes.
        text_config: The attribute of ``config`` that is the language model's config; empty if that is ``config``.
        of_parent: The parent's layers, which decide whether a linear map can replace a subblock. Default: ``layers``,
            which differ where a layer without attention is built as another type of layer.
    """
    present = fills_cache(descriptor, block_configs)
    language = getattr(config, text_config) if text_config else config
    slots = slots_of_layers(descriptor, present, getattr(language, "layer_types", None))
    records: list[dict[str, Any]] = []
    for layer, original, block, slot in zip(layers, of_parent or layers, block_configs, slots, strict=True):
        removed = [subblock for subblock in SUBBLOCKS if block.subblock(subblock).no_op]
        modules = no_op_records(descriptor, layer, *removed) if removed else {}
        for subblock in SUBBLOCKS:
            if block.subblock(subblock).replace_with_linear:
                modules |= linear_records(descriptor, original, subblock)
        overrides = {k: v for k, v in descriptor.block_config_to_layer_overrides(block).items() if v is not None}
        record: dict[str, Any] = {"config": overrides, "modules": modules, "cache_slot": slot}
        changes: dict[str, Any] = {
            "shapes": descriptor.resized_weights(layer, block),
            "numbers": descriptor.changed_numbers(layer, block),
            "shared_entries": descriptor.shared_entries(layer, block),
            "kv_cache_format": block.attention.kv_cache_format,
        }
        record |= {name: change for name, change in changes.items() if change}
        if (within := cached_modules(descriptor, layer, len(records), slot)) is not None:
            record["cached"] = within
        records.append(record)
    plan = {
        "version": version("layersmith"),
        "decoder_layers": list(layer_class_names),
        "layers": records,
        "per_layer_config": stock_guard(
            descriptor,
            config,
            block_configs,
            text_config,
            [i for i, record in enumerate(records) if record.keys() & {"shapes", "numbers"}],
        ),
    }
    if text_config:
        plan["text_config"] = text_config
    if is_heterogeneous(language):
        plan["native_per_layer_config"] = {str(i): entry for i, entry in per_layer_entries(language).items()}
    return plan


def fills_cache(descriptor: type[ModelDescriptor], block_configs: Sequence[BlockConfig]) -> list[bool]:
    """Whether each layer's attention writes to the KV cache.

    An attention whose keys and values other layers read still writes them when it is removed.
    """
    return [has_attention(block) or descriptor.layer_facts(i).attention_stays for i, block in enumerate(block_configs)]


def slots_of_layers(
    descriptor: type[ModelDescriptor], present: Sequence[bool], layer_types: Sequence[str] | None = None
) -> list[int]:
    """The cache slot of every layer, by :func:`cache_slots`, or consecutive where a cache cannot have empty slots."""
    if descriptor.appends_to_cache():
        return [sum(present[:i]) for i in range(len(present))]
    return cache_slots(present, layer_types)


def cached_modules(descriptor: type[ModelDescriptor], layer: nn.Module, index: int, slot: int) -> list[str] | None:
    """The modules of a layer whose attention moves to another cache slot; None for the whole layer.

    An FFN that uses the cache keeps the slot of its layer.
    """
    if slot == index or not descriptor.attn_no_op_supported():
        return None
    try:
        moved = list(no_op_records(descriptor, layer, "attention"))
    except UnsupportedModel:
        return None
    # A no-op that keeps what other layers use replaces fewer modules than those that use the cache.
    return list(dict.fromkeys((*descriptor.attention_modules(layer), *moved)))


def stock_guard(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    block_configs: Sequence[BlockConfig],
    text_config: str = "",
    reshaped: Collection[int] = (),
) -> dict[str, dict[str, Any]]:
    """The guard: a ``per_layer_config`` that stops stock Transformers code which would build all layers alike.

    An entry has every attribute that differs from the model's, under its canonical name, since Transformers ignores
    aliases. A removed subblock has ``skip`` and zero for one of its sizes: stock code that supports ``skip`` ignores
    the size, and other stock code stops at it. A linear subblock has only the size.

    Some attributes cannot differ by layer: config classes read them, e.g. Llama's reads ``num_attention_heads`` to
    check the hidden size, and a config with such an entry does not load. ``block_configs`` still has them. If no
    attribute of an entry can differ, another one that models read takes its place. Each is tried on the whole config,
    because a multimodal config may read attributes of its ``text_config``.
    """
    can_differ = _CanDiffer(config, text_config)
    config = getattr(config, text_config) if text_config else config
    sizes = {
        "attention": _attributes_of(descriptor, BlockConfig.from_dict({"attention": {"num_key_value_heads": 1}})),
        "ffn": _attributes_of(descriptor, BlockConfig.from_dict({"ffn": {"intermediate_size": 1}})),
    }
    stock_names = {"attention": "attention", "ffn": "mlp"}
    canonical = getattr(config, "attribute_map", {})
    read_by_models = [canonical.get(name, name) for name in READ_BY_MODELS]
    guard: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(block_configs):
        entry: dict[str, Any] = {}
        differs = i in reshaped
        for name, value in descriptor.block_config_to_layer_overrides(block).items():
            name = canonical.get(name, name)
            of_model = config.__dict__.get(name)
            if isinstance(value, dict):  # a nested config, which an entry cannot override
                differs = differs or _differs(of_model, value)
            elif value is not None and value != of_model and not isinstance(value, list):
                differs = True
                if can_differ(name):
                    entry[name] = value
        skip = [stock_names[name] for name in SUBBLOCKS if block.subblock(name).no_op]
        for subblock in SUBBLOCKS:
            subblock_config = block.subblock(subblock)
            if subblock_config.no_op or subblock_config.replace_with_linear:
                differs = True
                # Zero differs from every size that a model can have, so Transformers keeps the override.
                entry |= {size: 0 for name in sizes[subblock] if can_differ(size := canonical.get(name, name))}
        if skip:
            entry["skip"] = skip
        if differs and not entry.keys() - {"skip"} and (read := next(filter(can_differ, read_by_models), None)):
            entry[read] = 0
        if entry:
            guard[str(i)] = entry
    if not guard or can_differ.all_of(guard):
        return guard
    # Some configs require equal layers of a type; then all layers get a size with which no model can be built.
    known = [canonical.get(name, name) for names in sizes.values() for name in names]
    alike = ({str(i): {n: 0} for i in range(len(block_configs))} for n in (*known, *read_by_models))
    return next(filter(can_differ.all_of, alike), {})


def _differs(config: Any, overrides: dict[str, Any]) -> bool:
    """Whether an override for a nested config differs from its value."""
    values = {name: getattr(config, name, None) for name in overrides}
    return any(
        _differs(values[n], v) if isinstance(v, dict) else v not in (None, values[n]) for n, v in overrides.items()
    )


class _CanDiffer:
    """Tells whether a config can be loaded when an attribute differs by layer, by loading one."""

    def __init__(self, config: PretrainedConfig, text_config: str):
        self.config, self.text_config = config, text_config
        language = getattr(config, text_config) if text_config else config
        self.names = language.to_dict().keys()
        self.native = {str(i): entry for i, entry in per_layer_entries(language).items()}
        self.known: dict[str, bool] = {}

    def __call__(self, name: str) -> bool:
        if name not in self.known:
            self.known[name] = name in self.names and self.all_of({"0": {name: 0}})
        return self.known[name]

    def all_of(self, guard: dict[str, dict[str, Any]]) -> bool:
        data = self.config.to_dict()
        language = data[self.text_config] if self.text_config else data
        language["per_layer_config"] = self.native | {i: self.native.get(i, {}) | entry for i, entry in guard.items()}
        with foreign_code("Can these attributes differ by layer?", refusal_is_answer=True) as attempt:
            type(self.config).from_dict(data).to_dict()
        return not attempt.failed


def _attributes_of(descriptor: type[ModelDescriptor], block: BlockConfig) -> list[str]:
    overrides = descriptor.block_config_to_layer_overrides(block)
    return [name for name, value in overrides.items() if value == 1]
