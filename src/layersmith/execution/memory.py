"""The memory of the machine: how much is free, and giving back what is not used any more."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

# mallopt's name for the size from which memory is mapped piece by piece; smaller pieces stay with the process.
_M_MMAP_THRESHOLD = -3
_MAPPED_FROM_BYTES = 1024**2


def free_memory(device: torch.device) -> float:
    """Free bytes of a device; of the process' control group, if it has a lower limit.

    Where the system does not say what is free, as macOS, it is all the memory that the machine has.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    with suppress(OSError, ValueError, AttributeError):  # names that this system does not know
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        used = float((group / "memory.current").read_text()) - _file_pages(group / "memory.stat")
        free = min(free, float((group / "memory.max").read_text()) - used)
    return free


def _file_pages(statistics: Path) -> float:
    """Bytes of a control group that are pages of files, which the system can drop."""
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return float(fields.get("inactive_file", 0)) + float(fields.get("active_file", 0))


def give_back() -> None:
    """Return freed memory to the system, which GNU's C library otherwise keeps for later; elsewhere, do nothing."""
    if (library := _gnu_c_library()) is not None:
        library.malloc_trim(0)


@cache
def _gnu_c_library() -> Any:
    """GNU's C library, set to map large pieces of memory one by one; None on other systems."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    except (OSError, AttributeError):
        return None
    return library
