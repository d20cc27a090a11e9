"""Tensors that processes send to each other while each works on its own layers.

For every other process a thread receives what that one sends, so nobody waits until a busy process has time. A process
that fails says so instead of sending more. Whoever waits for it then fails too, and says so to the rest.

Messages travel through gloo and the memory of the CPU. A message is a head of numbers, the key as JSON, and the tensor.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from layersmith.errors import LayersmithError
from layersmith.foreign import is_out_of_memory
from layersmith.run import ranks

# Strings and whole numbers.
Key = tuple[Any, ...]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_MOST_DIMENSIONS = 6
_ENDED, _FAILED, _TENSOR = range(3)


class Messages:
    """Sends tensors to other processes and delivers those that they send; :func:`exchanging` makes one."""

    def __init__(self, deliver: Callable[[Key, torch.Tensor], None], fail: Callable[[Exception], None]):
        self._deliver, self._fail = deliver, fail
        others = [rank for rank in range(ranks.count()) if rank != ranks.number()]
        self._threads = {rank: threading.Thread(target=self._receive, args=(rank,), daemon=True) for rank in others}

    def send(self, key: Key, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor; it has arrived when this returns."""
        tensor, name = tensor.detach().cpu().contiguous(), _bytes(json.dumps(key).encode())
        self._head(to, _TENSOR, len(name), _DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape)
        _send(name, to)
        if tensor.numel():
            _send(tensor, to)

    def start(self) -> None:
        for thread in self._threads.values():
            thread.start()

    def end(self, is_failed: bool) -> None:
        """Say that nothing more will come, and wait until all others have said so."""
        for rank in self._threads:
            try:
                self._head(rank, _FAILED if is_failed else _ENDED)
            except Exception as error:
                if is_out_of_memory(error):
                    ranks.leave(error)
                if not isinstance(error, RuntimeError):  # one that is gone; its thread has noticed
                    raise
        for thread in self._threads.values():
            thread.join()

    def _head(self, to: int, *numbers: int) -> None:
        _send(torch.tensor([*numbers, *[0] * (4 + _MOST_DIMENSIONS - len(numbers))]), to)

    def _receive(self, source: int) -> None:
        try:
            while True:
                what, length, dtype, dimensions, *shape = _received(
                    (4 + _MOST_DIMENSIONS,), torch.int64, source
                ).tolist()
                if what == _FAILED:
                    self._fail(ranks.FailedElsewhere())
                if what != _TENSOR:
                    return
                name = _received((length,), torch.uint8, source).numpy().tobytes()
                tensor = _received(shape[:dimensions], _DTYPES[dtype], source)
                try:
                    self._deliver(_key(json.loads(name)), tensor)
                except (OSError, LayersmithError) as error:  # no room for it; the sender must not notice
                    self._fail(error)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # nobody takes what the others go on to send
                ranks.leave(error)
            self._fail(error)


@contextmanager
def exchanging(deliver: Callable[[Key, torch.Tensor], None], fail: Callable[[Exception], None]) -> Iterator[Messages]:
    """While open, processes send each other tensors. All open it together, and leave when all are done.

    Args:
        deliver: Called in another thread with each tensor that arrives, on the CPU.
        fail: Called in another thread with an error, after which no more will come from some process.
    """
    ranks.together(lambda: None)  # one that has failed already will receive nothing
    messages = Messages(deliver, fail)
    try:
        messages.start()
    except RuntimeError as error:  # some of its threads cannot start
        ranks.leave(error)
        raise
    try:
        yield messages
    except (Exception, GeneratorExit):
        messages.end(is_failed=True)
        raise
    messages.end(is_failed=False)


def _send(tensor: torch.Tensor, to: int) -> None:
    dist.send(tensor, to, group=ranks.message_group())


def _received(shape: Any, dtype: torch.dtype, source: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        dist.recv(tensor, source, group=ranks.message_group())
    return tensor


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _key(value: Any) -> Any:
    return tuple(map(_key, value)) if isinstance(value, list) else value
