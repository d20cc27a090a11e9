"""Every bad input of the table ends with one sentence, the right exit code, and nothing written.

The command line runs in this process. ``LAYERSMITH_FAULTS=all`` runs the whole table; otherwise a spread of it.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import layersmith
from layersmith import cli
from layersmith.recipe import Recipe
from layersmith.run.artifacts import TEMPORARY
from tests.faults.bad_inputs import CASES, RECIPE, Case, Place
from tests.faults.conftest import ALL

# Every this many cases one is run where not all are.
_STRIDE = 9
_SECONDS = 20
_LONGEST_MESSAGE = 1500
# Address space of the process while a command runs; a command that wants more fails instead of taking the machine's.
_MOST_BYTES = 24 * 1024**3


class TooSlow(BaseException):
    """A command took longer than it may."""


@pytest.fixture(scope="session")
def models(make_parent: Callable[..., Path]) -> dict[str, Path]:
    return {
        "parent": make_parent("llama", num_hidden_layers=2),
        "other vocabulary": make_parent("llama", num_hidden_layers=1, vocab_size=100),
    }


@pytest.fixture(scope="session")
def text(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.txt"
    file.write_text("\n\n".join(path.read_text() for path in sorted(text_folder.iterdir()))[:200_000])
    return file


@pytest.fixture(scope="session")
def finished_run(models: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    made: list[Path] = []

    def run() -> Path:
        if not made:
            folder = tmp_path_factory.mktemp("runs")
            (folder / "recipe.yaml").write_text(RECIPE)
            layersmith.compress(
                models["parent"], folder / "run", data=text, budget=0.9, recipe=Recipe.read(folder / "recipe.yaml")
            )
            made.append(folder / "run")
        return made[0]

    return run


def contents(folder: Path) -> dict[str, Any]:
    """Names, sizes and times of all files, without locks and without what finished stages gave to other runs."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and path.name not in (".lock", ".store", "log.jsonl")
        and not {"__pycache__", ".store"} & set(path.parts)
    }


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``main`` changes in its process is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = signal.getsignal(signal.SIGTERM)
    modules = set(sys.modules)
    yield
    signal.signal(signal.SIGTERM, before)
    for name in set(sys.modules) - modules:
        if name.startswith("descriptor_"):
            del sys.modules[name]


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow


def run_main(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command; an exception that the command line does not expect propagates."""
    monkeypatch.setattr(sys, "argv", ["layersmith", *words])
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(_SECONDS)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    "case",
    CASES if ALL else CASES[::_STRIDE],
    ids=lambda case: case.name[:70],
)
def test_a_bad_input_is_refused(
    case: Case,
    models: dict[str, Path],
    finished_run: Callable[[], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    figures: Callable[..., None],
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, models, finished_run, text)
    words = place.command(case.command)
    case.harm(place)
    before = contents(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code = run_main(words, monkeypatch)
    printed = capfd.readouterr()
    assert code == case.code, printed.err[-2000:]
    message = printed.err[printed.err.find("layersmith: ") :] if "layersmith: " in printed.err else printed.err
    assert case.word.lower() in message.lower(), message
    assert message.count("\n") == 1 or "Usage:" in message, message
    assert len(message) < _LONGEST_MESSAGE, message
    assert "Traceback" not in printed.err
    assert not [w for w in warned if issubclass(w.category, RuntimeWarning | UserWarning)], [str(w) for w in warned]
    after = contents(tmp_path)
    assert {name: after.get(name) for name in {*before, *after} if before.get(name, 0) != after.get(name, 0)} == {}
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    shutil.rmtree(tmp_path)
    figures(case.command[0], "bad input", case.name.split(":")[0], "refused")


def test_the_table_is_large_and_has_no_case_twice() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)
