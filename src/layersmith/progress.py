"""How a long step tells where it is. Stages report to this; only the command line draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent; :mod:`layersmith.cli` has the one that draws."""

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        """A stage of ``total`` steps; call what it yields with the number of steps just done."""
        yield lambda steps: None

    def note(self, text: str) -> None:
        """A line worth keeping on the screen."""


SILENT = Progress()
