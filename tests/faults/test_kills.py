"""Killed before any operation that changes files, a command that is called again ends with the same bytes and nothing
is left over.

Operations that leave the same state on the disk, but for files with temporary names, are tried once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from layersmith.run.artifacts import TEMPORARY
from tests.faults.conftest import ALL, Tiny, contents
from tests.faults.operations import Fault, run

# In `make test` one of so many states is tried. Twice as rarely the process is really killed.
EVERY = 60
SAME = "the same bytes"


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
    "export": Case(
        lambda tiny, at: ["export", str(at / "run" / "child"), str(at / "out"), "--to", "vllm"],
        "compressed",
        is_refused_when_done=True,
    ),
    "costs": Case(
        lambda tiny, at: ["costs", str(tiny.parent), "--csv", str(at / "t.csv"), "--on", "H100", "--context", "64"]
    ),
}


def everything(at: Path) -> dict[str, str]:
    """Contents but the store's, which may lack what a killed run would have given it."""
    return {name: digest for name, digest in contents(at).items() if ".store/" not in name}


def state_of(at: Path) -> str:
    """Digest of all files and folders but those with a temporary name, which the next command removes unread."""
    found = hashlib.sha256()
    for path in sorted(at.rglob("*")):
        if TEMPORARY not in str(path.relative_to(at)):
            found.update(str(path.relative_to(at)).encode() + (path.read_bytes() if path.is_file() else b"/"))
    return found.hexdigest()


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
    states = {state_of(point): point for point in points}
    figures(name, "operations", str(len(points)), f"{len(states)} states of the disk")
    wrong: list[str] = []

    def check(kind: str, at: Path) -> None:
        outcome = resume(case, tiny, at, expected, said)
        figures(name, kind, at.name, outcome)
        if outcome != SAME:
            wrong.append(f"{kind} {at.name}: {outcome}")
        shutil.rmtree(at)

    chosen = list(states.values())
    for point in [p for i in range(7) for p in chosen[i::7]] if ALL else chosen[EVERY // 3 :: EVERY]:
        check("copied before operation", point)
    for number in range(min(EVERY // 2, len(points)), len(points) + 1, 2 * EVERY):
        at = start(case, tmp_path / f"{number:05d}", request)
        assert run(case.arguments(tiny, at), said, Fault(at, kill_at=number)) == -9
        check("killed before operation", at)
    assert not wrong, "\n".join(wrong)


def resume(case: Case, tiny: Tiny, at: Path, expected: dict[str, str], said: Path) -> str:
    """Call the command again where a process was killed; returns the outcome in words."""
    code = run(case.arguments(tiny, at), said)
    text = said.read_text()
    if "Traceback" in text or (code and not (case.is_refused_when_done and code == 2 and "already there" in text)):
        return f"exit code {code}: {text[-500:]}"
    left = [path for path in at.rglob("*") if path.name.startswith(TEMPORARY) or path.suffix in (".partial", ".work")]
    if left:
        return f"left over: {', '.join(path.relative_to(at).as_posix() for path in left)}"
    found = everything(at)
    differ = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
    return f"differ: {', '.join(differ)}" if differ else SAME
