"""The weight files of a checkpoint folder: which there are, whether they are whole, what they hold. Writes them too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.run.artifacts import read_json, saying_disk_full, write_json, write_tensors
from layersmith.untrusted import inside

INDEX = "model.safetensors.index.json"


def check_files(path: str | os.PathLike[str]) -> None:
    """Check by file sizes and headers that no weights of a checkpoint folder are missing.

    A hub id or GGUF file passes.

    Raises:
        InputError: A file is missing, or shorter than its header says.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json here. Give the folder of a Hugging Face checkpoint.")
    if (folder / "adapter_config.json").is_file():  # Transformers would load the model that it names
        raise InputError(f"{folder}: an adapter, not a whole model. Merge it into its model first.")
    files = weight_files(folder)
    if not files:
        raise InputError(f"{folder}: no safetensors weights here. Convert the checkpoint with save_pretrained first.")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing, though the index of the checkpoint names it. Download it again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise InputError(f"{file}: truncated or damaged ({size:,} bytes; {error}). Download it again.") from error


class _Index(TypedDict):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: all, or those of its index where there is no single file.

    Raises:
        InputError: The index is damaged, or names a file that is not in the folder.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():  # which Transformers prefers
        names: set[str] = set(read_json(index, _Index, "Download it again.")["weight_map"].values())
        return [inside(folder, name, index) for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def weight_map(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint folder."""
    files = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    return files


def read_tensor(places: Mapping[str, Path], name: str) -> torch.Tensor:
    """A tensor, read from the file that :func:`weight_map` has for it."""
    with safe_open(places[name], framework="pt") as tensors:
        return tensors.get_tensor(name)


def refuse_unless_empty(folder: Path) -> None:
    """Raises: InputError: A folder for a new checkpoint has something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: the folder already exists and is not empty. Choose another folder or remove it.")


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in some files; the tensors are not read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def write_files(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    tensor: Callable[[str], torch.Tensor],
    *,
    with_index: bool = True,
) -> None:
    """Write tensors into safetensors files, so that the tensors of one file are in memory, and the index of the files.

    Args:
        folder: Receives the files.
        files: Name of each file to the names of its tensors.
        tensor: Returns the tensor of a name.
        with_index: Whether to write the index.
    """
    total = 0
    with saying_disk_full(folder):
        for file, names in files.items():
            tensors = {name: tensor(name) for name in names}
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            write_tensors(folder / file, tensors, {"format": "pt"})
    if with_index:
        index = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
