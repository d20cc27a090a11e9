"""Where a command writes: standard output has the result, for people or as JSON; standard error has everything else."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TextIO

from layersmith.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from layersmith.run.progress import Progress

# Version of what --json writes; see layersmith.outputs.
SCHEMA = 1


class JsonOutput:
    """The one JSON object of a command with ``--json``; nothing for other commands.

    While such a command runs, file descriptor 1 is standard error, so that nothing that other code prints gets between.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._command: str | None = None

    def open(self, command: str | None) -> None:
        """Keep standard output for the object; ``command`` is the name of the command."""
        sys.stdout.flush()
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._command = command
        os.dup2(2, 1)

    def close(self) -> None:
        """Give standard output back."""
        if self._file is not None:
            os.dup2(self._file.fileno(), 1)
            self._file.close()
            self._file = None

    def write_result(self, result: Callable[[], Any]) -> None:
        """Write an object of :data:`layersmith.outputs.RESULTS`."""
        from layersmith.outputs import to_json

        self._write("result", to_json(str(self._command), result()))

    def write_error(self, kind: str, message: str, exit_code: int) -> None:
        """Write an error in place of the result."""
        error = {"kind": kind, "message": printable(message), "exit_code": exit_code}
        self._write("error", json.dumps(error))

    def _write(self, key: str, value: str) -> None:
        if self._file is None or int(os.environ.get("RANK") or 0) > 0:  # the first of several processes writes
            return
        head = json.dumps({"schema": SCHEMA, "layersmith": version("layersmith"), "command": self._command})
        self._file.write(f"{head[:-1]}, {json.dumps(key)}: {value}}}\n")
        self._file.flush()


JSON = JsonOutput()


def wants_json() -> bool:
    """Whether errors are written as JSON; also when the arguments are wrong, so they are not parsed."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


@dataclass(frozen=True)
class Screen:
    """Where a command writes.

    Attributes:
        results: Standard output.
        progress: Progress and notes, on standard error.
        as_json: Whether the result is written as JSON.
    """

    results: Console
    progress: Progress
    as_json: bool

    def line(self, text: str) -> None:
        """Print a line as it is, unwrapped, for people and scripts."""
        self.results.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, output: Callable[[], Any], draw: Callable[[], None]) -> None:
        """Write a command's result.

        Args:
            output: Makes what ``--json`` writes, an object of :data:`layersmith.outputs.RESULTS`.
            draw: Prints the result for people.
        """
        if self.as_json:
            JSON.write_result(output)
        else:
            draw()


def open_screen(verbose: int, quiet: bool, as_json: bool) -> Screen:
    from layersmith.run.progress import SILENT, open_console, progress_on

    level = logging.ERROR if quiet else {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("layersmith").setLevel(level)
    return Screen(open_console(), SILENT if quiet else progress_on(open_console(stderr=True)), as_json)
