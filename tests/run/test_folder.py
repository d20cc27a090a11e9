"""The times of a run's stages, also where it was interrupted; what runs share; which folders are refused."""

import json
import os
import time
from pathlib import Path

import pytest

from layersmith.errors import InputError
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.folder import Run
from layersmith.run.stage import Making
from layersmith.run.store import Store

HEADER = {
    "parent": {"path": "p", "identity": "x"}, "data": {"source": "d", "digest": "y"}, "budget": {}, "recipe": {},
    "versions": {}, "seed": 0, "working_directory": "", "descriptor": None,
}  # fmt: skip


def seconds(run: Run) -> dict[str, float]:
    return {t["stage"]: t["seconds"] for t in run.log.times()}


def write(making: Making) -> None:
    (making.folder / "result").write_text("x")


def test_times_are_of_all_attempts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    attempts: list[float] = []

    def work(making: Making) -> None:
        time.sleep(0.05)
        attempts.append(0.05)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        write(making)

    with run.open(HEADER, Recipe()):
        with pytest.raises(KeyboardInterrupt):
            run.do("library", "a", work)
        assert run.do("library", "a", work)
        assert not run.do("library", "a", work)
    assert run.log.times()[0]["interruptions"] == 1
    assert 0.1 <= seconds(run)["library"] < 5


def test_of_a_killed_attempt_what_is_known(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.open(HEADER, Recipe()):
        run.log.add("scores", "begun")
    began = time.time()
    run.partial("scores").write_text("{}")
    os.utime(run.partial("scores"), (began, began + 120))
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"time": "20')  # and a line that was cut off
    with run.open(HEADER, Recipe()):
        run.do("scores", "a", lambda making: None)
    (times,) = run.log.times()
    assert times["interruptions"] == 1
    assert 119 <= times["seconds"] <= 125
    assert [json.loads(line)["event"] for line in (run.folder / "log.jsonl").read_text().splitlines() if "}" in line][
        -1
    ] == "done"


def test_runs_share_what_was_made_from_the_same_inputs(tmp_path: Path) -> None:
    made = []

    def work(making: Making) -> None:
        made.append(making.inputs)
        write(making)

    for name, inputs in (("one", "a"), ("two", "a"), ("three", "b")):
        run = Run(tmp_path / name, Store.near(tmp_path / name))
        with run.open(HEADER, Recipe()):
            run.do("scores", inputs, work, is_shared=True)
            run.do("child", inputs, work)
        assert (tmp_path / name / "scores" / "result").read_text() == "x"
    files = [tmp_path / name / "scores" / "result" for name in ("one", "two", "three")]
    assert os.path.samefile(files[0], files[1])
    assert not os.path.samefile(files[0], files[2])
    assert len(made) == 2 + 3


def test_a_run_of_another_format_is_refused_in_one_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.open(HEADER, Recipe()):
        pass
    header = read_json(run.folder / "run.json")
    write_json(run.folder / "run.json", header | {"format": 2})
    with pytest.raises(InputError, match="another version of layersmith"):
        Run.check(run.folder)


def test_a_file_that_differs_is_made_again_and_never_taken_from_the_store(tmp_path: Path) -> None:
    def make(name: str) -> tuple[Run, bool]:
        run = Run(tmp_path / name, Store.near(tmp_path / name))
        with run.open(HEADER, Recipe()):
            return run, run.do("scores", "a", write, is_shared=True)

    run, _ = make("one")
    assert not make("one")[1]
    (run.folder / "scores" / "result").write_text("y")  # and so, through its link, the file in the store
    with pytest.raises(InputError, match=r"scores/result differs .* Run the same compress command again"):
        Run.existing(run.folder).require("scores")
    for name in ("two", "one"):
        again, is_made = make(name)
        assert is_made
        assert (again.folder / "scores" / "result").read_text() == "x"
    (run.folder / "scores" / "result").unlink()
    assert make("one")[1]
    assert (run.folder / "scores" / "result").read_text() == "x"


def test_large_files_are_hashed_again_when_they_changed_or_when_asked(tmp_path: Path) -> None:
    def large(making: Making) -> None:
        (making.folder / "result").write_bytes(bytes(2 * 1024**2))

    run = Run(tmp_path)
    with run.open(HEADER, Recipe()):
        run.do("scores", "a", large)
    file = tmp_path / "scores" / "result"
    Run(tmp_path).require("scores")  # hashed, and remembered
    before = file.stat()
    file.write_bytes(bytes(2 * 1024**2 - 1) + b"x")
    assert Run(tmp_path).damage("scores") == "scores/result differs from what was written"
    file.write_bytes(bytes(2 * 1024**2))
    Run(tmp_path).require("scores")
    before = file.stat()
    file.write_bytes(bytes(2 * 1024**2 - 1) + b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Run(tmp_path).damage("scores") is None
    assert Run(tmp_path, verify=True).damage("scores") is not None


def test_a_header_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.open(HEADER, Recipe()):
        pass
    path = run.folder / "run.json"
    path.write_text(path.read_text().replace('"identity": "x"', '"identity": "y"'))
    with pytest.raises(InputError, match="differs from what was written"):
        run.header()
