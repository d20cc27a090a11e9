"""The times of a run's stages, also where it was interrupted."""

import json
import os
import time
from pathlib import Path

import pytest

from layersmith.recipe import Recipe
from layersmith.run.folder import Run

HEADER = {"parent": {"identity": "x"}, "data": {"sha256": "y"}, "budget": {}, "recipe": {}, "versions": {}}


def seconds(run: Run) -> dict[str, float]:
    return {t["stage"]: t["seconds"] for t in run.times()}


def test_times_are_of_all_attempts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    attempts: list[float] = []

    def work(folder: Path) -> None:
        time.sleep(0.05)
        attempts.append(0.05)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        (folder / "result").write_text("x")

    with run.open(HEADER, Recipe()):
        run.log_once("describe", 1.5)
        with pytest.raises(KeyboardInterrupt):
            run.do("library", "a", work)
        assert run.do("library", "a", work)
        assert not run.do("library", "a", work)
    with run.open(HEADER, Recipe()):
        run.log_once("describe", 99.0)  # what every start does is told of once
    assert run.times()[0] == {"stage": "describe", "seconds": 1.5, "interruptions": 0}
    assert run.times()[1]["interruptions"] == 1
    assert 0.1 <= seconds(run)["library"] < 5


def test_of_a_killed_attempt_what_is_known(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.open(HEADER, Recipe()):
        run.log("scores", "begun")
    began = time.time()
    run.partial("scores").write_text("{}")
    os.utime(run.partial("scores"), (began, began + 120))
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"time": "20')  # and a line that was cut off
    with run.open(HEADER, Recipe()):
        run.do("scores", "a", lambda folder: None)
    (times,) = run.times()
    assert times["interruptions"] == 1
    assert 119 <= times["seconds"] <= 125
    assert [json.loads(line)["event"] for line in (run.folder / "log.jsonl").read_text().splitlines() if "}" in line][
        -1
    ] == "done"
