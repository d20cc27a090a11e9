"""From a path, hub id, config or model to the descriptor of its family."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersmith.errors import ALLOW_CODE, InputError, UnsupportedModel, brief, whole_reason
from layersmith.foreign import foreign_code
from layersmith.model_descriptor import any_model, deci
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.factory import ModelDescriptorFactory
from layersmith.model_descriptor.stock import language_config, quiet_transformers, stock_model
from layersmith.modeling_layersmith import as_parent
from layersmith.run.artifacts import read_json
from layersmith.untrusted import inside

# A config that asks for more is wrong, and building so many takes long even without memory.
_MOST_LAYERS = 1024
# Configs that were checked in this process.
_buildable: set[str] = set()


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
    if folder.is_dir():
        _check_config_file(folder)
    if (config := read_other_layout(path)) is not None:
        _check_buildable(path, config)
        return config
    question = f"Can the config of {path} be read?"
    with foreign_code(question, refusal_is_answer=True) as attempt, quiet_transformers():
        config = attempt.call(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
    if attempt.failed:
        if "trust_remote_code" in str(attempt.error):
            raise InputError(f"{path}: its family runs code from the checkpoint. {ALLOW_CODE}") from attempt.error
        raise InputError(f"{path}: its config cannot be read ({whole_reason(attempt.error)})") from attempt.error
    _check_buildable(path, config)
    return config


def read_other_layout(path: str | os.PathLike[str]) -> Any:
    """The config, with block configs, of a heterogeneous checkpoint of another tool; None for any other checkpoint.

    Raises:
        InputError: A field has another type.
        UnsupportedModel: A layer has a part that layersmith does not know.
    """
    data: dict[str, Any] = {}
    if (file := Path(path) / "config.json").is_file():
        data = read_json(file, dict[str, Any])
    elif not Path(path).exists() and not _looks_like_a_path(str(path)):
        with foreign_code(f"Which layout does {path} have?", refusal_is_answer=True), quiet_transformers():
            data, _ = PretrainedConfig.get_config_dict(path)
    is_any_model = data.get("architectures") == [any_model.ARCHITECTURE]
    if data.get("model_type") != deci.MODEL_TYPE and not is_any_model:
        return None
    ordinary = data if is_any_model else deci.from_deci(data, path)
    ordinary = {name: value for name, value in ordinary.items() if name not in (any_model.PER_LAYER, any_model.BASE)}
    if (model_type := str(ordinary.get("model_type"))) not in CONFIG_MAPPING:
        raise UnsupportedModel(f"{path}: this version of Transformers does not know the model type {model_type!r}.")
    config = None
    with foreign_code("Does Transformers read these fields?", refusal_is_answer=True) as attempt, quiet_transformers():
        config = attempt.call(CONFIG_MAPPING[model_type].from_dict, ordinary)
    if config is None:
        raise InputError(f"{path}: its config cannot be read ({whole_reason(attempt.error)})") from attempt.error
    if is_any_model:
        config.architectures = [str(data.get(any_model.BASE))]
        entries = data.get(any_model.PER_LAYER) or {}
        config.block_configs = [
            block.to_dict() for block in any_model.from_any_model(entries, describe(config), config, path)
        ]
    return config


def _check_buildable(path: str | os.PathLike[str], config: Any) -> None:
    """Build the model on the meta device, where it takes no memory.

    Raises:
        InputError: It cannot be built, or what it would be is no language model.
    """
    text, key = language_config(config), repr(config.to_dict())
    if key in _buildable:
        return
    model = None
    with (
        foreign_code(f"Does the config of {path} build a model?", refusal_is_answer=True) as attempt,
        warnings.catch_warnings(action="ignore"),  # about empty weights, which are refused below
    ):
        model = stock_model(as_parent(config))
    if attempt.failed:
        raise InputError(
            f"{path}: its config.json describes no model ({whole_reason(attempt.error)})."
        ) from attempt.error
    for name, weight in model.named_parameters() if model is not None else ():
        if not weight.numel():
            raise InputError(f"{path}: its config.json gives {name} the shape {list(weight.shape)}.")
    for name in ("vocab_size", "max_position_embeddings"):
        value = getattr(text, name, None)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{path}: {name} in its config.json must be a positive whole number, got {value!r}.")
    _buildable.add(key)


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


def _check_config_file(folder: Path) -> None:
    """Check what Transformers would follow to other files or code, or build without a limit.

    Raises:
        InputError: The config names a file or kernel outside its folder, or implausibly many layers.
    """
    path = folder / "config.json"
    parts = [read_json(path, dict[str, Any])]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for name, value in part.items():
            if name == "transformers_weights" and value is not None:
                inside(folder, str(value), f"{path}: {name}")
            if name.endswith("attn_implementation") and "/" in str(value):
                raise InputError(f"{path}: {name} names code on the Hub, {brief(str(value))}. Remove it.")
            if (
                name == "block_configs"
                and isinstance(value, list)
                and len(value) != part.get("num_hidden_layers", len(value))
            ):
                raise InputError(f"{path}: {len(value)} block_configs for {part['num_hidden_layers']} layers.")
            if "layer" in name and type(value) is int and value > _MOST_LAYERS:
                raise InputError(f"{path}: asks for {value:,} layers ({name}).")


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1
