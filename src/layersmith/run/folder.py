"""The run folder: what a run has made so far, and what each piece was made from.

Each stage has a folder by its name; :data:`layersmith.stages.HOLDS` says what they hold. Besides:

recipe.yaml       every setting, defaults included
run.json          format, parent, budget, versions, seed; of each finished stage the digest of its inputs and the sizes
                  and digests of its files; digests of the model cards that layersmith wrote; a digest of all this
distillation/     curve of global distillation; while it trains, checkpoints
rounds/           runs of the rounds before the last, by their numbers, if the recipe asks for several
report.html, report.json
log.jsonl         when stages began and ended, and what those wrote whose files hold times; it and these files differ
                  between equal runs
STAGE.partial, STAGE.work      results of an unfinished stage
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from layersmith.errors import InputError, LayersmithError, UsageError
from layersmith.recipe import Recipe
from layersmith.run import ranks
from layersmith.run.artifacts import (
    TEMPORARY,
    fingerprint,
    remove,
    remove_leftovers,
    saying_disk_full,
    whole_folder,
    write_text,
)
from layersmith.run.cards import CARD, is_edited, only_current
from layersmith.run.digests import Record, difference, record_of
from layersmith.run.header import FORMAT, HEADER, read_header, refuse_another, versions, write_header
from layersmith.run.log import Log
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, StageProgress
from layersmith.run.store import Store

# Their files hold times, so they differ between equal runs. They are recorded in the log, so that run.json is equal.
MEASURED = ("clock", "report")

# Holds the runs of earlier rounds.
ROUNDS = "rounds"

# Holds parents with smaller hidden sizes, and their runs up to the search.
HIDDEN_SIZES = "hidden-sizes"

# What `search --frontier` wrote last; the run's frontier is not touched.
ASKED_FRONTIER = "asked-frontier"


class RunFolder:
    """A run folder: what it was made from, and its lock. Only one process of a machine works in it at a time.

    Args:
        folder: The folder.
        store: Results of other runs; default: none.
        verify: Whether also large files whose size and time of change are as before are hashed.
    """

    def __init__(self, folder: Path, store: Store | None = None, verify: bool = False):
        self.folder, self.log, self.verify = folder, Log(folder), verify
        self.store = Store(None) if store is None else store

    @staticmethod
    def check(folder: Path) -> None:
        """Raises: InputError: The folder holds something that is not a run, or a run of another format."""
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file. Choose another folder for the run.")
        if folder.is_symlink() and not folder.is_dir():
            raise InputError(f"{folder}: a link that leads nowhere. Choose another folder for the run.")
        if not folder.is_dir():
            return
        if (folder / HEADER).is_file():
            RunFolder(folder).header()
        # A process that was stopped before it wrote run.json leaves no more than these.
        elif any(not path.name.startswith((".lock", TEMPORARY, ROUNDS, HIDDEN_SIZES)) for path in folder.iterdir()):
            raise InputError(f"{folder}: already there and not a run of layersmith. Choose another folder.")

    @classmethod
    def existing(cls, folder: str | Path, verify: bool = False) -> Self:
        """Raises: UsageError: Not a run folder."""
        run = cls(Path(folder), verify=verify)
        if not (run.folder / HEADER).is_file():
            raise UsageError(
                f"{folder}: not a run folder (no {HEADER}). Give one that `compress` wrote, or run compress with "
                "another folder."
            )
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
                refuse_another(self.folder, header)
            else:
                write_header(self.folder, {"format": FORMAT, **header, "stages": {}, "cards": {}})
            write_text(self.folder / "recipe.yaml", recipe.to_yaml())
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, and remove what a killed process was writing.

        Raises:
            InputError: Another process works in it.
        """
        place = self.folder / ".lock"
        try:
            with saying_disk_full(place):
                lock = FileLock(place)
                lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.folder}: another process is at work in this run. Wait for it.") from error
        try:
            remove_leftovers(self.folder, deeply=True)
            if self.store.folder is not None:
                remove_leftovers(self.store.folder)
            yield
        finally:
            lock.release()

    @staticmethod
    @contextmanager
    def locked_around(path: Path) -> Iterator[None]:
        """Lock the run that a file is written into, if it is in one."""
        run = next((folder for folder in path.absolute().parents if (folder / HEADER).is_file()), None)
        with nullcontext() if run is None else RunFolder(run).locked():
            yield

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """A new run whose request turns out to be impossible leaves no folder behind, but for earlier rounds."""
        is_new = not self.header()["stages"] and not (self.folder / ROUNDS).is_dir()
        try:
            yield
        except LayersmithError:
            if is_new and ranks.is_first():
                shutil.rmtree(self.folder, ignore_errors=True)
                if self.folder.parent.name in (ROUNDS, HIDDEN_SIZES):
                    with suppress(OSError):  # others are there
                        self.folder.parent.rmdir()
                        self.folder.parent.parent.rmdir()
            raise

    def header(self) -> dict[str, Any]:
        """``run.json``; see :func:`layersmith.run.header.read_header`."""
        return read_header(self.folder)

    def path_as_meant(self, path: str) -> str:
        """A local path, relative to where the command that made the run was called; anything else unchanged."""
        there = Path(self.header().get("working_directory", ""), path)
        parts = Path(path).parts
        for place in (place for place, name in enumerate(parts) if name in (ROUNDS, HIDDEN_SIZES)):
            if (inside := self.folder.joinpath(*parts[place:])).exists():  # moved with the run
                return str(inside)
        return str(there) if there.exists() else path

    def change_recipe(self, recipe: Recipe) -> None:
        """Keep settings that were chosen while the run was under way."""
        write_header(self.folder, self.header() | {"recipe": recipe.to_dict()})
        write_text(self.folder / "recipe.yaml", recipe.to_yaml())


class Run(RunFolder):
    """A run folder and the stages in it.

    Args:
        folder: The folder.
        store: Results of other runs; default: none.
        verify: Whether also large files whose size and time of change are as before are hashed.
    """

    def __init__(self, folder: Path, store: Store | None = None, verify: bool = False):
        super().__init__(folder, store, verify)
        self._intact: set[str] = set()

    def made(self) -> dict[str, dict[str, Any]]:
        """Of every finished stage the digest of its inputs, and the sizes and digests of its files."""
        return self.header()["stages"] | self.log.made()

    def made_from(self, stage: str) -> str | None:
        """Digest of the inputs and files of a finished stage; None if it is not finished."""
        made = self.made().get(stage)
        return None if made is None else fingerprint(made)

    def require(self, *stages: str) -> None:
        """Raises: InputError: One of these stages is not finished, or a file of it is damaged or missing."""
        made = self.made()
        for stage in stages:
            if stage in self._intact:
                continue
            if stage not in made:
                raise InputError(f"{self.folder}: its {stage} is not finished. Run the same compress command again.")
            if damage := self.damage(stage):
                again = "search --frontier" if stage == ASKED_FRONTIER else "compress"
                again = "distill" if stage.startswith("distill") else again
                raise InputError(
                    f"{self.folder}: {damage}. Run the same {again} command again, which makes {stage} again."
                )

    def damage(self, stage: str) -> str | None:
        """What is wrong with the files of a finished stage, in words; None if they are as they were written."""
        record = self.made()[stage]["files"]
        if not record and not (self.folder / stage).is_dir():
            return f"{stage} is missing"
        found = difference(self.folder, record, whole=self.verify)
        if found is None:
            self._intact.add(stage)
        return found

    def finished(self, stage: str, inputs: str, files: Record, **more: Any) -> None:
        """Note that a stage is complete: in the header, or in the log if its bytes differ between equal runs."""
        record = {"inputs": inputs, "files": files}
        if stage in MEASURED:
            more |= record
        else:
            header = self.header()
            header["stages"][stage] = record
            only_current(self.folder, stage, header["cards"])
            write_header(self.folder, header)
        self.log.add(stage, "done", **more)
        self._intact.add(stage)

    def record_of(self, stage: str, elsewhere: Sequence[Path] = ()) -> Record:
        """Sizes and digests of a stage's files but the model card, and of its files elsewhere in the run."""
        folder = self.folder / stage
        files = [file for file in folder.rglob("*") if file.is_file() and file != folder / CARD]
        return record_of(self.folder, [*files, *elsewhere])

    # ------------------------------------------------------------------------------------------ work

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
        """Make a stage's folder unless it was made from the same inputs and its files are intact.

        All processes of a launcher call this, and the first alone writes. Returns whether the stage had to be made.

        Args:
            stage: Name of the stage and of its folder.
            inputs: JSON data that the result depends on.
            make: Writes the files.
            meanwhile: Part of the work for the other processes; default: they wait.
            is_shared: Whether the result is taken from the store and given to it.
            progress: Receives steps and notes.
        """
        ranks.doing(stage)
        digest = fingerprint(inputs)
        folder = self.folder / stage
        making = Making(
            folder=folder,
            inputs=digest,
            unfinished=self.partial(stage),
            scratch=self.folder / f"{stage}.work",
            progress=StageProgress(progress or Progress(), stage),
        )
        is_done = ranks.from_first(lambda: self._is_done(making, stage))
        if is_done:
            ranks.on_first(lambda: self.log.add(stage, "kept"))
        else:
            key = fingerprint([digest, versions()])
            if not (is_shared and ranks.from_first(lambda: self._take(stage, digest, key))):
                ranks.on_first(lambda: self._make(making, stage, make), lambda: meanwhile and meanwhile(making))
                if is_shared:
                    ranks.on_first(lambda: self.store.give(stage, key, folder, self.made()[stage]["files"]))
        if ranks.is_first():
            self.remove_unfinished(stage)
        return not is_done

    def _is_done(self, making: Making, stage: str) -> bool:
        made = self.made().get(stage)
        if made is None:
            return False
        if made["inputs"] != making.inputs:
            making.progress.note(f"{stage} is made again: what it depends on has changed.")
            return False
        if damage := self.damage(stage):
            making.progress.note(f"{damage}; {stage} is made again.")
            return False
        return True

    def _take(self, stage: str, digest: str, key: str) -> bool:
        started = time.monotonic()
        files = self.store.take(stage, key, self.folder / stage)
        if files is None:
            return False
        self.finished(stage, digest, files, seconds=round(time.monotonic() - started, 2), shared=True)
        return True

    def _make(self, making: Making, stage: str, make: Callable[[Making], None]) -> None:
        self.log.add_killed(stage, making.unfinished)
        started = time.monotonic()
        self.log.add(stage, "begun")
        edited = is_edited(self.folder, stage)
        try:
            with whole_folder(making.folder) as folder:
                make(Making(**{**vars(making), "folder": folder}))
                if edited:
                    shutil.copyfile(making.folder / CARD, folder / CARD)
        except BaseException:
            with suppress(InputError):  # a full disk was reported already
                self.log.add(stage, "stopped", seconds=round(time.monotonic() - started, 2))
            raise
        files = self.record_of(stage, making.elsewhere)
        self.finished(stage, making.inputs, files, seconds=round(time.monotonic() - started, 2))

    def partial(self, stage: str) -> Path:
        """File for the results of an unfinished stage."""
        return self.folder / f"{stage}.partial"

    def remove_unfinished(self, stage: str) -> None:
        """Remove results of a stage that were kept while it was made."""
        remove(self.partial(stage))
        remove(self.folder / f"{stage}.work")

    def forget(self, stage: str) -> None:
        """Remove a stage that this run no longer has, with its record."""
        self.remove_unfinished(stage)
        header = self.header()
        if header["stages"].pop(stage, None) is not None:
            write_header(self.folder, header)
            remove(self.folder / stage)
