"""Hidden states between layers: in memory, or in a file where the parent's weights stay on the disk."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch

from layersmith.execution.files import read_into, write_from
from layersmith.run.artifacts import saying_disk_full


class States:
    """Tensors by a key, in memory.

    Attributes:
        capacity: Bytes that users should keep here at a time, at most.
    """

    capacity = math.inf

    def __init__(self) -> None:
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor

    def get(self, key: Hashable) -> torch.Tensor:
        return self._tensors[key]

    def part(self, key: Hashable, start: int, end: int) -> torch.Tensor:
        """The tokens from ``start`` to ``end - 1`` of ``[B, T, D]``."""
        return self._tensors[key][:, start:end]

    def forget(self, key: Hashable) -> None:
        """Free a tensor."""
        del self._tensors[key]

    def pop(self, key: Hashable) -> torch.Tensor:
        """:meth:`get` a tensor and :meth:`forget` it."""
        tensor = self.get(key)
        self.forget(key)
        return tensor


@dataclasses.dataclass(frozen=True)
class _Slot:
    start: int
    bytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class StatesOnDisk(States):
    """Tensors by a key, in a file without a name, which disappears when the process ends, however that happens.

    Args:
        folder: A folder on a disk with enough room.
        capacity: See :class:`States`.
    """

    def __init__(self, folder: Path, capacity: float = math.inf):
        self._folder, self.capacity = folder, capacity
        with saying_disk_full(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as this is
        self._slots: dict[Hashable, _Slot] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        old = self._slots.pop(key, None)
        if old is not None:
            self._free.setdefault(old.bytes, []).append(old.start)
        reusable = self._free.get(raw.nbytes)
        start = reusable.pop() if reusable else self._end
        if start == self._end:
            self._end += raw.nbytes
        with saying_disk_full(self._folder):
            write_from(self._file.fileno(), memoryview(raw), start)  # type: ignore[arg-type]
        self._slots[key] = _Slot(start, raw.nbytes, tensor.shape, tensor.dtype, tensor.device)

    def get(self, key: Hashable) -> torch.Tensor:
        slot = self._slots[key]
        raw = torch.empty(slot.bytes, dtype=torch.uint8)
        self._read(raw, slot.start)
        return raw.view(slot.dtype).view(slot.shape).to(slot.device)

    def part(self, key: Hashable, start: int, end: int) -> torch.Tensor:
        slot = self._slots[key]
        num_rows, length, _ = slot.shape
        of_token = slot.bytes // (num_rows * length)
        raw = torch.empty(num_rows, (end - start) * of_token, dtype=torch.uint8)
        for number, row in enumerate(raw):
            self._read(row, slot.start + (number * length + start) * of_token)
        return raw.view(slot.dtype).view(num_rows, end - start, -1).to(slot.device)

    def _read(self, into: torch.Tensor, at: int) -> None:
        read_into(self._file.fileno(), memoryview(into.numpy()), at)  # type: ignore[arg-type]

    def forget(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._free.setdefault(slot.bytes, []).append(slot.start)
