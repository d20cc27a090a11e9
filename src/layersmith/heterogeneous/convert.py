"""Parents in other formats: a GGUF file or a quantized checkpoint becomes an ordinary checkpoint in the user's cache.

Everything else reads ordinary checkpoints only: safetensors with weights in one floating-point dtype. Transformers
dequantizes; a format that it cannot dequantize is refused. The conversion is done once for equal files.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from layersmith.data.pre_tokenizers import split_as
from layersmith.errors import InputError, UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import block_configs_of, child_config, class_for
from layersmith.heterogeneous.quantized import dense_tensors, names_modules
from layersmith.heterogeneous.weight_files import INDEX, check_files, weight_files
from layersmith.model_descriptor import deci
from layersmith.model_descriptor.describe import gguf_location, read_config, read_other_layout
from layersmith.model_descriptor.stock import (
    causal_lm_config,
    quiet_transformers,
    refuse_larger,
    stock_class,
)
from layersmith.modeling_layersmith import finish_folder, refuse_incomplete, without_guard
from layersmith.run.artifacts import fingerprint, read_json, read_tensors, whole_folder, write_json, write_tensors
from layersmith.run.digests import content_digest, read_sealed, write_sealed
from layersmith.run.progress import SILENT, Progress
from layersmith.run.user_cache import folder_for
from layersmith.untrusted import read_safetensors_header
from layersmith.upstream import model_from_config

# In which weights are stored that were quantized; the dtype of nearly all published models.
DTYPE = "bfloat16"
# Sizes and digests of a converted checkpoint's files; one that differs is converted again.
_RECORD = "converted.json"
# Data types of weights that are not quantized.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Files that a converted checkpoint takes over as they are, if there are any.
_COPIED = ("*token*", "vocab*", "merges*", "*.jinja", "special_tokens_map.json", "generation_config.json", "LICENSE*")
# Packages that Transformers needs to read a format, where their names are not the format's own.
_PACKAGES = {"gguf": "gguf", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}


def ordinary_checkpoint(
    path: str | os.PathLike[str], dtype: str = "auto", trust_remote_code: bool = False, progress: Progress = SILENT
) -> str:
    """The path of a checkpoint with the same weights that all of layersmith can read.

    Args:
        path: Checkpoint folder, hub id, or GGUF file.
        dtype: Data type of its weights. ``auto``: as they are; if they are quantized, bfloat16, or that of the others
            in a child of layersmith.
        trust_remote_code: Let Transformers run code from the checkpoint.
        progress: Receives a note when weights are converted.

    Returns:
        ``path`` itself if there is nothing to convert, else a folder in the user's cache.

    Raises:
        InputError: The file or config cannot be read, or a package that reads it is missing.
        UnsupportedModel: Transformers cannot dequantize this format.
    """
    if not gguf_location(path) and (config := read_other_layout(path)) is not None:
        path = _adopted(Path(path) if Path(path).exists() else Path(snapshot_download(str(path))), config, progress)
    method = quantization_of(path, trust_remote_code)
    if method is None and (dtype == "auto" or not _differs(path, dtype, trust_remote_code)):
        return str(path)
    wanted = _dtype_beside(path, trust_remote_code) if dtype == "auto" else dtype
    place = Path(path)
    if method is not None and not place.exists():
        place = Path(snapshot_download(str(path)))
    digest = fingerprint([content_digest(place), wanted])
    folder = folder_for("parents") / digest
    if read_sealed(folder / _RECORD, str, whole=False) != wanted:
        what = f"converted from {method} to" if method else "converted to"
        progress.note(f"{path}: {what} {wanted}, and kept in {folder}.")
        model = _dequantized(place, getattr(torch, wanted), method, trust_remote_code)
        with whole_folder(folder) as made:
            _save(model, place, made, trust_remote_code)
            write_sealed(made / _RECORD, wanted, [file for file in made.rglob("*") if file.is_file()])
    return str(folder)


def _adopted(place: Path, config: PretrainedConfig, progress: Progress) -> Path:
    """A child's folder for a heterogeneous checkpoint of another tool; its weights are links where no name changes."""
    check_files(place)
    folder = folder_for("parents") / fingerprint([content_digest(place), "block_configs"])
    if (folder / "config.json").is_file() and all(file.exists() for file in weight_files(folder)):
        return folder  # unless the files that it links to were moved since
    progress.note(f"{place}: read as a child of layersmith, and kept in {folder}.")
    child = child_config(config, block_configs_of(config))
    child.architectures = [stock_class(child).__name__]
    with whole_folder(folder) as made:
        for file in weight_files(place):
            target = made / file.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            renamed = {name: _ordinary_name(name) for name in read_safetensors_header(file)[0]}
            if all(name == new for name, new in renamed.items()):
                target.symlink_to(file.resolve())
            else:
                write_tensors(target, {renamed[n]: t for n, t in read_tensors(file).items()}, {"format": "pt"})
        if (place / INDEX).is_file():
            index = read_json(place / INDEX, dict[str, Any])
            write_json(made / INDEX, index | {"weight_map": _renamed(index["weight_map"])})
        with _silence():
            child.save_pretrained(made)
        finish_folder(made)
        _copy_others(place, made)
    return folder


def _ordinary_name(name: str) -> str:
    for theirs, ours in deci.LINEAR_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _renamed(weight_map: dict[str, str]) -> dict[str, str]:
    return {_ordinary_name(name): file for name, file in weight_map.items()}


def quantization_of(path: str | os.PathLike[str], trust_remote_code: bool = False) -> str | None:
    """The format of a checkpoint's quantized weights, e.g. ``gguf`` or ``gptq``; None if they are not quantized."""
    if gguf_location(path):
        return "gguf"
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None  # refused where the checkpoint is read
    settings = _settings(read_config(path, trust_remote_code=trust_remote_code))
    return None if settings is None else str(settings.get("quant_method", "an unnamed format"))


def _settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization settings in a config."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return dict(settings) if isinstance(settings, dict) else settings.to_dict()
    return None


def _differs(path: str | os.PathLike[str], dtype: str, trust_remote_code: bool) -> bool:
    stored = getattr(read_config(path, trust_remote_code=trust_remote_code).get_text_config(), "dtype", None)
    return str(stored).removeprefix("torch.") != dtype


def _dtype_beside(path: str | os.PathLike[str], trust_remote_code: bool) -> str:
    """The data type for weights that are quantized."""
    if gguf_location(path):
        return DTYPE
    config = read_config(path, trust_remote_code=trust_remote_code)
    stored = str(getattr(config.get_text_config(), "dtype", None)).removeprefix("torch.")
    return stored if names_modules(_settings(config) or {}) and stored != "None" else DTYPE


def _dequantized(path: Path, dtype: torch.dtype, method: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """A model whose weights are all of this dtype."""
    if method is not None and method not in {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes", "gguf"}:
        raise UnsupportedModel(f"{path}: this version of Transformers does not know the weights' format {method!r}.")
    package = _PACKAGES.get(method or "")
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise InputError(f"{path}: to read {method} weights, install the package {package}: pip install {package}")
    config = causal_lm_config(read_config(path, trust_remote_code=trust_remote_code))
    settings = _settings(config)
    if method == "compressed-tensors" and settings is not None and names_modules(settings):
        with foreign_code("can compressed-tensors unpack the weights?", refusal_is_answer=True) as attempt:
            tensors = attempt.call(dense_tensors, path, settings)
        if attempt.failed:
            raise InputError(f"{path}: damaged ({attempt.reason}). Make it again.") from attempt.error
        return _loaded(config, tensors, dtype, path)
    cls: Any = stock_class(config)
    how: dict[str, str] = {}
    if location := gguf_location(path):
        folder, how["gguf_file"] = location
        settings = None
        if "gguf" in AUTO_QUANTIZATION_CONFIG_MAPPING:  # earlier versions dequantize it in any case
            settings = {"quant_method": "gguf", "gguf_file": location[1]}
        refuse_larger(cls, config, path, 8 * path.stat().st_size)
    else:
        folder = path
    if settings is not None:  # formats without this key ignore it, and are dequantized below
        config.quantization_config = {**settings, "dequantize": True}
    with foreign_code(f"can Transformers dequantize {method}?", refusal_is_answer=True) as attempt, _silence():
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True, **how)
        if getattr(model, "hf_quantizer", None) is not None and _is_packed(model):
            model = model.dequantize(dtype)
    if attempt.failed:
        raise UnsupportedModel(
            f"{path}: Transformers cannot dequantize its {method} weights here ({attempt.reason}). "
            "Give the checkpoint before its quantization."
        ) from attempt.error
    try:
        refuse_incomplete(info, str(path))
    except ValueError as error:
        raise InputError(str(error)) from error
    plain = _plain(model.config, model.state_dict(), dtype, path, method)
    plain.generation_config = model.generation_config
    return plain


def _is_packed(model: PreTrainedModel) -> bool:
    """Whether some weights are still in the quantized format."""
    return any(t.dtype not in FLOATS for t in model.state_dict().values())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep progress bars and warnings of Transformers off the screen; some do not ask whether they are wanted."""
    with quiet_transformers(), warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def _without_format(config: PretrainedConfig) -> PretrainedConfig:
    """The config, which knows nothing of a former format of the weights."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "_name_or_path"):
            if name in vars(part):
                delattr(part, name)
    return without_guard(config)


def _loaded(
    config: PretrainedConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> PreTrainedModel:
    """A model with weights by their names in files."""
    config = _without_format(config)
    cls: Any = class_for(stock_class(config), config)
    with foreign_code(f"do the weights of {path} load?", refusal_is_answer=True) as attempt, _silence():
        model, info = attempt.call(
            cls.from_pretrained, None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        refuse_incomplete(info, str(path))
    if attempt.failed:
        raise InputError(f"{path}: the weights do not match config.json: {attempt.reason}.") from attempt.error
    result: PreTrainedModel = model
    return result


def _plain(
    config: PretrainedConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path, method: str | None
) -> PreTrainedModel:
    """A model with these weights, which knows nothing of their former format."""
    config = _without_format(config)
    with torch.device("meta"), quiet_transformers():
        plain = model_from_config(class_for(stock_class(config), config), copy.deepcopy(config), dtype=dtype)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    expected = dict(plain.state_dict())
    shared = plain.all_tied_weights_keys
    tensors = {name: tensors[source] for name, source in shared.items() if source in tensors} | tensors
    wrong = [name for name, t in expected.items() if name not in tensors or tensors[name].shape != t.shape]
    if wrong:
        raise UnsupportedModel(
            f"{path}: after Transformers dequantized its {method} weights, {wrong[0]} is missing or of another shape. "
            "Give the checkpoint before its quantization."
        )
    plain.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    plain.tie_weights()
    return plain


def _save(model: PreTrainedModel, path: Path, folder: Path, trust_remote_code: bool) -> None:
    with _silence():
        model.save_pretrained(folder)
        if location := gguf_location(path):
            with foreign_code("does the GGUF file hold a tokenizer?", refusal_is_answer=True) as attempt:
                tokenizer = AutoTokenizer.from_pretrained(location[0], gguf_file=location[1])
                _split_as_named(tokenizer, path)
                tokenizer.save_pretrained(folder)
            if attempt.failed:
                raise InputError(f"{path}: its tokenizer cannot be read ({attempt.reason}).") from attempt.error
            return
    _copy_others(path, folder)
    if trust_remote_code:
        for file in path.glob("*.py"):
            shutil.copyfile(file, folder / file.name)


def _split_as_named(tokenizer: Any, file: Path) -> None:
    """Let a tokenizer split text as the GGUF file names it; Transformers takes GPT-2's way for all byte-level BPE."""
    from gguf import GGUFReader

    name = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if name is not None:
        split_as(str(name.contents()), tokenizer.backend_tokenizer)


def _copy_others(path: Path, folder: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in path.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, folder / file.name)
