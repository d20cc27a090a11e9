"""From a path, hub id, config or model to the descriptor of its family."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from layersmith.errors import InputError, UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.factory import ModelDescriptorFactory


def describe(model: Any, *, trust_remote_code: bool = False) -> type[ModelDescriptor]:
    """The descriptor of a model: the one registered for its type, else one inferred by experiment.

    Args:
        model: A path, a hub id, a ``PretrainedConfig``, a model with a ``config``, or a class of either, which stands
            for its default config.
        trust_remote_code: Whether Transformers may run code from the folder.

    Raises:
        InputError: There is no config at the path.
        UnsupportedModel: What the experiments could not answer, and why.
    """
    config = config_of(model)
    if isinstance(model, str | os.PathLike):
        config = read_config(model, trust_remote_code=trust_remote_code)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise UnsupportedModel(f"{type(model).__name__} has no model_type; give a path, a hub id, a config or a model.")
    return ModelDescriptorFactory.for_config(config)


def config_of(model: Any) -> Any:
    """The config of a model, config, or class of either."""
    if isinstance(model, type):
        config_class = getattr(model, "config_class", None) or model
        return config_class()
    return getattr(model, "config", model)


def read_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The Transformers config of a checkpoint folder, hub model or GGUF file.

    Raises:
        InputError: It is missing, unreadable, or of a type that this version of Transformers does not know.
    """
    if location := gguf_location(path):
        return _read_gguf_config(*location)
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path}: no config.json here. Give the folder of a Hugging Face checkpoint.")
    if folder.is_file() or (not folder.exists() and _looks_like_a_path(str(path))):
        raise InputError(
            f"{path}: no such folder. Give the folder of a Hugging Face checkpoint, a GGUF file, or a hub name."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path}: its family runs code from the checkpoint. Read it, then allow it with trust_remote_code."
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its config cannot be read ({first_line})") from error


def gguf_location(path: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """Folder and name of a GGUF file; None for any other path."""
    file = Path(path)
    return (file.parent, file.name) if file.suffix.lower() == ".gguf" and file.is_file() else None


def _read_gguf_config(folder: Path, name: str) -> Any:
    """The config that the metadata of a GGUF file describes, without what it says of the weights' format."""
    if find_spec("gguf") is None:
        raise InputError(
            f"{folder / name}: to read GGUF files, install the package gguf: pip install 'layersmith[gguf]'"
        )
    with foreign_code("can Transformers read the GGUF file?", refusal_is_answer=True) as attempt:
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
    if attempt.failed:
        raise InputError(f"{folder / name}: not a GGUF file that Transformers can read ({attempt.reason}).") from (
            attempt.error
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16  # in which its weights are stored once they are dequantized
    return config


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1
