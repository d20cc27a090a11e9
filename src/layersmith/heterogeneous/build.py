"""Fresh heterogeneous models, with random weights or on the meta device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig, has_attention, read_block_configs
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.heterogeneous.modeling_layersmith import cache_layer_types, heterogeneous_class, without_guard
from layersmith.heterogeneous.patcher import deci_x_patcher, layer_classes
from layersmith.heterogeneous.plan import make_plan
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe


def block_configs_of(config: PretrainedConfig, descriptor: type[ModelDescriptor] | None = None) -> list[BlockConfig]:
    """The block config of every layer that a config describes.

    A heterogeneous config carries them; any other has the same block in every layer.

    Args:
        config: of any model.
        descriptor: of its family; default: ``describe(config)``.

    Raises:
        UsageError: the config carries block configs that are not of our schema, or not one a layer.
    """
    config = without_guard(config)
    language = (descriptor or describe(config)).get_language_model_config(config)
    num_layers = language.num_hidden_layers
    entries = getattr(config, "block_configs", None) or getattr(language, "block_configs", None)
    if entries:
        blocks = read_block_configs(entries, "config.json")
        if len(blocks) != num_layers:
            raise UsageError(f"config.json: {len(blocks)} block_configs for {num_layers} layers.")
        return blocks
    block = BlockConfig(
        AttentionConfig(num_key_value_heads=_whole_number(language, "num_key_value_heads")),
        FFNConfig(intermediate_size=_whole_number(language, "intermediate_size")),
    )
    return [block] * num_layers


def _whole_number(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if type(value) is int else None


def stock_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that Transformers has for a causal language model of this config.

    Raises:
        UnsupportedModel: it has none.
    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedModel(f"This version of Transformers has no causal language model for {type(config).__name__}.")


def class_for(
    stock: type[PreTrainedModel], config: PretrainedConfig, descriptor: type[ModelDescriptor] | None = None
) -> type[PreTrainedModel]:
    """The class that builds a config's model: ``stock``, made heterogeneous if the config is.

    Args:
        stock: what Transformers has for the config.
        config: of any model.
        descriptor: of its family; needed only where the config has block configs and no plan, or a plan with layer
            classes that are not Transformers' own. Default: ``describe(config)``.
    """
    plan = getattr(config, "layersmith", None)
    if plan is not None and all(name.startswith("transformers.") for name in plan["decoder_layers"]):
        return heterogeneous_class(stock)
    if plan is None and not getattr(config, "block_configs", None):
        return stock
    return child_class(descriptor or describe(config), stock)


def child_class(descriptor: type[ModelDescriptor], stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class, made to build the layers of a config as its ``block_configs`` say."""

    def layers_of(own_config: PretrainedConfig) -> Any:
        return deci_x_patcher(descriptor, own_config.block_configs)

    def completed(own_config: PretrainedConfig) -> PretrainedConfig:
        if hasattr(own_config, "layersmith"):
            return without_guard(own_config)
        return child_config(own_config, block_configs_of(own_config, descriptor), descriptor)

    return heterogeneous_class(stock, layers_of, completed)


def child_config(
    config: PretrainedConfig, block_configs: Sequence[BlockConfig], descriptor: type[ModelDescriptor] | None = None
) -> PretrainedConfig:
    """A copy of ``config`` that describes a child: its block configs, its plan, and layer types its cache can use.

    Raises:
        UsageError: not one block config a layer.
        UnsupportedModel: an alternative that the family cannot take.
    """
    descriptor = descriptor or describe(config)
    config = without_guard(config)
    language = descriptor.get_language_model_config(config)
    blocks = read_block_configs(list(block_configs), "block_configs")
    if len(blocks) != language.num_hidden_layers:
        raise UsageError(f"{len(blocks)} block configs for the {language.num_hidden_layers} layers of the model.")
    for name in ("block_configs", "layersmith", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    stock = meta_model(config)
    layers = [stock.get_submodule(descriptor.layer_block_name(i)) for i in range(len(blocks))]
    class_names = [f"{cls.__module__}.{cls.__qualname__}" for cls in layer_classes(descriptor)]
    if getattr(language, "layer_types", None):
        language.layer_types = cache_layer_types([has_attention(block) for block in blocks], language.layer_types)
    config.layersmith = make_plan(descriptor, language, blocks, layers, class_names)
    config.block_configs = [block.to_dict() for block in blocks]
    return config


def config_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a config names for its weights; float32 if it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of a config on the meta device: all shapes, no memory."""
    with torch.device("meta"), quiet_transformers():
        return stock_class(config)._from_config(copy.deepcopy(config))


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
        config: the parent's config; it is not changed.
        block_configs: one a layer.
        dtype: of the weights; default: the config's own, else float32.
        device: where the weights lie; ``"meta"`` for none.
        descriptor: of the family; default: ``describe(config)``.

    Raises:
        UsageError: not one block config a layer.
        UnsupportedModel: the family cannot be described or cannot take an alternative.
    """
    descriptor = descriptor or describe(config)
    own_config = child_config(config, block_configs, descriptor)
    dtype = dtype or config_dtype(own_config)
    with torch.device(device or "cpu"), quiet_transformers():
        return child_class(descriptor, stock_class(own_config))._from_config(own_config, dtype=dtype)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' notes and progress bars; what matters in them we check ourselves."""
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    restore_bars = transformers_logging.enable_progress_bar if bars else partial(lambda: None)
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        restore_bars()


def decoder_layers(model: nn.Module, descriptor: type[ModelDescriptor], num_layers: int) -> list[nn.Module]:
    """The decoder layers of a model, in order."""
    return [model.get_submodule(descriptor.layer_block_name(i)) for i in range(num_layers)]
