"""Results of unfinished work, kept so that an interrupted run resumes. Results of other inputs are never used.

A :class:`Journal` appends small results to a file as they come. A :class:`Checkpoint` replaces one file of tensors now
and then. A :func:`work_folder` holds whole files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.records import check
from layersmith.run import ranks
from layersmith.run.artifacts import (
    open_without_links,
    read_tensors,
    remove,
    saying_disk_full,
    write_tensors,
)
from layersmith.run.digests import read_sealed, write_sealed
from layersmith.run.progress import SILENT, Progress
from layersmith.untrusted import parse_json

_SYNC_EVERY_SECONDS = 5.0

Values = dict[str, float]


class _Start(TypedDict):
    """The first line of a journal."""

    inputs: str


class _Entry(TypedDict):
    """Any other line."""

    of: str
    row: int
    values: Values


class Journal:
    """Results by what they are of and by row, appended to a file as they come; in memory only without a path.

    Each line ends with a checksum. A file of other inputs is started anew; a line that was cut off or that differs from
    what was written, and what follows it, counts as not written.

    Args:
        path: The file; None for no file.
        inputs: Digest of everything that results depend on.

    Attributes:
        known: Results by what they are of and by row.
    """

    def __init__(self, path: Path | None, inputs: str):
        self.path, self.inputs = path, inputs
        self.known: dict[tuple[str, int], Values] = {}
        self._new: list[tuple[str, int]] = []
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        if self.path is not None:
            size = self._read(self.path)
            with saying_disk_full(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_without_links(self.path, "ab")
                self._file.truncate(size)
                if not size:
                    self._append({"inputs": self.inputs})
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, of: str, rows: Iterable[int]) -> bool:
        return all((of, row) in self.known for row in rows)

    def write(self, of: str, rows: Sequence[int], results: Sequence[Values]) -> None:
        """Add results on rows; those that are known already stay."""
        for row, values in zip(rows, results, strict=True):
            if (of, row) not in self.known:  # a batch may have been cut off in its middle
                self.known[of, row] = values
                self._new.append((of, row))
                self._append({"of": of, "row": row, "values": values})

    def share(self) -> None:
        """Give all processes what the first one has read."""
        self.known = ranks.from_first(lambda: self.known)

    def from_each(self, work: Callable[[], object]) -> None:
        """Call ``work``, which writes results, in every process; afterwards all know the results of all.

        The first process alone has a file. So results of the others are kept when all have finished.
        """

        def found() -> dict[tuple[str, int], Values]:
            self._new.clear()
            work()
            return {key: self.known[key] for key in self._new}

        for of_process in ranks.from_each(found):
            for (of, row), values in of_process.items():
                self.write(of, [row], [values])

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            with saying_disk_full(self.path):
                self._file.write(_line(json.dumps(record).encode()))
                self._file.flush()
                if time.monotonic() - self._synced > _SYNC_EVERY_SECONDS:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()

    def _read(self, path: Path) -> int:
        """Read what a file holds for these inputs; returns its length in bytes up to the last whole line."""
        size = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else ()):
            try:
                text = line[:-1].rpartition(b" ")[0]
                record: Any = check(parse_json(text), _Entry if number else _Start, path)
            except (ValueError, InputError):
                break
            if line != _line(text) or (number == 0 and record["inputs"] != self.inputs):
                break
            size += len(line)
            if number:
                self.known[record["of"], record["row"]] = record["values"]
        return size


def _line(text: bytes) -> bytes:
    return b"%b %08x\n" % (text, zlib.crc32(text))


@dataclass(frozen=True)
class Recording:
    """Where a long computation keeps its results as they come, and where it shows its progress.

    Attributes:
        path: File of the journal; None for no file.
        inputs: Digest of everything that results depend on; a journal of other inputs is started anew.
        progress: Receives steps and notes.
        is_kept: Whether this process keeps results; of several that work together, the first does.
    """

    path: Path | None = None
    inputs: str = ""
    progress: Progress = SILENT
    is_kept: bool = True

    def journal(self) -> Journal:
        return Journal(self.path if self.is_kept else None, self.inputs)

    @property
    def folder(self) -> Path:
        """Folder for temporary files."""
        return Path(tempfile.gettempdir()) if self.path is None else self.path.parent


class Checkpoint:
    """Tensors and JSON data of unfinished work, in one file that is replaced now and then; nothing without a path.

    Args:
        path: The file; None for no file.
        inputs: Digest of everything that the tensors depend on.
        every_seconds: Time between two writes, at least.
    """

    def __init__(self, path: Path | None, inputs: str, every_seconds: float):
        self.path, self.inputs, self.every_seconds = path, inputs, every_seconds
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        return self.path is not None and time.monotonic() - self._saved > self.every_seconds

    def save(self, tensors: dict[str, torch.Tensor], state: Any) -> None:
        if self.path is not None:
            text = json.dumps({"inputs": self.inputs, "state": state})
            write_tensors(self.path, tensors, {"state": text, "digest": _digest_of(tensors, text)})
            self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """What was saved last; None if there is nothing for these inputs, or it differs from what was written."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            tensors = read_tensors(self.path)
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            text = metadata.get("state", "{}")
            record = check(parse_json(text), dict[str, Any], self.path)
        except (InputError, ValueError):
            return None
        is_intact = metadata.get("digest") == _digest_of(tensors, text)
        return (tensors, record.get("state")) if is_intact and record.get("inputs") == self.inputs else None


def _digest_of(tensors: dict[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def work_folder(folder: Path, inputs: str) -> Path:
    """A folder for files of unfinished work; files of other inputs are removed. One process calls this."""
    file = folder / "inputs.json"
    if read_sealed(file, str) != inputs:
        remove(folder)
        write_sealed(file, inputs)
    return folder


def shared_work_folder(folder: Path, inputs: str) -> Path:
    """:func:`work_folder` of all processes, which all call this."""
    ranks.on_first(lambda: work_folder(folder, inputs))
    return folder
