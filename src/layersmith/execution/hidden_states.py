"""Hidden states between layers: in memory, in a file where the parent's weights stay on the disk, or sent on.

Where several processes work on one model, each has some of its layers. All run the same loops over layers, in which
each skips those of others. A tensor that one puts goes to the process that gets it, and who gets a tensor waits for it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from layersmith.execution.files import read_into, write_from
from layersmith.run import ranks
from layersmith.run.artifacts import saying_disk_full
from layersmith.run.messages import Messages, exchanging


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


class SharedStates(States):
    """Tensors that several processes share: what one puts under a key goes to the processes that will get it.

    Args:
        states: Where tensors wait that this process will get.
        homes: Gives the numbers of the processes that get a key; perhaps none.
        device: Where tensors that arrive are wanted.
    """

    def __init__(self, states: States, homes: Callable[[Any], Iterable[int]], device: torch.device):
        self._states, self._homes, self._device, self.capacity = states, homes, device, states.capacity
        self._arrived = threading.Condition()
        self._error: Exception | None = None
        self._here: set[Hashable] = set()
        self._messages: Messages | None = None

    @contextmanager
    def open(self) -> Iterator[Self]:
        """All processes open theirs together, and leave when all are done.

        Raises:
            FailedElsewhere: Another process failed.
            RuntimeError: A process is gone.
        """
        with exchanging(self._deliver, self._fail) as self._messages:
            yield self
        if self._error is not None:
            raise self._error

    def _deliver(self, key: Hashable, tensor: torch.Tensor) -> None:
        with self._arrived:
            self._states.put(key, tensor)
            self._here.add(key)
            self._arrived.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._arrived:
            self._error = error
            self._arrived.notify_all()

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        for rank in self._homes(key):
            if rank == ranks.number():
                self._deliver(key, tensor)
            else:
                assert self._messages is not None
                assert isinstance(key, tuple)
                self._messages.send(key, tensor, rank)

    @contextmanager
    def _waited(self, key: Hashable) -> Iterator[None]:
        """With the tensor of a key here, and no other thread at work."""
        with self._arrived:
            self._arrived.wait_for(lambda: key in self._here or self._error is not None)
            if self._error is not None:
                raise self._error
            yield

    def get(self, key: Hashable) -> torch.Tensor:
        with self._waited(key):
            return self._states.get(key).to(self._device)

    def part(self, key: Hashable, start: int, end: int) -> torch.Tensor:
        with self._waited(key):
            return self._states.part(key, start, end).to(self._device)

    def forget(self, key: Hashable) -> None:
        with self._waited(key):
            self._here.remove(key)
            self._states.forget(key)
