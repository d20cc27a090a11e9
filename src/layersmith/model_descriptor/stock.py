"""Build models of stock Transformers classes from a config."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from layersmith.errors import InputError, UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.modeling_layersmith import model_class_for, place_layer_buffers, remote_class
from layersmith.upstream import model_from_config


def stock_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class that Transformers has for a config.

    Raises:
        UnsupportedModel: Transformers has no such class.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    if (model_class := remote_class(config) or model_class_for(config, mappings)) is not None:
        return model_class
    raise UnsupportedModel(f"This version of Transformers has no causal language model for {type(config).__name__}.")


def causal_lm_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config from which its causal language model is built.

    For some multimodal types the causal model of Transformers is the text model, which is built from ``text_config``.
    """
    wanted = stock_class(config).config_class
    text = (getattr(config, "sub_configs", None) or {}).get("text_config")
    if text is not None and wanted is text and type(config) is not wanted:
        return config.get_text_config()
    return config


def language_config(config: Any) -> Any:
    """The config from which the decoder layers are built."""
    try:
        text = config.get_text_config(decoder=True)
    except (AttributeError, ValueError):
        return config
    return text if any(value is text for value in vars(config).values()) else config


def stock_model(config: PretrainedConfig, device: str = "meta", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A fresh stock model of a config. On the meta device it has all shapes and takes no memory."""
    with torch.device(device), quiet_transformers():
        how = {} if dtype is None else {"dtype": dtype}
        return model_from_config(stock_class(config), copy.deepcopy(causal_lm_config(config)), **how)


def refuse_larger(cls: Any, config: PretrainedConfig, path: object, most: int) -> None:
    """Refuse a config of a far larger model than the files hold, before Transformers takes memory for it.

    Raises:
        InputError: The model has more than ``most`` parameters.
    """
    model = None
    question = f"How large is the model of {path}?"
    with foreign_code(question, refusal_is_answer=True), quiet_transformers(), torch.device("meta"):
        model = model_from_config(cls, copy.deepcopy(config))
    size = 0 if model is None else sum(p.numel() for p in model.parameters())
    if size > most:
        raise InputError(
            f"{path}: its config describes a model of {size:,} parameters, which is more than its files can hold. "
            "Download it again."
        )


def whole_number(config: PretrainedConfig, name: str) -> int | None:
    """An attribute of a config if it is an integer and the same for all layers, else None."""
    value = None
    with foreign_code(f"Is {name} the same for all layers?", refusal_is_answer=True) as attempt:
        value = attempt.call(getattr, config, name, None)
    return value if type(value) is int else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, Transformers prints no warnings and progress bars; layersmith does the checks itself."""
    from transformers.utils import logging as transformers_logging

    logger, accelerate = transformers_logging.get_logger("transformers"), logging.getLogger("accelerate")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    accelerate_level = accelerate.level
    restore_bars = transformers_logging.enable_progress_bar if bars else partial(lambda: None)
    logger.setLevel(logging.ERROR)
    accelerate.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        accelerate.setLevel(accelerate_level)
        restore_bars()


@contextmanager
def casting(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """While open, a model is cast, in the end to ``dtype``; buffers that no file holds are put back if made for it.

    Transformers makes many of them in float32 for weights of any dtype, such as rotary frequencies, and
    ``Module.to`` would round these.
    """
    saved, kept = model.state_dict().keys(), {}
    if model.dtype == dtype:
        buffers = model.named_buffers(remove_duplicate=False)
        kept = {name: buffer for name, buffer in buffers if name not in saved}
    yield
    for name, buffer in kept.items():
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, buffer.to(model.get_buffer(name).device))


def restore_buffers(model: nn.Module, runtime: Any) -> None:
    """Set the unsaved buffers of a model that was built on the meta device, as in a freshly built model."""
    from accelerate import init_empty_weights

    config: Any = copy.deepcopy(model.config)
    for name in ("layersmith", "block_configs"):
        if hasattr(config, name):
            delattr(config, name)
    with init_empty_weights(include_buffers=False):
        fresh = stock_model(config, "cpu")
    targets = dict(model.named_modules())
    saved = set(model.state_dict())
    for name, module in fresh.named_modules():
        target = targets.get(name)
        if target is None:
            continue
        known = {n for n, _ in target.named_buffers(recurse=False, remove_duplicate=False)}
        for buffer_name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer_name in known and f"{name}.{buffer_name}".removeprefix(".") not in saved:
                setattr(target, buffer_name, buffer.to(runtime.device))
        # Tensors that are plain attributes, e.g. a rotary embedding's scaling, may be on the meta device too.
        for plain, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(target, plain, value.to(runtime.device))
    place_layer_buffers(model)
