"""Load and save checkpoints of any model, heterogeneous or not. A checkpoint that is incomplete is refused.

``save`` writes a folder that loads with layersmith, with Transformers where layersmith is imported, and with stock
Transformers and ``trust_remote_code=True``. ``write_subblocks`` writes the same tensors as one file per weight group.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layersmith import upstream
from layersmith.errors import InputError, UsageError, whole_reason
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import class_for
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.nested import cut
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.heterogeneous.weight_files import (
    check_files,
    read_tensor,
    refuse_unless_empty,
    stored_shapes,
    weight_files,
    weight_map,
    write_files,
)
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.conventions import ATTENTION
from layersmith.model_descriptor.describe import read_config
from layersmith.model_descriptor.stock import (
    causal_lm_config,
    quiet_transformers,
    refuse_larger,
    stock_class,
    stock_model,
)
from layersmith.modeling_layersmith import (
    HeterogeneousMixin,
    refuse_incomplete,
    without_guard,
)
from layersmith.run.artifacts import read_tensors, temporary_folder, whole_folder

SUBBLOCK_FOLDER = "subblocks_safetensors"


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
    size: str | float | None = None,
    **how: Any,
) -> PreTrainedModel:
    """Load any causal language model, heterogeneous or not.

    Args:
        path: Checkpoint folder, hub id or GGUF file.
        dtype: dtype of the weights. Default: the one in the checkpoint; bfloat16 if its weights are quantized.
        device: Device of the model. Default: the CPU.
        device_map: Devices of its modules, as ``from_pretrained`` of Transformers takes it, e.g. ``"auto"``.
        descriptor: Descriptor of the model family, for a heterogeneous checkpoint without a plan.
        trust_remote_code: Let Transformers run code from the checkpoint; layersmith's checkpoints do not need it.
        size: Which of the nested children in a folder, such as ``0.7``. Default: the largest.
        how: Other arguments of ``from_pretrained``, e.g. ``attn_implementation="eager"``.

    Raises:
        UsageError: Both a device and a device map.
        InputError: Files are missing or damaged, or weights and config do not match. No weights are made up.
    """
    if device is not None and device_map is not None:
        raise UsageError("give a device or a device_map, not both.")
    if size is not None:
        with temporary_folder(Path(tempfile.gettempdir()), "size") as near:
            cut(path, size, near / "child")
            more = {"device_map": device_map, "descriptor": descriptor, "trust_remote_code": trust_remote_code, **how}
            return load(near / "child", dtype=dtype, device=device, **more)
    path = ordinary_checkpoint(path, trust_remote_code=trust_remote_code)
    cls, config = class_of(path, descriptor, trust_remote_code)
    if device_map is not None:
        how["device_map"] = device_map
    model = read_weights(cls, path, config, dtype=dtype or "auto", **how)
    check_finite(model.named_parameters(), str(path))
    return model if device is None else model.to(device)


def class_of(
    path: str | os.PathLike[str], descriptor: type[ModelDescriptor] | None, trust_remote_code: bool
) -> tuple[Any, PretrainedConfig]:
    """The class that loads a checkpoint and the config for it, after a check that no file is missing."""
    check_files(path)
    config = causal_lm_config(read_config(path, trust_remote_code=trust_remote_code))
    untie_if_stored_apart(path, config)
    return class_for(stock_class(config), config, descriptor), without_guard(config)


def untie_if_stored_apart(path: str | os.PathLike[str], config: PretrainedConfig) -> None:
    """Let a config say what Transformers does: weights that the checkpoint has twice, with other values, are not tied.

    Otherwise a child, which is built from the config, would lose one of them.
    """
    tied = upstream.tied_weights(stock_class(config))
    if not getattr(config, "tie_word_embeddings", False) or not tied or not Path(path).is_dir():
        return
    places = weight_map(Path(path))
    for name, source in tied.items():
        is_stored = name in places and source in places
        if is_stored and not torch.equal(read_tensor(places, name), read_tensor(places, source)):
            config.tie_word_embeddings = False


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raises: InputError: A weight holds NaN or infinity. The message names the tensor and its first such row."""
    for name, tensor in weights:
        if tensor.is_meta or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            continue
        # A sum is not finite if a term is not, and is quick; it may also overflow.
        if torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            continue
        wrong = ~torch.isfinite(tensor.detach())
        if wrong.any():
            row = int(wrong.nonzero()[0, 0]) if tensor.ndim else 0
            raise InputError(
                f"{where}: {name} has {int(wrong.sum()):,} values that are NaN or infinite in "
                f"{str(tensor.dtype).removeprefix('torch.')}, the first in row {row:,}. Download the checkpoint again, "
                "or repair it."
            )


def _stored_numbers(folder: Path) -> int:
    """How many numbers all tensors of a checkpoint hold."""
    return sum(map(math.prod, stored_shapes(weight_files(folder)).values()))


def read_weights(cls: Any, path: str | os.PathLike[str], config: PretrainedConfig, **how: Any) -> Any:
    """``cls.from_pretrained``, which raises ``InputError`` unless every weight fits."""
    if Path(path).is_dir():
        refuse_larger(cls, config, path, 2 * _stored_numbers(Path(path)))
    with foreign_code(f"Do the weights of {path} load?", refusal_is_answer=True) as attempt, quiet_transformers():
        model, info = attempt.call(
            cls.from_pretrained, path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
        refuse_incomplete(info, str(path))
    if attempt.failed:
        raise InputError(
            f"{path}: the weights do not match config.json: {whole_reason(attempt.error)}."
        ) from attempt.error
    return model


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    write_extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a model as a Hugging Face folder. An error leaves no folder behind.

    Args:
        model: Model from :func:`layersmith.build` or :func:`layersmith.load`, or a stock model.
        path: The new folder; if it exists, it must be empty.
        tokenizer: Tokenizer to save with the model.
        write_extra: Writes further files into the folder that is passed to it.

    Raises:
        InputError: The folder is not empty, or cannot be written.
    """
    folder = Path(path)
    refuse_unless_empty(folder)
    if not isinstance(model, HeterogeneousMixin):
        _refuse_unplanned(model, folder)
    with whole_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if write_extra is not None:
            write_extra(temporary)


def _refuse_unplanned(model: PreTrainedModel, folder: Path) -> None:
    expected = {name: tensor.shape for name, tensor in stock_model(model.config).state_dict().items()}
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != expected:
        raise InputError(
            f"{folder}: the layers of this model differ but its config does not say how, so it could not be loaded. "
            "Build it with layersmith.build."
        )


# ---------------------------------------------------------------------------------------------- one file per group


def weight_groups(descriptor: type[ModelDescriptor], names: Iterable[str], num_layers: int) -> dict[str, list[str]]:
    """``get_weight_groups``, extended to linear subblocks, which the patterns of a descriptor may not match."""
    names = list(names)
    linear = {}
    for i in range(num_layers):
        prefix = descriptor.layer_block_name(i) + "."
        for name in names:
            if name.startswith(prefix) and name.endswith(".linear.weight"):
                linear[name] = i
    groups = descriptor.get_weight_groups((name for name in names if name not in linear), num_layers)
    for name, i in linear.items():
        groups.setdefault(_group_of_linear(descriptor, name, i, num_layers), []).append(name)
    return groups


def _group_of_linear(descriptor: type[ModelDescriptor], name: str, index: int, num_layers: int) -> str:
    """The group of the module that a linear map replaced, by the patterns or else by the module's name."""
    predicates = descriptor.layer_name_predicates(num_layers)
    module = name.removesuffix("linear.weight")
    for subblock in SUBBLOCKS:
        pattern = predicates.get(f"block_{index}_{subblock}")
        if pattern is not None and (pattern.match(name) or module in pattern.pattern.replace("\\.", ".")):
            return f"block_{index}_{subblock}"
    return f"block_{index}_attention" if any(part in module for part in ATTENTION) else f"block_{index}_ffn"


def write_subblocks(
    tensors: Mapping[str, torch.Tensor], descriptor: type[ModelDescriptor], num_layers: int, folder: str | os.PathLike
) -> None:
    """Write one safetensors file per weight group, and an index that Transformers reads as well.

    Args:
        tensors: ``state_dict`` of a model. Of tensors that share memory (tied embeddings) the first is written.
        descriptor: Descriptor of the model family.
        num_layers: Number of decoder layers.
        folder: Folder for ``model.safetensors.index.json`` and ``subblocks_safetensors/{group}.safetensors``.
    """
    folder = Path(folder)
    unique: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in tensors.items():
        if (key := (tensor.data_ptr(), tensor.shape)) not in seen or tensor.numel() == 0:
            seen.add(key)
            unique[name] = tensor.detach().cpu()
    groups = weight_groups(descriptor, unique, num_layers)
    files = {f"{SUBBLOCK_FOLDER}/{group}.safetensors": names for group, names in groups.items()}
    write_files(folder, files, unique.__getitem__)


def read_subblocks(folder: str | os.PathLike[str], groups: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors in a folder that :func:`write_subblocks` wrote, of all groups or of some.

    Raises:
        InputError: A file in the index is missing or damaged, or a group does not exist.
    """
    folder = Path(folder)
    files = {file.stem: file for file in weight_files(folder)}
    tensors: dict[str, torch.Tensor] = {}
    for group in files if groups is None else groups:
        if group not in files:
            raise InputError(f"{folder}: no weight group {group!r}. It has {', '.join(sorted(files))}.")
        tensors |= read_tensors(files[group])
    return tensors
