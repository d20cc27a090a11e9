"""The plan: what a descriptor does to a model, written down as data.

A descriptor is code; a checkpoint must be readable where that code is not. So the effect of a descriptor's callbacks
is observed: the layer's module tree before and after is compared, and what was put in is found by calling it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig, has_attention
from layersmith.errors import UnsupportedModel
from layersmith.heterogeneous.modeling_layersmith import cache_slots
from layersmith.model_descriptor.base import ModelDescriptor

SUBBLOCKS = ("attention", "ffn")


def no_op_records(descriptor: type[ModelDescriptor], layer: nn.Module, subblock: str) -> dict[str, dict[str, Any]]:
    """What the descriptor's no-op callback puts where.

    Args:
        descriptor: the descriptor.
        layer: a decoder layer as its class builds it, on any device; it is not changed.
        subblock: ``"attention"`` or ``"ffn"``.

    Returns:
        Module name in the layer to ``{"is": "zeros" | "same", "returns": tuple size or 0}``.

    Raises:
        UnsupportedModel: there is no such callback, or it does something that cannot be written down.
    """
    supported = descriptor.attn_no_op_supported() if subblock == "attention" else descriptor.mlp_no_op_supported()
    if not supported:
        raise UnsupportedModel(f"{descriptor.__name__} has no {subblock} no-op.")
    # The tensors are shared with the original: only the tree of modules is copied.
    trial = copy.deepcopy(layer, {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]})
    before = dict(trial.named_modules())
    plain_before = _plain_attributes(trial)
    (descriptor.attn_no_op_post_init if subblock == "attention" else descriptor.mlp_no_op_post_init)(trial)
    if _plain_attributes(trial) != plain_before:
        raise UnsupportedModel(f"{descriptor.__name__}: its {subblock} no-op changes more than modules of the layer.")
    records: dict[str, dict[str, Any]] = {}
    for name, module in trial.named_modules():
        if before.get(name) is not module and not any(name.startswith(f"{outer}.") for outer in records):
            records[name] = _observe(module, f"{descriptor.__name__}: the {subblock} no-op's {name}")
    return records


def linear_records(descriptor: type[ModelDescriptor], layer: nn.Module, subblock: str) -> dict[str, dict[str, Any]]:
    """As :func:`no_op_records`, for one linear map in the subblock's place; its norm stays.

    The map stands where the no-op puts zeros. ``size`` is the hidden size.
    """
    zeros = {name: r for name, r in no_op_records(descriptor, layer, subblock).items() if r["is"] == "zeros"}
    if len(zeros) != 1:
        raise UnsupportedModel(
            f"{descriptor.__name__}: no single module is the {subblock}; no linear map can replace it."
        )
    ((name, record),) = zeros.items()
    return {name: {"is": "linear", "returns": record["returns"], "size": hidden_size_of(layer.get_submodule(name))}}


def hidden_size_of(subblock: nn.Module) -> int:
    """D: the size that every matrix of a subblock has on one of its sides."""
    shapes = [set(p.shape) for p in subblock.parameters() if p.ndim >= 2]
    common = set.intersection(*shapes) if shapes else set()
    config = getattr(subblock, "config", None)
    for value in (getattr(config, "hidden_size", None), getattr(subblock, "hidden_size", None)):
        if value in common:
            return int(value)
    if len(common) != 1:
        raise UnsupportedModel(f"{type(subblock).__name__}: its hidden size cannot be told from its weights.")
    return int(common.pop())


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    hidden = {"_modules", "_parameters", "_buffers"}
    plain = {name: value for name, value in vars(layer).items() if name not in hidden}
    return {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool | type(None))}


def _observe(module: nn.Module, what: str) -> dict[str, Any]:
    """Find what a parameter-free module does by calling it."""
    if any(True for _ in module.parameters()):
        raise UnsupportedModel(f"{what} has weights; that cannot be written into a checkpoint's plan.")
    with torch.device("cpu"):  # the layer may be under construction on the meta device
        probe = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        try:
            output = module(probe)
        except TypeError:
            output = module(hidden_states=probe)
    returns = 0
    if isinstance(output, tuple | list):
        if any(rest is not None for rest in output[1:]):
            raise UnsupportedModel(f"{what} returns more than one tensor; that cannot be written into a plan.")
        output, returns = output[0], len(output)
    with torch.device("cpu"):
        if torch.equal(output, probe):
            return {"is": "same", "returns": returns}
        if not output.any():
            return {"is": "zeros", "returns": returns}
    raise UnsupportedModel(f"{what} neither passes its input on nor gives zeros; that cannot be written into a plan.")


def make_plan(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    block_configs: Sequence[BlockConfig],
    layers: Sequence[nn.Module],
    layer_class_names: Sequence[str],
) -> dict[str, Any]:
    """The entry ``layersmith`` of a child's ``config.json``.

    Args:
        descriptor: the parent family's descriptor.
        config: the language model's config.
        block_configs: one a layer.
        layers: the decoder layers of the stock model, on the meta device.
        layer_class_names: full names of the decoder layer classes.
    """
    from layersmith import __version__

    present = [has_attention(block) for block in block_configs]
    slots = cache_slots(present, getattr(config, "layer_types", None))
    records = []
    for layer, block, slot in zip(layers, block_configs, slots, strict=True):
        modules: dict[str, dict[str, Any]] = {}
        for subblock in SUBBLOCKS:
            if block.subblock(subblock).no_op:
                modules |= no_op_records(descriptor, layer, subblock)
            elif block.subblock(subblock).replace_with_linear:
                modules |= linear_records(descriptor, layer, subblock)
        overrides = {k: v for k, v in descriptor.block_config_to_layer_overrides(block).items() if v is not None}
        records.append({"config": overrides, "modules": modules, "cache_slot": slot})
    return {
        "version": __version__,
        "decoder_layers": list(layer_class_names),
        "layers": records,
        "per_layer_config": stock_guard(descriptor, config, block_configs),
    }


def stock_guard(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, block_configs: Sequence[BlockConfig]
) -> dict[str, dict[str, Any]]:
    """Transformers' own ``per_layer_config`` for these blocks, such that stock code cannot build them all alike.

    A removed subblock is ``skip`` beside an override of one of its sizes: stock code that knows ``skip`` has no use
    for the size, and stock code that does not stops at the size. A linear replacement has the override alone, since
    ``skip`` would be untrue. Overrides have the canonical names of attributes; an alias would escape the guard.
    """
    sizes = {
        "attention": _attributes_of(descriptor, BlockConfig.from_dict({"attention": {"num_key_value_heads": 1}})),
        "ffn": _attributes_of(descriptor, BlockConfig.from_dict({"ffn": {"intermediate_size": 1}})),
    }
    stock_names = {"attention": "attention", "ffn": "mlp"}
    canonical = getattr(config, "attribute_map", {})
    guard: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(block_configs):
        entry: dict[str, Any] = {}
        for name, value in descriptor.block_config_to_layer_overrides(block).items():
            name = canonical.get(name, name)
            if value is not None and value != getattr(config, name, None):
                entry[name] = value
        skip = []
        for subblock in SUBBLOCKS:
            own = block.subblock(subblock)
            if own.no_op:
                skip.append(stock_names[subblock])
            if own.no_op or own.replace_with_linear:
                # Zero differs from every size that a model can have, so Transformers keeps the override.
                entry |= {canonical.get(name, name): 0 for name in sizes[subblock]} or {"hidden_size": 0}
        if skip:
            entry["skip"] = skip
        if entry:
            guard[str(i)] = entry
    return guard


def _attributes_of(descriptor: type[ModelDescriptor], block: BlockConfig) -> list[str]:
    overrides = descriptor.block_config_to_layer_overrides(block)
    return [name for name, value in overrides.items() if value == 1]
