"""A finished run of a tiny model, commands in this process, and what is the same in equal runs.

``make test`` tries a spread of the cases of each instrument. With ``LAYERSMITH_FAULTS=all``, as ``make faults`` sets,
all are tried and their figures go to ``docs/reliability.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from layersmith import cli
from layersmith.report.html import render
from tests.conftest import TINY_RECIPE

ALL = os.environ.get("LAYERSMITH_FAULTS") == "all"
RECIPE = TINY_RECIPE | {
    "library": {"ffn_fractions": [0.5]},
    "data": TINY_RECIPE["data"] | {"training_sequences": 100},
    "local_distillation": {"tokens": 0, "coupled_tokens": 1024, "batch_tokens": 64},
    "search": {"refine_passes": 2, "refine_rows": 2, "frontier_points": 3},
    "distillation": {"batch_tokens": 64, "device_tokens": 64},
}


def spread(cases: Sequence[str], every: int) -> list[str]:
    """All cases, or in ``make test`` one of ``every``."""
    return list(cases if ALL else cases[:: max(1, every)])


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> Said:
    """Run a command in this process. A traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["layersmith", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return Said(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("a command ends with a code")


@dataclass(frozen=True)
class Tiny:
    """A parent, data and a recipe, and the command lines on them."""

    parent: Path
    data: Path
    recipe: Path

    def compress(self, out: Path, *more: str) -> list[str]:
        request = [str(self.parent), str(out), "--data", str(self.data), "--params", "0.9"]
        return ["compress", *request, "--recipe", str(self.recipe), *more]

    def distill(self, out: Path) -> list[str]:
        return ["distill", str(out), "--tokens", "256"]

    def search(self, run: Path, *more: str) -> list[str]:
        return ["search", str(run), "--params", "0.85", *more]


@pytest.fixture(scope="session")
def tiny(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    return Tiny(make_parent("llama", num_hidden_layers=2), text_folder, recipe)


@pytest.fixture(scope="session")
def compressed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Do not change it; :func:`copy_of` it."""
    run = tmp_path_factory.mktemp("compressed") / "run"
    said = command(*tiny.compress(run))
    assert said.code == 0, said.err
    return run


@pytest.fixture(scope="session")
def distilled(tiny: Tiny, compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after global distillation."""
    run = copy_of(compressed, tmp_path_factory.mktemp("distilled") / "run")
    said = command(*tiny.distill(run))
    assert said.code == 0, said.err
    return run


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from another run."""
    monkeypatch.setenv("LAYERSMITH_STORE", "off")


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that equal runs have in common; of the report without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in ("log.jsonl", ".lock", "report.html"):
            continue
        data = path.read_bytes()
        with contextlib.suppress(ValueError):  # damaged by the test
            if path.name == "report.json":
                report = json.loads(data) | {"timings": []}
                data = (json.dumps(report) + render(report)).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def keep(*row: str) -> None:
    """Keep a case and its outcome for ``docs/reliability.md``: command, fault, place, outcome."""
    kept = os.environ.get("LAYERSMITH_FAULTS_FIGURES")
    if kept:
        with open(kept, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def figures() -> Callable[..., None]:
    """Keep a case and its outcome for ``docs/reliability.md``: command, fault, place, outcome."""
    return keep


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of every test here."""
    if report.when == "call" and report.outcome != "skipped":
        keep("test", report.location[0], report.nodeid, report.outcome)
