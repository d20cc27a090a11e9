"""From a path, hub id, config or model to the descriptor of its family."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layersmith.errors import InputError, UnsupportedModel
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.factory import ModelDescriptorFactory


def describe(model: Any, *, trust_remote_code: bool = False) -> type[ModelDescriptor]:
    """The descriptor of a model: the one registered for its type, else one made by experiment.

    Args:
        model: a path, a hub id, a ``PretrainedConfig``, a model with a ``config``, or a class of either, which stands
            for its default config.
        trust_remote_code: let Transformers run code that lies in the folder.

    Raises:
        InputError: there is no config at the path.
        UnsupportedModel: what cannot be found out about the model, and why.
    """
    config = config_of(model)
    if isinstance(model, str | os.PathLike):
        config = read_config(model, trust_remote_code=trust_remote_code)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise UnsupportedModel(f"{type(model).__name__} has no model_type; give a path, a hub id, a config or a model.")
    registered = ModelDescriptorFactory.registered(model_type)
    if registered is not None:
        return registered
    from layersmith.model_descriptor.infer.descriptor import infer
    from layersmith.modeling_layersmith import as_parent

    try:
        return infer(as_parent(config))
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"{model_type}: {error} A descriptor written for layersmith.ModelDescriptor and registered with "
            "ModelDescriptorFactory can say what experiment cannot find."
        ) from error


def config_of(model: Any) -> Any:
    """The config in what somebody gave as a model."""
    if isinstance(model, type):
        config_class = getattr(model, "config_class", None) or model
        return config_class()
    return getattr(model, "config", model)


def read_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The Transformers config of a checkpoint folder or hub model.

    Raises:
        InputError: missing, unreadable, or of a type that this version of Transformers does not know.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path}: no config.json here. Give the folder of a Hugging Face checkpoint.")
    if folder.is_file() or (not folder.exists() and _looks_like_a_path(str(path))):
        raise InputError(f"{path}: no such folder. Give the folder of a Hugging Face checkpoint, or a hub name.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path}: its family runs code from the checkpoint. Read it, then allow it with trust_remote_code."
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its config cannot be read ({first_line})") from error


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1
