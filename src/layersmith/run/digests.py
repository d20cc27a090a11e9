"""Which files were written, by size and SHA-256, so that a file that is missing or differs is noticed.

A large file is hashed again only if its size or its time of change differs from when it was hashed last; the user's
cache remembers that. Small files, which decide things, are hashed whenever they are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from layersmith.errors import InputError
from layersmith.run import user_cache
from layersmith.run.artifacts import file_digest, fingerprint

# Hashing as much takes about a millisecond, which is less than reading what is remembered saves.
_SMALL_BYTES = 1024**2
_KIND = "digests"

# A file's path in its folder => its size and SHA-256.
Record = dict[str, dict[str, Any]]


def digest(file: Path, *, whole: bool = False) -> str:
    """SHA-256 of a file.

    Args:
        file: The file.
        whole: Read the file even if its size and time of change are those of when it was hashed last.

    Raises:
        InputError: It cannot be read.
    """
    try:
        stat = file.stat()
        if stat.st_size <= _SMALL_BYTES:
            return file_digest(file)
        key, now = fingerprint(str(file.resolve())), [stat.st_size, stat.st_mtime_ns]
        known = None if whole else user_cache.read(_KIND, key)
        if isinstance(known, list) and known[:2] == now:
            return str(known[2])
        found = file_digest(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    user_cache.write(_KIND, key, [*now, found])
    return found


def digests(files: Iterable[Path], *, whole: bool = False) -> list[str]:
    """:func:`digest` of several files, read at once where there are several processors."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda file: digest(file, whole=whole), files))


def record_of(root: Path, files: Iterable[Path]) -> Record:
    """Sizes and digests of files, by their paths below ``root``."""
    files = sorted(files)
    found = zip(files, digests(files), strict=True)
    return {
        file.relative_to(root).as_posix(): {"size": file.stat().st_size, "sha256": sha256} for file, sha256 in found
    }


def difference(root: Path, record: Mapping[str, Mapping[str, Any]], *, whole: bool = False) -> str | None:
    """The first file below ``root`` that is not as recorded, in words; None if all are."""
    names = sorted(record)
    for name in names:
        file = root / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != record[name]["size"]:
            return f"{name} differs from what was written"
    for name, found in zip(names, digests((root / name for name in names), whole=whole), strict=True):
        if found != record[name]["sha256"]:
            return f"{name} differs from what was written"
    return None
