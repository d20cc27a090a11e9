"""The run folder: what a run has made so far, and what each piece was made from.

recipe.yaml       every setting, defaults included
run.json          parent, budget, versions, seed; the fingerprints of finished stages
costs/            times of all alternatives, where the budget limits any
data/             token rows and what they were made from
library/          alternatives, what their weights are made from, and what they have learned
scores/           metrics of every alternative on every row
settled/          times as whole children corrected them, and the solution that holds; where times are measured
frontier/         the best solution for every budget, and what others would do
refine/           what whole children lost on the scoring rows, and the solution that came of it
solution/         the solution, its budget and costs
pairs/            what the chosen alternatives have learned together
child/            the child, a Hugging Face folder
evaluation/       child against parent
clock/            what parent and child took of the clock; it differs between equal runs
distillation/     what the child learnt from, its curve, and what came of it; if it was distilled
distilled/        the child afterwards
report.html, report.json
log.jsonl         when stages began and ended; it and the times that the report takes from it differ between equal runs
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from layersmith.errors import InputError, UsageError
from layersmith.recipe import Recipe
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, saying_disk_full, whole_folder, write_json, write_text


def versions() -> dict[str, str]:
    """Versions of all that numbers depend on."""
    import safetensors
    import scipy
    import torch
    import transformers

    from layersmith import __version__

    return {
        "layersmith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scipy": scipy.__version__,
        "safetensors": safetensors.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }


# Temporary names that :mod:`layersmith.run.artifacts` gives to what it writes in a run folder.
_HALF_WRITTEN = re.compile(
    r"^\.(run\.json|recipe\.yaml|report\.json|report\.html|library\.partial"
    r"|costs|settled|data|library|scores|frontier|refine|solution|pairs|child|evaluation|clock|distilled|global|finalists|log\.json)"
    r"\.(old\.)?\w+"
)


class Run:
    """A run folder that this process has to itself."""

    def __init__(self, folder: Path):
        self.folder = folder

    # ------------------------------------------------------------------------------------------ opening

    @staticmethod
    def check(folder: Path) -> None:
        """Raises: InputError: the folder holds something that is not a run."""
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file. Choose another folder for the run.")
        if not folder.is_dir() or (folder / "run.json").is_file():
            return
        # A process that was stopped before it wrote run.json leaves no more than these.
        if any(not path.name.startswith((".lock", ".run.json")) for path in folder.iterdir()):
            raise InputError(f"{folder}: already there and not a run of layersmith. Choose another folder.")

    @contextmanager
    def open(self, header: dict[str, Any], recipe: Recipe) -> Iterator[None]:
        """Create the folder, or go on with it if it was made from the same header and recipe.

        Raises:
            InputError: another process works in it, or it was made from something else.
        """
        self.check(self.folder)
        with saying_disk_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._remove_leftovers()
            self._check_header(header)
            if not (self.folder / "run.json").is_file():
                write_json(self.folder / "run.json", header | {"stages": {}})
            write_text(self.folder / "recipe.yaml", recipe.to_yaml())
            yield

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have a run that is there to oneself.

        Raises:
            InputError: another process works in it.
        """
        with self._locked():
            self._remove_leftovers()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with saying_disk_full(self.folder):
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - closed by the next line's with
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.folder}: another process is at work in this run. Wait for it.") from error
            yield

    def _remove_leftovers(self) -> None:
        """Remove what a killed process was writing, and nothing else that begins with a dot."""
        places = (".*", "distillation/.*", "distillation/global/.*")
        for leftover in [path for place in places for path in self.folder.glob(place)]:
            if _HALF_WRITTEN.match(leftover.name):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _check_header(self, header: dict[str, Any]) -> None:
        if not (self.folder / "run.json").is_file():
            return
        before = self.header()
        for name, field, mend in (  # contents count, not where they lie
            ("parent", "identity", "Choose another folder"),
            ("data", "sha256", "Choose another folder"),
            ("recipe", None, "Choose another folder, or restore the recipe"),
            ("budget", None, "Choose another folder, or ask this run for another budget with `layersmith search`"),
            ("versions", None, "Choose another folder, or run with the versions that run.json names"),
        ):
            old, new = before.get(name), header.get(name)
            if field is not None and old and new:
                old, new = old[field], new[field]
            if old != new:
                raise InputError(f"{self.folder}: holds a run with another {name}. {mend}.")

    def header(self) -> dict[str, Any]:
        return read_json(self.folder / "run.json")

    def meant(self, path: str) -> str:
        """A local path as the command that made the run meant it, wherever one is now; anything else as it is."""
        there = Path(self.header().get("working_directory", ""), path)
        return str(there) if there.exists() else path

    @staticmethod
    def existing(folder: str | Path) -> Run:
        """Raises: UsageError: not a run folder."""
        run = Run(Path(folder))
        if not (run.folder / "run.json").is_file():
            raise UsageError(f"{folder}: not a run folder (no run.json). Give the folder that `compress` wrote.")
        return run

    # ------------------------------------------------------------------------------------------ stages

    def is_done(self, stage: str, inputs: str) -> bool:
        return self.header()["stages"].get(stage) == inputs

    def do(
        self,
        stage: str,
        inputs: str,
        make: Callable[[Path], None],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> bool:
        """Make a stage's folder unless it was made from the same inputs; whether it had to be made.

        Of several processes all call this, and the first alone writes.

        Args:
            stage: its name and folder.
            inputs: digest of everything the stage depends on.
            make: writes the stage's files into the folder that it is given.
            meanwhile: the other processes' part of the work; default: they wait.
        """
        is_needed = ranks.from_first(lambda: not (self.is_done(stage, inputs) and (self.folder / stage).is_dir()))
        if is_needed:
            ranks.on_first(lambda: self._make(stage, inputs, make), meanwhile)
        if ranks.is_first():
            if is_needed:  # no other process reads there any more
                shutil.rmtree(self.work(stage), ignore_errors=True)
            else:
                self.log(stage, "kept")
        return is_needed

    def _make(self, stage: str, inputs: str, make: Callable[[Path], None]) -> None:
        self._log_cut_off(stage)
        started = time.monotonic()
        self.log(stage, "begun")
        try:
            with whole_folder(self.folder / stage) as folder:
                make(folder)
        except BaseException:
            with suppress(InputError):  # a full disk has been told of already
                self.log(stage, "stopped", seconds=round(time.monotonic() - started, 2))
            raise
        header = self.header()
        header["stages"][stage] = inputs
        write_json(self.folder / "run.json", header)
        self.partial(stage).unlink(missing_ok=True)
        self.log(stage, "done", seconds=round(time.monotonic() - started, 2))

    def partial(self, stage: str) -> Path:
        """A file for what a stage has done so far."""
        return self.folder / f"{stage}.partial"

    def work(self, stage: str) -> Path:
        """A folder for the same."""
        return self.folder / f"{stage}.work"

    # ------------------------------------------------------------------------------------------ times

    def times(self) -> list[dict[str, Any]]:
        """Wall time of each stage in the order in which they began: all attempts together, and how many were cut off.

        Of an attempt that was killed, what it took is known only up to the last result that it kept.
        """
        stages: dict[str, dict[str, Any]] = {}
        for record in self._records():
            if "seconds" in record:
                stage = stages.setdefault(
                    record["stage"], {"stage": record["stage"], "seconds": 0.0, "interruptions": 0}
                )
                stage["seconds"] = round(stage["seconds"] + record["seconds"], 2)
                stage["interruptions"] += record["event"] != "done"
        return list(stages.values())

    def log_once(self, stage: str, seconds: float) -> None:
        """Note the time of something that every start of the run does, when it is done first."""
        if not any(record["stage"] == stage for record in self._records()):
            self.log(stage, "done", seconds=round(seconds, 2))

    def _log_cut_off(self, stage: str) -> None:
        """If a process was killed in this stage, note how long it is known to have been at work."""
        last = next((r for r in reversed(self._records()) if r["stage"] == stage), None)
        if last is not None and last["event"] == "begun":
            began = datetime.fromisoformat(last["time"]).timestamp()
            partial = self.partial(stage)
            worked = max(0.0, partial.stat().st_mtime - began) if partial.is_file() else 0.0
            self.log(stage, "killed", seconds=round(worked, 2))

    def _records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):  # a line that was cut off
                records.append(json.loads(line))
        return records

    def log(self, stage: str, event: str, **more: Any) -> None:
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": stage, "event": event, **more}
        with saying_disk_full(self.folder), open(self.folder / "log.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed in the middle of a line
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
