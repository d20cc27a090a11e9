"""Hidden states that wait for the next layer: in memory, or in a file where the parent's weights stay on the disk."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch

from layersmith.run.artifacts import saying_disk_full


class States:
    """Tensors by what they are of, in memory."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor

    def get(self, key: Hashable) -> torch.Tensor:
        return self._tensors[key]

    def part(self, key: Hashable, start: int, end: int) -> torch.Tensor:
        """Some neighbouring tokens of ``[B, T, D]``."""
        return self._tensors[key][:, start:end]

    def forget(self, key: Hashable) -> None:
        """Nobody will ask for it again."""
        del self._tensors[key]

    def pop(self, key: Hashable) -> torch.Tensor:
        """As :meth:`get`, and :meth:`forget`."""
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
    """Tensors by what they are of, in a file without a name: it goes with the process, however that ends.

    Args:
        folder: where there is room for it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
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
        memory, at = memoryview(raw), start  # type: ignore[arg-type]
        with saying_disk_full(self._folder):
            while memory:
                done = os.pwrite(self._file.fileno(), memory, at)
                memory, at = memory[done:], at + done
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
        memory = memoryview(into.numpy())  # type: ignore[arg-type]
        while memory:
            done = os.preadv(self._file.fileno(), [memory], at)
            memory, at = memory[done:], at + done

    def forget(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._free.setdefault(slot.bytes, []).append(slot.start)
