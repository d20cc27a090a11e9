"""The log of a run: when stages began and ended, and how long all attempts at each took."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import NonNegativeFloat
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.records import check
from layersmith.run.artifacts import open_without_links, saying_disk_full
from layersmith.run.digests import Record
from layersmith.untrusted import parse_json


class LogRecord(TypedDict):
    """A line of the log, as far as it is read."""

    stage: str
    event: str
    time: str
    seconds: NotRequired[NonNegativeFloat]
    inputs: NotRequired[str]
    files: NotRequired[Record]


class Log:
    """``log.jsonl`` in a run's folder."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def add(self, stage: str, event: str, **more: Any) -> None:
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": stage, "event": event, **more}
        with saying_disk_full(self.path), open_without_links(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed in the middle of a line
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def add_killed(self, stage: str, unfinished: Path) -> None:
        """If a process was killed in this stage, log the attempt.

        Args:
            stage: Name of the stage.
            unfinished: File that the stage kept results in. Its last change is the last sign of that process.
        """
        last = next((r for r in reversed(self._records()) if r["stage"] == stage), None)
        if last is not None and last["event"] == "begun":
            began = datetime.fromisoformat(last["time"]).timestamp()
            worked = max(0.0, unfinished.stat().st_mtime - began) if unfinished.is_file() else 0.0
            self.add(stage, "killed", seconds=round(worked, 2))

    def times(self) -> list[dict[str, Any]]:
        """Wall time of each stage in the order in which they began: all attempts together, and the interruptions.

        The time of an attempt that was killed is known only up to the last result that it kept.
        """
        stages: dict[str, dict[str, Any]] = {}
        for record in self._records():
            if "seconds" in record:
                name = record["stage"]
                stage = stages.setdefault(name, {"stage": name, "seconds": 0.0, "interruptions": 0})
                stage["seconds"] = round(stage["seconds"] + record["seconds"], 2)
                stage["interruptions"] += record["event"] != "done"
        return list(stages.values())

    def worked(self) -> dict[str, float]:
        """Wall time of each finished stage that was not taken from another run, all attempts together."""
        shared = {record["stage"] for record in self._records() if record.get("shared")}
        return {t["stage"]: t["seconds"] for t in self.times() if t["stage"] not in shared}

    def made(self) -> dict[str, dict[str, Any]]:
        """Of the stages whose bytes differ between equal runs: the digest of their inputs, and their files."""
        return {r["stage"]: {name: r[name] for name in ("inputs", "files")} for r in self._records() if "inputs" in r}

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            with suppress(ValueError, InputError):  # a line that was cut off
                records.append(cast(dict[str, Any], check(parse_json(line), LogRecord, self.path)))
        return records
