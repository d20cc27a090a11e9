"""One checkpoint that holds nested children of several sizes, and a smaller child cut from it.

The folder is the checkpoint of the largest child. ``sizes/NAME`` has the files of a smaller child without its weights,
and what makes these from the largest child's: ``parts.json`` says for every tensor from which one it is taken, and
``parts.safetensors`` has the indices that stay, or the tensor itself where it is not a part of the largest child's,
such as a refitted projection. What is cut has the same bits as the child that was written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.heterogeneous.weight_files import (
    read_tensor,
    refuse_unless_empty,
    weight_files,
    weight_map,
    write_files,
)
from layersmith.run.artifacts import read_json, read_tensors, whole_folder, write_json, write_tensors
from layersmith.untrusted import inside

# The smaller children, and a table of all sizes.
SIZES, NESTED = "sizes", "nested.json"
_PARTS, _TENSORS = "parts.json", "parts.safetensors"


class _Part(TypedDict):
    """Where a tensor comes from: a tensor of the largest child, or itself; and the dimension of its indices, if any."""

    source: str | None
    dim: int | None


class _Parts(TypedDict):
    """What ``parts.json`` holds: tensors by name, and the names in every file of the checkpoint."""

    tensors: dict[str, _Part]
    files: dict[str, list[str]]


def sizes_of(folder: Path) -> list[str]:
    """Names of the smaller children in a folder."""
    return sorted((path.parent.name for path in folder.glob(f"{SIZES}/*/{_PARTS}")), reverse=True)


def write_parts(folder: Path, small: Path) -> int:
    """Replace the weights of a smaller child by what makes them from the largest child's.

    Args:
        folder: Checkpoint of the largest child.
        small: Checkpoint of the smaller one, which loses its weight files.

    Returns:
        Bytes of the tensors that are not parts of the largest child's.
    """
    places, files = weight_map(folder), weight_files(small)
    digests = {_digest(read_tensor(places, name)): name for name in places}
    of_small = weight_map(small)
    parts: dict[str, _Part] = {}
    stored: dict[str, torch.Tensor] = {}
    own = 0
    for name in of_small:
        tensor = read_tensor(of_small, name)
        large = read_tensor(places, name) if name in places else None
        if large is not None and torch.equal(large, tensor):
            parts[name] = {"source": name, "dim": None}
        elif (same := digests.get(_digest(tensor))) is not None:  # an expert that has another number now
            parts[name] = {"source": same, "dim": None}
        elif large is not None and (found := _positions(large, tensor)) is not None:
            stored[name] = found[1].int()
            parts[name] = {"source": name, "dim": found[0]}
        else:
            stored[name] = tensor
            parts[name] = {"source": None, "dim": None}
            own += tensor.nbytes
    by_file = {file.name: sorted(name for name, place in of_small.items() if place == file) for file in files}
    write_tensors(small / _TENSORS, stored)
    write_json(small / _PARTS, {"tensors": parts, "files": by_file})
    for file in files:
        file.unlink()
    return own


def cut(folder: str | os.PathLike[str], size: str | float, out: str | os.PathLike[str]) -> None:
    """Write a smaller child of a folder of nested children as a checkpoint of its own.

    Args:
        folder: Folder with nested children.
        size: Name of the size, such as ``0.7``.
        out: The new folder.

    Raises:
        InputError: There is no such size, a file is damaged, or the folder exists.
    """
    folder, out = Path(folder), Path(out)
    sizes, name = sizes_of(folder), str(size)
    if name not in sizes:
        known = f"It has {', '.join(sizes)}, and the largest without a size." if sizes else "It has one size only."
        raise InputError(f"{folder}: no nested child of size {name}. {known}")
    refuse_unless_empty(out)
    small, places = folder / SIZES / name, weight_map(folder)
    parts, stored = read_json(small / _PARTS, _Parts), read_tensors(small / _TENSORS)
    known_parts = parts["tensors"]

    def tensor(of: str) -> torch.Tensor:
        part = known_parts[of]
        if part["source"] is None:
            return stored[of]
        large = read_tensor(places, part["source"])
        return large if part["dim"] is None else _taken(large, part["dim"], stored[of].long())

    with whole_folder(out) as made:
        shutil.copytree(small, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_PARTS, _TENSORS))
        for file in parts["files"]:
            inside(made, file, small / _PARTS)
        write_files(made, parts["files"], tensor, with_index=len(parts["files"]) > 1)


def _digest(tensor: torch.Tensor) -> tuple[bytes, torch.Size, torch.dtype]:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).digest(), tensor.shape, tensor.dtype


def _positions(large: torch.Tensor, small: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """The dimension along which a tensor is a part of a larger one, and the indices that it has of it; else None.

    The indices of a stack of matrices may differ from one to the next; then they are ``[members, indices]``.
    """
    if large.ndim != small.ndim or large.dtype != small.dtype:
        return None
    dims = [d for d, (a, b) in enumerate(zip(large.shape, small.shape, strict=True)) if a != b]
    if len(dims) != 1:
        return None
    (dim,) = dims
    found = _matched(large, small, dim)
    if found is None and dim > 0:
        each = [_matched(a, b, dim - 1) for a, b in zip(large, small, strict=True)]
        members = [indices for indices in each if indices is not None]
        found = torch.stack(members) if len(members) == len(each) else None
    return None if found is None or not torch.equal(_taken(large, dim, found), small) else (dim, found)


def _matched(large: torch.Tensor, small: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Indices of the slices of a tensor in a larger one; None if one is not there."""
    places = {_digest(slice)[0]: k for k, slice in enumerate(large.movedim(dim, 0))}
    found = [places.get(_digest(slice)[0]) for slice in small.movedim(dim, 0)]
    indices = [k for k in found if k is not None]
    return torch.tensor(indices, dtype=torch.long) if len(indices) == len(found) else None


def _taken(large: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    if indices.ndim == 1:
        return large.index_select(dim, indices)
    return torch.stack([member.index_select(dim - 1, rows) for member, rows in zip(large, indices, strict=True)])
