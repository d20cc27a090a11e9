"""Tensors in files: read at their place when they are needed, without mapping files into memory.

Why not safetensors' own slices: they map a whole file, and all pages that were read stay in the resident set of the
process as long as the file is open. Reading eight 32 MiB tensors one after another, the resident set grew by 292 MiB
that way and by 34 MiB this way; the times differed by less than the noise of the machine, 30%. A file that is opened
anew for each tensor is not mapped for long, but must keep its name. Files of converted weights have none, so that a
killed process leaves nothing behind.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layersmith.errors import InputError
from layersmith.heterogeneous.checkpoint import check_finite
from layersmith.untrusted import read_safetensors_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Read and converted at once: a small addition to memory, and large enough for a disk to be fast.
_CHUNK_BYTES = 8 * 1024**2


def read_into(file: int, memory: memoryview, at: int) -> None:
    """Fill ``memory`` from a place of an open file.

    Raises:
        EOFError: the file ends before.
    """
    while memory:
        if hasattr(os, "preadv"):
            done = os.preadv(file, [memory], at)
        else:  # a system without it pays for a copy
            data = os.pread(file, len(memory), at)
            done, memory[: len(data)] = len(data), data
        if done == 0:
            raise EOFError("the file is shorter than it was")
        memory, at = memory[done:], at + done


def write_from(file: int, memory: memoryview, at: int) -> None:
    """Write ``memory`` at a place of an open file."""
    while memory:
        done = os.pwrite(file, memory, at)
        memory, at = memory[done:], at + done


def in_unnamed_file(tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """A tensor in a dtype, mapped from a file that loses its name at once, so the system can have its memory back."""
    if not tensor.numel():
        return tensor.to("cpu", dtype)
    made = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=dtype).view(tensor.shape)
    made.copy_(tensor)
    path.unlink()
    return made


@dataclass(frozen=True)
class _Tensor:
    """A tensor in an open file."""

    file: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Files:
    """Tensors of safetensors files, read when they are needed.

    Args:
        places: name to a file and the tensor's name in it.
        dtype: in which floating-point tensors are read.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]], dtype: torch.dtype):
        self.dtype = dtype
        self._open: dict[Path, int] = {}
        headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self._tensors: dict[str, _Tensor] = {}
        for name, (file, inside) in places.items():
            if file not in headers:
                self._open[file] = os.open(file, os.O_RDONLY)
                headers[file] = read_safetensors_header(file)
            entries, base = headers[file]
            entry = entries[inside]
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{file}: {inside} is of type {entry['dtype']}, which is not read from the disk.")
            start = base + entry["data_offsets"][0]
            self._tensors[name] = _Tensor(self._open[file], start, tuple(entry["shape"]), DTYPES[entry["dtype"]])

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """A whole tensor."""
        tensor = self._tensors[name]
        result = torch.empty(tensor.shape, dtype=self._dtype_of(tensor))
        flat = result.view(-1)
        step = flat.numel() if result.dtype == tensor.dtype else _CHUNK_BYTES // tensor.dtype.itemsize
        for first in range(0, flat.numel(), max(1, step)):
            _fill(flat[first : first + step], tensor, first)
        check_finite([(name, result)], "the parent")
        return result.to(device)

    def rows(self, name: str, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Some rows of a matrix; ``indices`` ascend."""
        tensor = self._tensors[name]
        result = torch.empty((len(indices), *tensor.shape[1:]), dtype=self._dtype_of(tensor))
        width = result[0].numel() if len(indices) else 0
        for row, index in zip(result.view(len(indices), -1), indices.tolist(), strict=True):
            _fill(row, tensor, index * width)
        check_finite([(name, result)], "the parent")
        return result.to(device)

    def view(self, name: str) -> torch.Tensor:
        """A whole tensor in the dtype of the file, mapped into memory: the system reads and drops its pages."""
        tensor = self._tensors[name]
        size = tensor.dtype.itemsize * math.prod(tensor.shape)
        if not size:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        # A private map: whoever writes to it changes memory, not the file.
        mapped = mmap.mmap(tensor.file, tensor.start + size, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        return whole[tensor.start :].view(tensor.dtype).view(tensor.shape)

    def _dtype_of(self, tensor: _Tensor) -> torch.dtype:
        return self.dtype if tensor.dtype.is_floating_point else tensor.dtype


def _fill(into: torch.Tensor, tensor: _Tensor, first: int) -> None:
    """Read the elements of a stored tensor from ``first`` on, as many as ``into`` ``[n]`` has."""
    raw = into if into.dtype == tensor.dtype else torch.empty(into.numel(), dtype=tensor.dtype)
    try:
        memory = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
        read_into(tensor.file, memory, tensor.start + first * tensor.dtype.itemsize)
    except EOFError:
        raise InputError("a checkpoint's file became shorter while it was read. Run the same command again.") from None
    if raw is not into:
        into.copy_(raw)
