"""Results that runs share: a folder next to the runs with one folder for each finished stage, named by its inputs.

Files are hard links, so they take no room twice; where links are impossible they are copies. Each entry has a record of
sizes and digests next to it, which is checked when it is taken. Nothing in a run refers to the store, so it can be
removed at any time: later runs then do their own work.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from typing_extensions import TypedDict

from layersmith.errors import InputError, LayersmithError
from layersmith.run.artifacts import fingerprint, read_json, whole_folder, write_json
from layersmith.run.digests import Record, difference

logger = logging.getLogger(__name__)


class Store:
    """Finished stages by name and digest of their inputs.

    Attributes:
        folder: Where they are; None for no store.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    @staticmethod
    def near(run: Path) -> Store:
        """The store for a run: ``$LAYERSMITH_STORE``, or ``.store`` next to the run; ``off`` for none."""
        named = os.environ.get("LAYERSMITH_STORE")
        if named == "off":
            return Store(None)
        return Store(Path(named) if named else run.absolute().parent / ".store")

    def take(self, stage: str, inputs: str, folder: Path) -> Record | None:
        """Put a stage's files into a run's folder; returns their record, or None if the store does not have them.

        A link in another run may have been written through, so all files are hashed; a damaged entry is removed.
        """
        place = self._place(stage, inputs)
        if place is None or not place.is_dir():
            return None
        files = _read_record(place)
        names = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
        if files is None or names != set(files) or difference(place, files, whole=True) is not None:
            logger.info("%s: differs from what was written and is removed", place)
            shutil.rmtree(place, ignore_errors=True)
            return None
        with whole_folder(folder) as made:
            _link(place, made)
        return {f"{stage}/{name}": record for name, record in files.items()}

    def give(self, stage: str, inputs: str, folder: Path, files: Record) -> None:
        """Keep a finished stage. A store that cannot be written is only logged: the run has its files.

        Args:
            stage: Name of the stage.
            inputs: Digest of its inputs.
            folder: The stage's folder in a run.
            files: Sizes and digests of its files, by their paths in the run.
        """
        place = self._place(stage, inputs)
        if place is None:
            return
        inside = {name.removeprefix(f"{stage}/"): record for name, record in files.items()}
        try:
            write_json(_record_file(place), {"files": inside, "digest": fingerprint(inside)})
            with whole_folder(place) as made:
                _link(folder, made)
        except (OSError, LayersmithError) as error:
            logger.info("%s: not kept for other runs (%s)", place, error)

    def _place(self, stage: str, inputs: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage.replace('/', '-')}-{inputs}"


class _Entry(TypedDict):
    """The record of an entry."""

    files: Record
    digest: str


def _record_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def _read_record(place: Path) -> Record | None:
    """Sizes and digests of the files of an entry; None if they are missing or not those that were written."""
    try:
        stored = read_json(_record_file(place), _Entry)
    except InputError:
        return None
    files: Record = stored["files"]
    return files if stored["digest"] == fingerprint(files) else None


def _link(source: Path, target: Path) -> None:
    """Hard links to all files of a folder, in another; copies where the file system has no links."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)
