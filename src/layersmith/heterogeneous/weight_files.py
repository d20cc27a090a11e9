"""The weight files of a checkpoint folder: which there are, whether they are whole, and which tensor is in which."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.run.artifacts import read_json
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
