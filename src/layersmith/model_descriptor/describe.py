"""From a path, hub id, config or model to the descriptor of its family."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layersmith.errors import InputError, UnsupportedModel
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.factory import ModelDescriptorFactory


def describe(model: Any) -> type[ModelDescriptor]:
    """The descriptor of a model's family.

    Args:
        model: a path, a hub id, a ``PretrainedConfig``, or a model with a ``config``.

    Raises:
        InputError: there is no config at the path.
        UnsupportedModel: no descriptor is known for its ``model_type``.
    """
    config = read_config(model) if isinstance(model, str | os.PathLike) else getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise UnsupportedModel(f"{type(model).__name__} has no model_type; give a path, a hub id, a config or a model.")
    return ModelDescriptorFactory.get(model_type)


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
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its config cannot be read ({first_line})") from error


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1
