"""Run work in all processes that a launcher such as ``torchrun`` started, or in the first process for all.

The processes communicate in a process group on the CPU, with a timeout longer than any stage, since some wait while
another works. An error in one process is raised in all. With a single process these functions just call their argument.
"""

from __future__ import annotations

import atexit
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from layersmith import errors
from layersmith.errors import LayersmithError, OutOfMemory, first_line
from layersmith.foreign import is_out_of_memory
from layersmith.run.runtime import Runtime
from layersmith.run.watch import Watch, watch_over, without_memory

# The first process may score or evaluate for days while the others wait.
_TIMEOUT = timedelta(days=7)

# The watch over the other processes, while there is one.
_watches: list[Watch] = []

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another process failed while this one worked with it; :func:`together` raises that one's error instead."""


def start(runtime: Runtime) -> None:
    """Connect the processes; all must call this."""
    if runtime.world_size > 1:
        if not dist.is_initialized():
            _connect("nccl" if runtime.device.type == "cuda" else "gloo")
        _group()
        message_group()


def _connect(backend: str) -> None:
    """Make the default group. Addresses of processes before a restart of ``torchrun`` are not mistaken for new ones.

    torchrun keeps one store for all its restarts, and in torch 2.13 nothing in its keys tells them apart.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    atexit.register(_disconnect)


def _disconnect() -> None:
    """End the threads of all groups before the interpreter ends, which they may abort otherwise."""
    for group in (_group, message_group):
        group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _group() -> Any:
    """A group of all processes on the CPU: waiting needs no GPU, and the time limit of the launcher does not apply."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


@cache
def message_group() -> Any:
    """A group for messages from one process to another, which other threads receive (:mod:`.messages`)."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def are_several() -> bool:
    return count() > 1


def is_first() -> bool:
    return number() == 0


def together(work: Callable[[], T]) -> T:
    """Call ``work`` in every process, and return this process's result when all have finished.

    Raises:
        Exception: The error of this process, or an error of the same kind as the first that failed.
    """
    try:
        result = work()
    except FailedElsewhere:
        _exchange(None)
        raise
    except Exception as error:
        _exchange(error)
        raise
    _exchange(None)
    return result


def from_each(work: Callable[[], T]) -> list[T]:
    """Call ``work`` in every process, which may do different things in each, and return all results in all.

    Raises:
        Exception: As from :func:`together`.
    """
    mine = together(work)
    if not are_several():
        return [mine]
    with _collective():
        return _gathered(mine)


def to_first(mine: T) -> list[T]:
    """What each process has, by its number, in the first; nothing in the others."""
    if not are_several():
        return [mine]
    result: list[Any] | None = [None] * count() if is_first() else None
    with _collective():
        dist.gather_object(mine, result, group=_group())
    return result or []


def add_up(tensors: dict[str, torch.Tensor]) -> None:
    """Add each tensor of all processes to that of the first, in place, in an order that the number of processes fixes.

    Args:
        tensors: Tensors by name, on the CPU. A process may lack any of them but those of the first.
    """
    if not are_several():
        return
    for name, (shape, dtype) in from_first(lambda: {n: (t.shape, t.dtype) for n, t in tensors.items()}).items():
        mine = tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype)
        with _collective():
            dist.reduce(mine, 0, group=_group())


def on_first(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Call ``work`` in the first process and ``meanwhile`` in the others, and wait for all."""
    together(work if is_first() else meanwhile)


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process and return its result in all."""
    made: list[Any] = [None]

    def work() -> None:
        made[0] = make()

    on_first(work)
    if are_several():
        with _collective():
            dist.broadcast_object_list(made, 0, group=_group())
    result: T = made[0]
    return result


@contextmanager
def first(opened: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Open a context in the first process only; while it is open, the processes watch each other."""
    with watched(), ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened()))
        yield


@contextmanager
def watched() -> Iterator[None]:
    """End this process with one sentence if another one is killed, hangs or cannot be reached."""
    if not are_several() or _watches:
        yield
        return
    watch = watch_over(number(), _gathered)
    _watches.append(watch)
    try:
        yield
    finally:
        watch.stop()
        _watches.clear()


def leave(error: Exception) -> None:
    """End this process and all others at once, because it can no longer do what they wait for; if they are watched."""
    for watch in _watches:
        watch.leave(_as_data(error)[1])


@contextmanager
def ending_all() -> Iterator[None]:
    """Inside, processes wait for each other in collective operations of other packages.

    An error that only some of them have ends all, as the others cannot be reached there. One of the connection says
    that another process is gone, which is the one to name.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            _gone()
        for watch in _watches:
            if watch.errs_alone():
                if not isinstance(error, LayersmithError):
                    traceback.print_exception(error)
                watch.leave(_as_data(error)[1])
        raise


@contextmanager
def _collective() -> Iterator[None]:
    """What all processes do at the same time; if it fails, one of them is gone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            leave(error)
            raise
        raise _gone() from error


def _gone() -> LayersmithError:
    """End this process as soon as it knows which one is gone; if nobody watches, return an error that says less."""
    for watch in _watches:
        watch.give_up()
    return LayersmithError("another process of this run ended; what it printed says why.")


def _gathered(mine: T) -> list[T]:
    """What each process has, by its number."""
    result: list[Any] = [None] * count()
    dist.all_gather_object(result, mine, group=_group())
    return result


def doing(what: str) -> None:
    """Tell the other processes which stage this one works on."""
    for watch in _watches:
        watch.tell(what)


def _exchange(error: Exception | None) -> None:
    """Send an error to all processes, and raise the error of another process if this one has none.

    An error from a nested :func:`together` is exchanged again by all processes, which is harmless.
    """
    if not are_several():
        return
    try:
        failures = _gathered(None if error is None else _as_data(error))
    except (RuntimeError, MemoryError) as lost:  # a process is gone, or there is no memory to say what is wrong
        if is_out_of_memory(lost):
            leave(lost)
        if error is None:
            raise _gone() from lost
        if isinstance(error, RuntimeError):
            _gone()
        return
    failed = next((failure for failure in failures if failure is not None), None)
    if error is None and failed is not None:
        raise _from_data(*failed)


def _as_data(error: Exception) -> tuple[str, str]:
    """The class name of a layersmith error, else an empty name; and the message for the other processes."""
    if isinstance(error, LayersmithError):
        name = type(error).__name__
        return (name if hasattr(errors, name) else LayersmithError.__name__), str(error)
    doing = next((watch.doing for watch in _watches), "")
    if is_out_of_memory(error):
        return OutOfMemory.__name__, without_memory(number(), count(), doing)
    where = f" during the stage {doing}" if doing else ""
    return "", f"process {number()} of {count()} failed{where}: {type(error).__name__}: {first_line(error)}"


def _from_data(name: str, text: str) -> Exception:
    return getattr(errors, name)(text) if name else RuntimeError(text)
