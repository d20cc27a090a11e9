"""Files that are either whole or not there: written under another name, synced, renamed.

Temporary names begin with :data:`TEMPORARY`. The process that writes holds a lock on such a file or folder, so that
another one knows which were left by a killed process.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from layersmith.errors import InputError
from layersmith.records import check
from layersmith.untrusted import MAX_JSON_BYTES, parse_json, read_bytes

if TYPE_CHECKING:
    import torch

# How the names of files and folders begin while they are written; what a killed process left has such a name.
TEMPORARY = ".layersmith-"
# Files of a run are checked before they are read, so this is damage that came in between.
_MAKE_AGAIN = "Run the same compress command again, which makes what is damaged again."
# Permissions of new files and folders: the user's umask, which can only be read by setting it.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextmanager
def saying_disk_full(path: Path) -> Iterator[None]:
    """Report a full disk or a read-only folder in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: no space left on the disk. Free some and run the same command again.") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another folder.") from error
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{path}: is a link, which is not followed. Remove it and run the same command again."
            ) from error
        raise
    except Exception as error:  # safetensors reports a full disk as an exception of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise InputError(f"{path}: no space left on the disk. Free some and run the same command again.") from error
        raise


def refuse_existing(path: Path) -> None:
    """Raises: InputError: What is to be made is there already."""
    if path.exists():
        raise InputError(f"{path}: already there. Choose another folder.")


def check_writable(path: Path) -> None:
    """Try, before long work, whether a file can be written.

    Raises:
        InputError: It is a folder, or its folder cannot be written.
        OSError: Its name is too long, or part of the path is a file.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder. Give the name of a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with saying_disk_full(path), tempfile.NamedTemporaryFile(prefix=f"{TEMPORARY}{path.name}.", dir=folder):
        pass


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either as before or complete."""
    with saying_disk_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                _claim(handle)
                file.write(data)
                file.flush()
                os.fsync(handle)
                os.chmod(name, 0o666 & ~_UMASK)
                os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, shape: Any = Any, mend: str = _MAKE_AGAIN) -> Any:
    """JSON data of a shape; see :func:`layersmith.records.check`. ``mend`` is the advice if it is not JSON.

    Raises:
        InputError: It is missing, too long, not JSON, or of another shape.
    """
    try:
        data = parse_json(read_bytes(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). {mend}") from error
    return check(data, shape, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensors[name].contiguous() for name in sorted(tensors)}, metadata))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises: InputError: missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: missing.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}). {_MAKE_AGAIN}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears at ``path`` only when the block ends well; an old one there is replaced."""
    with saying_disk_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with temporary_folder(path.parent, path.name) as temporary:
            os.chmod(temporary, 0o777 & ~_UMASK)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file() and not file.is_symlink():
                    os.chmod(file, 0o666 & ~_UMASK)  # safetensors gives its files to their owner alone
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            if path.exists():
                with temporary_folder(path.parent, f"{path.name}.old") as old:
                    os.replace(path, old / path.name)
                    os.replace(temporary, path)
            else:
                os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- temporary names


@contextmanager
def temporary_folder(near: Path, name: str) -> Iterator[Path]:
    """A folder that is removed when the block ends; if the process is killed, the next one removes it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{name}.", dir=near))
    handle = os.open(folder, os.O_RDONLY)
    try:
        _claim(handle)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_leftovers(folder: Path, name: str = "", *, deeply: bool = False) -> None:
    """Remove what killed processes were writing. What a living process writes is locked by it and stays.

    Args:
        folder: Where to look.
        name: Only what was to become a file or folder of this name; default: everything.
        deeply: Whether to look in folders in the folder, too.
    """
    pattern = f"{TEMPORARY}{glob.escape(name)}{'.' if name else ''}*"
    for leftover in list((folder.rglob if deeply else folder.glob)(pattern)):
        with suppress(OSError):  # gone by now
            handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(leftover)
            finally:
                os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def open_without_links(path: Path, mode: str) -> IO[bytes]:
    """Open a file to write it in place, unless it is a link, which someone may have laid to another file."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _claim(handle: int) -> None:
    """Lock a temporary file or folder as long as this process has it open."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------------------------------------- digests


def plain(value: Any, without: Sequence[str] = ()) -> Any:
    """JSON data of a config: other values become strings, and the keys in ``without`` are left out at any depth."""
    if isinstance(value, dict):
        return {str(k): plain(v, without) for k, v in value.items() if k not in without}
    if isinstance(value, list | tuple):
        return [plain(v, without) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def fingerprint(data: Any) -> str:
    """A digest of JSON data; equal data give equal digests everywhere."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
