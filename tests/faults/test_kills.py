"""Killed before any operation that changes files, a command that is called again ends with the same bytes and nothing
is left over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from layersmith.run.artifacts import TEMPORARY
from tests.faults.conftest import ALL, Tiny, contents
from tests.faults.operations import Fault, run

# In `make test` one of so many operations is tried, and the process is really killed; else the copies of all are used.
EVERY = 70


@dataclass(frozen=True)
class Case:
    """A command, and what is there before it.

    Attributes:
        arguments: Arguments for a folder that it works in.
        before: Finished run that it needs; None for none.
        is_refused_when_done: Whether it refuses to write what is there.
    """

    arguments: Callable[[Tiny, Path], list[str]]
    before: str | None = None
    is_refused_when_done: bool = False


CASES = {
    "compress": Case(lambda tiny, at: tiny.compress(at / "run")),
    "distill": Case(lambda tiny, at: tiny.distill(at / "run"), "compressed"),
    "search --out": Case(
        lambda tiny, at: tiny.search(at / "run", "--out", str(at / "child")), "compressed", is_refused_when_done=True
    ),
    "search --frontier": Case(lambda tiny, at: ["search", str(at / "run"), "--frontier"], "compressed"),
    "report": Case(lambda tiny, at: ["report", str(at / "run")], "compressed"),
    "costs": Case(
        lambda tiny, at: ["costs", str(tiny.parent), "--csv", str(at / "t.csv"), "--on", "H100", "--context", "64"]
    ),
}


def everything(at: Path) -> dict[str, str]:
    """Contents but the store's, which may lack what a killed run would have given it."""
    left = [path for path in at.rglob("*") if path.name.startswith(TEMPORARY)]
    left += [path for path in at.rglob("*") if path.suffix in (".partial", ".work")]
    assert not left, f"left over: {left}"
    return {name: digest for name, digest in contents(at).items() if ".store/" not in name}


def start(case: Case, folder: Path, request: pytest.FixtureRequest) -> Path:
    folder.mkdir()
    if case.before is not None:
        shutil.copytree(request.getfixturevalue(case.before), folder / "run")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_operation(
    name: str,
    tiny: Tiny,
    tmp_path: Path,
    figures: Callable,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LAYERSMITH_STORE", raising=False)
    case, said = CASES[name], tmp_path / "said"
    whole = start(case, tmp_path / "whole", request)
    copies = tmp_path / "copies"
    copies.mkdir()
    assert run(case.arguments(tiny, whole), said, Fault(whole, copies=copies)) == 0, said.read_text()
    expected = everything(whole)
    points = sorted(copies.iterdir())
    assert points
    for point in points if ALL else points[EVERY // 3 :: EVERY]:
        resume(case, tiny, point, expected, said)
        figures(name, "copied before operation", point.name, "the same bytes")
        shutil.rmtree(point)
    for number in range(min(EVERY // 2, len(points)), len(points) + 1, EVERY):
        at = start(case, tmp_path / f"killed-{number}", request)
        assert run(case.arguments(tiny, at), said, Fault(at, kill_at=number)) == -9
        resume(case, tiny, at, expected, said)
        figures(name, "killed before operation", str(number), "the same bytes")


def resume(case: Case, tiny: Tiny, at: Path, expected: dict[str, str], said: Path) -> None:
    code = run(case.arguments(tiny, at), said)
    text = said.read_text()
    assert "Traceback" not in text, text
    if not (case.is_refused_when_done and code == 2 and "already there" in text):
        assert code == 0, (at.name, text)
    found = everything(at)
    assert found == expected, (at.name, sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n)))
