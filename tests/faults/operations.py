"""Every operation of a command that changes files, counted in one place, and what is on the disk before each.

A command runs in a process of its own, forked from one that has imported everything. There an audit hook of Python
sees each file that is opened for writing, renamed, linked, removed or changed in mode, and each folder that is made or
removed; syncs and the lines of journals and logs, of which half is written first, are counted by wrapping them. Before
an operation the process can be killed, or the folder copied: the copy is what ``kill -9`` would leave there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The place of the path among the arguments of each audit event.
_EVENTS = {
    "os.rename": 1, "os.link": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.chmod": 0, "os.truncate": 0,
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["layersmith.cli", "layersmith.pipeline", "layersmith.stages.reopen", "tests.conftest"])


@dataclass(frozen=True)
class Fault:
    """What happens at the operations below a folder.

    Attributes:
        root: The folder.
        kill_at: Number of the operation before which the process is killed, from 1; None for none.
        copies: Folder that gets a copy of ``root`` for each operation, by its number; None for none.
        fail_at: Number of the operation from which on the disk is full; None for none.
        signal_at: Number of the operation at which a signal arrives, and the signal; None for none.
        memory_at: Number of the operation at which no memory is left; None for none.
    """

    root: Path
    kill_at: int | None = None
    copies: Path | None = None
    fail_at: int | None = None
    signal_at: tuple[int, int] | None = None
    memory_at: int | None = None


def run(arguments: list[str], said: Path, fault: Fault | None = None) -> int | None:
    """Run a command in a forked process; returns its exit code, or minus the signal that ended it.

    Args:
        arguments: The command line.
        said: File that gets standard output and error.
        fault: What happens to it.
    """
    process = forks.Process(target=command, args=(arguments, said, fault))
    process.start()
    process.join()
    return process.exitcode


def command(arguments: list[str], said: Path, fault: Fault | None) -> None:
    """Run a command in this process; ``said`` gets what it prints."""
    from layersmith import cli

    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["layersmith", *arguments]
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    if fault is not None:
        _watch(fault)
    cli.main()


def _watch(fault: Fault) -> None:
    """Count operations from now on."""
    from layersmith.run import artifacts, journal, log

    count = _counter(fault)
    root = str(fault.root)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & _WRITES):
                return
        elif event in _EVENTS:
            path = args[_EVENTS[event]]
        else:
            return
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(root):
            count(event)

    sys.addaudithook(hook)
    fsync, opened = os.fsync, artifacts.open_without_links

    def counted_fsync(handle: int) -> None:
        count("fsync")
        fsync(handle)

    def torn(path: Path, mode: str) -> Any:
        return _Torn(opened(path, mode), count)

    os.fsync = counted_fsync
    journal.open_without_links = log.open_without_links = torn  # type: ignore[attr-defined]


def _counter(fault: Fault) -> Callable[[str], None]:
    number, busy = 0, False

    def count(event: str) -> None:
        nonlocal number, busy
        if busy:
            return
        number += 1
        busy = True
        try:
            if fault.copies is not None:
                with contextlib.suppress(shutil.Error):
                    shutil.copytree(fault.root, fault.copies / f"{number:05d}", symlinks=True)
            if fault.kill_at == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.signal_at is not None and fault.signal_at[0] == number:
                os.kill(os.getpid(), fault.signal_at[1])
            if fault.memory_at == number:
                torch.empty(2**60, dtype=torch.uint8)
            if fault.fail_at is not None and number >= fault.fail_at and event in ("open", "fsync", "os.mkdir"):
                raise OSError(28, "No space left on device")
        finally:
            busy = False

    return count


class _Torn:
    """A file to which half of each piece is written before the operation is counted, and the rest after it."""

    def __init__(self, file: Any, count: Callable[[str], None]):
        self._file, self._count = file, count

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._count("append")
        self._file.write(data[len(data) // 2 :])
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
