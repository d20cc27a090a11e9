"""Processes that a launcher such as ``torchrun`` started: what all do together, and what the first does for all.

They talk to each other in a group of their own, over the CPU, with more patience than any stage takes: while one works,
the others wait for it. What goes wrong in one of them is raised in all. Where there is one process, all of this does
nothing but call what it is given.
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
_PATIENCE = timedelta(days=7)
_TOLD = "told to all"

T = TypeVar("T")


def start(runtime: Runtime) -> None:
    """Let the processes know each other; all must come here."""
    if runtime.world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if runtime.device.type == "cuda" else "gloo", timeout=_PATIENCE)
        _group()


@cache
def _group() -> Any:
    """All processes, over the CPU: waiting takes no GPU, and has no launcher's own time limit."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def together(work: Callable[[], T]) -> T:
    """Let every process do its part; gives back what this one made when all are done.

    Raises:
        Exception: what went wrong here, or, as the same kind of error, in the first process in which something did.
    """
    try:
        made = work()
    except Exception as error:
        _agree(error)
        raise
    _agree(None)
    return made


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
    found: T = made[0]
    return found


@contextmanager
def first(opened: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A context that the first process alone opens."""
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened()))
        yield


def _agree(own: Exception | None) -> None:
    """Tell each other what went wrong; raises what went wrong elsewhere, if nothing did here."""
    if not are_several() or (own is not None and _TOLD in vars(own)):
        return
    told: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, None if own is None else _in_words(own), group=_group())
    except RuntimeError as error:  # a process is gone
        if own is None:
            raise LayersmithError("another process of this run ended; what it printed says why.") from error
        return
    if own is not None:
        vars(own)[_TOLD] = True
        return
    failed = next((failure for failure in told if failure is not None), None)
    if failed is not None:
        relayed = _raised(*failed)
        vars(relayed)[_TOLD] = True
        raise relayed


def _in_words(error: Exception) -> tuple[str, str]:
    """Its class, if that is one of ours, and what it says."""
    if isinstance(error, LayersmithError):
        name = type(error).__name__
        return (name if hasattr(errors, name) else LayersmithError.__name__), str(error)
    return "", f"{type(error).__name__}: {first_line(error)}"


def _raised(name: str, text: str) -> Exception:
    return getattr(errors, name)(text) if name else RuntimeError(f"another process of this run failed: {text}")
