"""Processes that a launcher such as ``torchrun`` started: what all do together, and what the first does for all.

They talk to each other in a process group on the CPU, with a timeout longer than any stage: while one works, the others
wait for it. An error in one of them is raised in all. With one process these functions only call what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

from layersmith import errors
from layersmith.errors import LayersmithError, first_line
from layersmith.run.runtime import Runtime

# The first process may score or evaluate for long, while the others wait for it.
_TIMEOUT = timedelta(days=7)

T = TypeVar("T")


def start(runtime: Runtime) -> None:
    """Connect the processes; all must call this."""
    if runtime.world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if runtime.device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        _group()


@cache
def _group() -> Any:
    """A group of all processes on the CPU: waiting takes no GPU, and a launcher's own time limit does not apply."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def together(work: Callable[[], T]) -> T:
    """Let every process do its part; returns this one's result when all are done.

    Raises:
        Exception: The error of this process, or an error of the same kind as the first that failed.
    """
    try:
        result = work()
    except Exception as error:
        _exchange(error)
        raise
    _exchange(None)
    return result


def on_first(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let the first process work, and the others do something else, or wait for it."""
    together(work if is_first() else meanwhile)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    made: list[Any] = [None]

    def work() -> None:
        made[0] = make()

    on_first(work)
    if are_several():
        dist.broadcast_object_list(made, 0, group=_group())
    result: T = made[0]
    return result


@contextmanager
def first(opened: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A context that the first process alone opens."""
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened()))
        yield


def _exchange(error: Exception | None) -> None:
    """Tell all processes of an error; raises another process's error if there is none here.

    An error that was exchanged in an inner :func:`together` comes here once more in all processes, which is harmless.
    """
    if not are_several():
        return
    failures: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(failures, None if error is None else _as_data(error), group=_group())
    except RuntimeError as lost:  # a process is gone
        if error is None:
            raise LayersmithError("another process of this run ended; what it printed says why.") from lost
        return
    failed = next((failure for failure in failures if failure is not None), None)
    if error is None and failed is not None:
        raise _from_data(*failed)


def _as_data(error: Exception) -> tuple[str, str]:
    """Name of the error's class, if it is one of ours, and its message."""
    if isinstance(error, LayersmithError):
        name = type(error).__name__
        return (name if hasattr(errors, name) else LayersmithError.__name__), str(error)
    return "", f"{type(error).__name__}: {first_line(error)}"


def _from_data(name: str, text: str) -> Exception:
    return getattr(errors, name)(text) if name else RuntimeError(f"another process of this run failed: {text}")
