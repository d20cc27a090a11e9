"""Which files were written, by size and SHA-256, so that a file that is missing or differs is noticed.

A large file is hashed again only if its size or its time of change differs from when it was hashed last; the user's
cache remembers that. Small files, which decide things, are hashed whenever they are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.records import check
from layersmith.run import user_cache
from layersmith.run.artifacts import file_digest, fingerprint, read_json, write_json
from layersmith.untrusted import inside

# Hashing as much takes about a millisecond, which is less than reading what is remembered saves.
_SMALL_BYTES = 1024**2

T = TypeVar("T")


class _Sealed(TypedDict):
    data: Any
    files: Record
    digest: str


class FileRecord(TypedDict):
    """Of one file."""

    size: int
    sha256: str


# A file's path in its folder => its size and SHA-256.
Record = dict[str, FileRecord]


def remembered(kind: str, file: Path, compute: Callable[[Path], T], *, whole: bool = False) -> T:
    """A value that depends on a file's contents alone, from the user's cache if size and time are those from then.

    Args:
        kind: Kind of the value, JSON data.
        file: The file.
        compute: Reads the file.
        whole: Read it in any case.

    Raises:
        InputError: It cannot be read.
    """
    try:
        stat = file.stat()
        if stat.st_size <= _SMALL_BYTES:
            return compute(file)
        key, now = fingerprint(str(file.resolve())), [stat.st_size, stat.st_mtime_ns]
        known = None if whole else user_cache.read(kind, key)
        if isinstance(known, list) and known[:2] == now:
            value: T = known[2]
            return value
        value = compute(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    user_cache.write(kind, key, [*now, value])
    return value


def digest(file: Path, *, whole: bool = False) -> str:
    """SHA-256 of a file, see :func:`remembered`."""
    return remembered("digests", file, file_digest, whole=whole)


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


def difference(root: Path, record: Record, *, whole: bool = False) -> str | None:
    """The first file below ``root`` that is not as recorded, in words; None if all are."""
    names = sorted(record)
    for name in names:
        file = inside(root, name, root)
        if not file.resolve().is_relative_to(root.resolve()):
            return f"{name} is a link that leads out of the folder"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != record[name]["size"]:
            return f"{name} differs from what was written"
    for name, found in zip(names, digests((root / name for name in names), whole=whole), strict=True):
        if found != record[name]["sha256"]:
            return f"{name} differs from what was written"
    return None


def content_digest(path: Path) -> str:
    """Digest of a file or of all files in a folder, wherever it is.

    Raises:
        InputError: It cannot be read.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = [path.suffix if file == path else file.relative_to(path).as_posix() for file in files]
    return fingerprint(list(zip(names, digests(files), strict=True)))


def write_sealed(file: Path, data: Any, files: Iterable[Path] = ()) -> None:
    """Write JSON data with digests of itself and of files below its folder, after these."""
    sealed = {"data": data, "files": record_of(file.parent, files)}
    write_json(file, sealed | {"digest": fingerprint(sealed)})


def read_sealed(file: Path, shape: Any, *, whole: bool = True) -> Any:
    """What :func:`write_sealed` wrote; None if it or one of the files is missing or differs.

    Args:
        file: The file.
        shape: Shape of the data, see :func:`layersmith.records.check`.
        whole: Read the files even if their sizes and times are those from when they were hashed last.
    """
    try:
        sealed = read_json(file, _Sealed)
        is_intact = sealed.pop("digest") == fingerprint(sealed)
        if not is_intact or difference(file.parent, sealed["files"], whole=whole) is not None:
            return None
        return check(sealed["data"], shape, file)
    except (InputError, OSError):
        return None
