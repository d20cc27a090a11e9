"""Fresh heterogeneous models, with random weights or on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig, read_block_configs
from layersmith.errors import UsageError
from layersmith.heterogeneous.patcher import deci_x_patcher, layer_classes
from layersmith.heterogeneous.plan import Plan, fills_cache, make_plan
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe
from layersmith.model_descriptor.stock import causal_lm_config, quiet_transformers, stock_class, stock_model
from layersmith.modeling_layersmith import (
    as_parent,
    cache_layer_types,
    heterogeneous_class,
    remote_code,
    without_guard,
)
from layersmith.records import check
from layersmith.upstream import is_heterogeneous, model_from_config, per_layer_entries, set_per_layer_entries


def block_configs_of(config: PretrainedConfig, descriptor: type[ModelDescriptor] | None = None) -> list[BlockConfig]:
    """The block config of every layer that a config describes.

    A child's config contains them; for any other config the descriptor gives them.

    Args:
        config: Config of any model.
        descriptor: Descriptor of its model family. Default: ``describe(config)``.

    Raises:
        UsageError: The block configs in the config are invalid, or their number is not the number of layers.
    """
    config = causal_lm_config(without_guard(config))
    descriptor = descriptor or describe(config)
    language = descriptor.get_language_model_config(config)
    num_layers = num_layers_of(config, descriptor)
    entries = getattr(config, "block_configs", None) or getattr(language, "block_configs", None)
    if entries:
        blocks = read_block_configs(entries, "config.json")
        if len(blocks) != num_layers:
            raise UsageError(f"config.json: {len(blocks)} block_configs for {num_layers} layers.")
        return blocks
    return descriptor.parent_blocks(config)


def num_layers_of(config: PretrainedConfig, descriptor: type[ModelDescriptor]) -> int:
    """The number of decoder layers of a config's model."""
    return len(descriptor.kinds_of_layers(config))


def class_for(
    stock: type[PreTrainedModel], config: PretrainedConfig, descriptor: type[ModelDescriptor] | None = None
) -> type[PreTrainedModel]:
    """The class that builds the model of a config: ``stock``, or its heterogeneous subclass for a child.

    Args:
        stock: The model class of Transformers for the config.
        config: Config of any model.
        descriptor: Descriptor of its model family. It is needed only for block configs without a plan, and for layer
            classes that are not part of Transformers. Default: ``describe(config)``.
    """
    plan = getattr(config, "layersmith", None)
    if plan is not None:
        check(plan, Plan, "config.json: layersmith")
    if plan is not None and all(name.startswith("transformers.") for name in plan["decoder_layers"]):
        return heterogeneous_class(stock)
    if plan is None and not getattr(config, "block_configs", None):
        return stock
    return child_class(descriptor or describe(config), stock)


def child_class(descriptor: type[ModelDescriptor], stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The heterogeneous subclass of ``stock`` that builds the layers of a config by its ``block_configs``."""

    def layers_of(child: PretrainedConfig) -> Any:
        slots = [record["cache_slot"] for record in child.layersmith["layers"]]
        return deci_x_patcher(descriptor, child.block_configs, slots)

    def completed(child: PretrainedConfig) -> PretrainedConfig:
        if hasattr(child, "layersmith"):
            return without_guard(child)
        return child_config(child, block_configs_of(child, descriptor), descriptor)

    return heterogeneous_class(stock, layers_of, completed)


def child_config(
    config: PretrainedConfig, block_configs: Sequence[BlockConfig], descriptor: type[ModelDescriptor] | None = None
) -> PretrainedConfig:
    """A copy of ``config`` for a child, with its block configs, its plan, and layer types that suit its cache.

    Raises:
        UsageError: The number of block configs is not the number of layers.
        UnsupportedModel: The model family does not support one of the block configs.
    """
    descriptor = descriptor or describe(config)
    config = as_parent(causal_lm_config(config))
    language = descriptor.get_language_model_config(config)
    blocks = read_block_configs(list(block_configs), "block_configs")
    num_layers = num_layers_of(config, descriptor)
    if len(blocks) != num_layers:
        raise UsageError(f"{len(blocks)} block configs for the {num_layers} layers of the model.")
    built_types: list[str] = []
    layers = of_parent = decoder_layers(stock_model(config), descriptor, len(blocks))
    if parent_types := getattr(language, "layer_types", None):
        asked = [block.attention.layer_type or kept for block, kept in zip(blocks, parent_types, strict=True)]
        layer_types = cache_layer_types(fills_cache(descriptor, blocks), asked)
        retyped = _with_layer_types(config, descriptor, layer_types)
        if retyped is not config:
            after = decoder_layers(stock_model(retyped), descriptor, len(blocks))
            if [type(layer) for layer in layers] != [type(layer) for layer in after]:
                built_types = list(parent_types)
            config, layers = retyped, layers if built_types else after
            language = descriptor.get_language_model_config(config)
    class_names = [f"{cls.__module__}.{cls.__qualname__}" for cls in layer_classes(descriptor)]
    text_config = "" if language is config else next(n for n, value in vars(config).items() if value is language)
    config.layersmith = make_plan(descriptor, config, blocks, layers, class_names, text_config, of_parent)
    if built_types:
        config.layersmith["built_layer_types"] = built_types
    if remote := remote_code(config):
        config.layersmith["remote"] = remote
    config.block_configs = [block.to_dict() for block in blocks]
    return config


def _with_layer_types(
    whole: PretrainedConfig, descriptor: type[ModelDescriptor], layer_types: list[str]
) -> PretrainedConfig:
    """A config with other layer types; a ``per_layer_config`` entry moves with its type."""
    types = list(descriptor.get_language_model_config(whole).layer_types)
    changed = [i for i, layer_type in enumerate(types) if layer_type != layer_types[i]]
    if not changed:
        return whole
    result = copy.deepcopy(whole)
    config = descriptor.get_language_model_config(result)
    native = per_layer_entries(config)
    for i in changed:
        native.pop(i, None)
        donor = native.get(types.index(layer_types[i]))
        if donor is not None:
            native[i] = dict(donor)
    if is_heterogeneous(config):
        set_per_layer_entries(config, {})
    config.layer_types = layer_types
    if native:
        set_per_layer_entries(config, native)
    return result


def config_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights that a config names; float32 by default."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def build(
    config: PretrainedConfig,
    block_configs: Sequence[BlockConfig],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    descriptor: type[ModelDescriptor] | None = None,
) -> PreTrainedModel:
    """A model of ``config`` whose layer i is ``block_configs[i]``, with fresh weights.

    Args:
        config: Config of the parent; it is not changed.
        block_configs: The block config of every layer.
        dtype: dtype of the weights. Default: the one that the config names, else float32.
        device: Device of the weights. On ``"meta"`` they take no memory.
        descriptor: Descriptor of the parent's model family. Default: ``describe(config)``.

    Raises:
        UsageError: The number of block configs is not the number of layers.
        UnsupportedModel: The model family cannot be described, or does not support one of the block configs.
    """
    descriptor = descriptor or describe(config)
    child = child_config(config, block_configs, descriptor)
    with torch.device(device or "cpu"), quiet_transformers():
        cls = child_class(descriptor, stock_class(child))
        return model_from_config(cls, child, dtype=dtype or config_dtype(child))


def head_of(model: PreTrainedModel, descriptor: type[ModelDescriptor] | None = None) -> nn.Module:
    """The language-model head, by the descriptor if ``get_output_embeddings`` does not return it."""
    head = model.get_output_embeddings()
    if head is None:
        head = model.get_submodule((descriptor or describe(model.config)).output_embedding_name())
    return head


def decoder_layers(model: nn.Module, descriptor: type[ModelDescriptor], num_layers: int) -> list[nn.Module]:
    """The decoder layers of a model, in order."""
    return [model.get_submodule(descriptor.layer_block_name(i)) for i in range(num_layers)]
