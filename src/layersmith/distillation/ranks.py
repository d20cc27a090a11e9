"""Processes that a launcher such as ``torchrun`` started: what all do, and what the first one does for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch.distributed as dist

from layersmith.runtime import Runtime

# The first process may evaluate or read data for long, while the others wait for it.
_PATIENCE = timedelta(hours=24)


def start(runtime: Runtime) -> None:
    """Let the processes know each other; nothing where there is one."""
    if runtime.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if runtime.device.type == "cuda" else "gloo", timeout=_PATIENCE)


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def on_first(work: Callable[[], object]) -> None:
    """Let the first process work; the others wait for it."""
    if is_first():
        work()
    wait()


@contextmanager
def first(opened: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A context that the first process alone opens."""
    if is_first():
        with opened():
            wait()
            yield
    else:
        wait()
        yield
