"""Results that runs share: a folder next to the runs with one folder for each finished stage, named by its inputs.

Files are hard links, so they take no room twice; where links are impossible they are copies. Nothing in a run refers to
the store, so it can be removed at any time: later runs then do their own work.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from layersmith.errors import LayersmithError
from layersmith.run.artifacts import whole_folder

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

    def take(self, stage: str, inputs: str, folder: Path) -> bool:
        """Put a stage's files into a run's folder; returns whether the store has them."""
        place = self._place(stage, inputs)
        if place is None or not place.is_dir():
            return False
        with whole_folder(folder) as made:
            _link(place, made)
        return True

    def give(self, stage: str, inputs: str, folder: Path) -> None:
        """Keep a finished stage. A store that cannot be written is only logged: the run has its files."""
        place = self._place(stage, inputs)
        if place is None or place.is_dir():
            return
        try:
            with whole_folder(place) as made:
                _link(folder, made)
        except (OSError, LayersmithError) as error:
            logger.info("%s: not kept for other runs (%s)", place, error)

    def _place(self, stage: str, inputs: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage.replace('/', '-')}-{inputs}"


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
