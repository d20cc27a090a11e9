"""The run folder: what a run has made so far, and what each piece was made from.

Each stage has a folder by its name; :data:`layersmith.stages.HOLDS` says what they hold. Besides:

recipe.yaml       every setting, defaults included
run.json          format, parent, budget, versions, seed; the digests of the inputs of finished stages
distillation/     curve of global distillation; while it trains, checkpoints
report.html, report.json
cards.json        digests of the model cards that layersmith wrote; a card that someone edited is not overwritten
log.jsonl         when stages began and ended; it and the times that the report takes from it differ between equal runs
STAGE.partial, STAGE.work      results of an unfinished stage
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from layersmith.errors import InputError, LayersmithError, UsageError
from layersmith.recipe import Recipe
from layersmith.run import ranks
from layersmith.run.artifacts import (
    TEMPORARY,
    fingerprint,
    read_json,
    saying_disk_full,
    whole_folder,
    write_json,
    write_text,
)
from layersmith.run.log import Log
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, StageProgress
from layersmith.run.store import Store

# Of the folder's layout. A run of another format is refused.
FORMAT = 2
HEADER = "run.json"


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    packages = ("layersmith", "torch", "transformers", "scipy", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


class Run:
    """A run folder. Only one process of a machine works in it at a time."""

    def __init__(self, folder: Path, store: Store | None = None):
        self.folder, self.log = folder, Log(folder)
        self.store = Store(None) if store is None else store

    # ------------------------------------------------------------------------------------------ opening

    @staticmethod
    def check(folder: Path) -> None:
        """Raises: InputError: The folder holds something that is not a run, or a run of another format."""
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file. Choose another folder for the run.")
        if not folder.is_dir():
            return
        if (folder / HEADER).is_file():
            Run(folder).header()
        # A process that was stopped before it wrote run.json leaves no more than these.
        elif any(not path.name.startswith((".lock", TEMPORARY)) for path in folder.iterdir()):
            raise InputError(f"{folder}: already there and not a run of layersmith. Choose another folder.")

    @staticmethod
    def existing(folder: str | Path) -> Run:
        """Raises: UsageError: Not a run folder."""
        run = Run(Path(folder))
        if not (run.folder / HEADER).is_file():
            raise UsageError(f"{folder}: not a run folder (no {HEADER}). Give the folder that `compress` wrote.")
        return run

    @contextmanager
    def open(self, header: dict[str, Any], recipe: Recipe) -> Iterator[None]:
        """Create the folder, or open it again if it was made from the same header and recipe.

        Raises:
            InputError: Another process works in it, or it was made from something else.
        """
        self.check(self.folder)
        with saying_disk_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if (self.folder / HEADER).is_file():
                self._check_header(header)
            else:
                write_json(self.folder / HEADER, {"format": FORMAT, **header, "stages": {}})
            write_text(self.folder / "recipe.yaml", recipe.to_yaml())
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, and remove what a killed process was writing.

        Raises:
            InputError: Another process works in it.
        """
        with saying_disk_full(self.folder):
            lock = FileLock(self.folder / ".lock")
        try:
            with saying_disk_full(self.folder):
                lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.folder}: another process is at work in this run. Wait for it.") from error
        try:
            for leftover in list(self.folder.rglob(f"{TEMPORARY}*")):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """A new run whose request turns out to be impossible leaves no folder behind."""
        is_new = not self.header()["stages"]
        try:
            yield
        except LayersmithError:
            if is_new and ranks.is_first():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _check_header(self, header: dict[str, Any]) -> None:
        before = self.header()
        another = "Choose another folder"
        shares = "Choose another folder: next to this one it shares the work that both have in common"
        for name, field, mend in (  # contents count, not where they are
            ("parent", "identity", another),
            ("data", "digest", another),
            ("recipe", None, f"{shares}. Or restore the recipe"),
            ("budget", None, f"{shares}. Or ask this run for another budget with `layersmith search`"),
            ("versions", None, "Choose another folder, or run with the versions that run.json names"),
        ):
            old, new = before.get(name), header.get(name)
            if field is not None and old and new:
                old, new = old[field], new[field]
            if old != new:
                raise InputError(f"{self.folder}: holds a run with another {name}. {mend}.")

    def header(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            InputError: It is missing, damaged, or of another format.
        """
        header: dict[str, Any] = read_json(self.folder / HEADER)
        if header.get("format") != FORMAT:
            raise InputError(
                f"{self.folder}: made by another version of layersmith. Choose another folder, or use that version."
            )
        return header

    def path_as_meant(self, path: str) -> str:
        """A local path, relative to where the command that made the run was called; anything else unchanged."""
        there = Path(self.header().get("working_directory", ""), path)
        return str(there) if there.exists() else path

    # ------------------------------------------------------------------------------------------ stages

    def made_from(self, stage: str) -> str | None:
        """Digest of the inputs of a finished stage; None if it is not finished."""
        digest: str | None = self.header()["stages"].get(stage)
        return digest

    def require(self, *stages: str) -> None:
        """Raises: InputError: One of these stages is not finished."""
        for stage in stages:
            if self.made_from(stage) is None or not (self.folder / stage).is_dir():
                raise InputError(f"{self.folder}: its {stage} is not finished. Run the same compress command again.")

    def do(
        self,
        stage: str,
        inputs: Any,
        make: Callable[[Making], None],
        meanwhile: Callable[[Making], object] | None = None,
        *,
        is_shared: bool = False,
        progress: Progress | None = None,
    ) -> bool:
        """Make a stage's folder unless it was made from the same inputs. Returns whether it had to be made.

        All processes of a launcher call this, and the first alone writes.

        Args:
            stage: Name of the stage and of its folder.
            inputs: JSON data that the result depends on.
            make: Writes the files.
            meanwhile: Part of the work for the other processes; default: they wait.
            is_shared: Whether the result is taken from the store and given to it.
            progress: Receives steps and notes.
        """
        digest = fingerprint(inputs)
        folder = self.folder / stage
        making = Making(
            folder=folder,
            inputs=digest,
            unfinished=self.partial(stage),
            scratch=self.folder / f"{stage}.work",
            progress=StageProgress(progress or Progress(), stage),
        )
        is_done = ranks.from_first(lambda: self.made_from(stage) == digest and folder.is_dir())
        if is_done:
            ranks.on_first(lambda: self.log.add(stage, "kept"))
            return False
        key = fingerprint([digest, versions()])
        if not (is_shared and ranks.from_first(lambda: self._take(stage, digest, key))):
            ranks.on_first(lambda: self._make(making, stage, make), lambda: meanwhile and meanwhile(making))
            if is_shared:
                ranks.on_first(lambda: self.store.give(stage, key, folder))
        if ranks.is_first():
            shutil.rmtree(making.scratch, ignore_errors=True)
        return True

    def _take(self, stage: str, digest: str, key: str) -> bool:
        started = time.monotonic()
        is_there = self.store.take(stage, key, self.folder / stage)
        if is_there:
            self.finished(stage, digest)
            self.log.add(stage, "done", seconds=round(time.monotonic() - started, 2), shared=True)
        return is_there

    def _make(self, making: Making, stage: str, make: Callable[[Making], None]) -> None:
        self.log.add_killed(stage, making.unfinished)
        started = time.monotonic()
        self.log.add(stage, "begun")
        try:
            with whole_folder(making.folder) as folder:
                make(Making(**{**vars(making), "folder": folder}))
        except BaseException:
            with suppress(InputError):  # a full disk was reported already
                self.log.add(stage, "stopped", seconds=round(time.monotonic() - started, 2))
            raise
        self.finished(stage, making.inputs)
        making.unfinished.unlink(missing_ok=True)
        self.log.add(stage, "done", seconds=round(time.monotonic() - started, 2))

    def finished(self, stage: str, digest: str) -> None:
        """Note in the header that a stage is complete."""
        header = self.header()
        header["stages"][stage] = digest
        write_json(self.folder / HEADER, header)

    def partial(self, stage: str) -> Path:
        """File for the results of an unfinished stage."""
        return self.folder / f"{stage}.partial"
