"""The remaining time, estimated from finished and planned work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layersmith.execution.layerwise import LayerwiseParent, split_layers
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.run.progress import Advance, Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring import library_scores
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.work import Work

TOKENS = torch.randint(0, 512, (8, 24), generator=torch.Generator().manual_seed(4))


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def do(work: Work, clock: Clock, kind: str, amount: float, seconds: float) -> None:
    with work.doing(kind, amount):
        clock.seconds += seconds


def test_each_kind_takes_its_own_time() -> None:
    clock = Clock()
    work = Work(clock)
    work.plan("rest", 100)
    work.plan("look", 4)
    assert work.seconds_left is None
    do(work, clock, "rest", 10, 20)
    assert work.seconds_left is None  # nothing is known of the other
    do(work, clock, "look", 1, 7)
    assert work.seconds_left == pytest.approx(90 * 2 + 3 * 7)
    assert work.share == pytest.approx(27 / (27 + 201))
    clock.seconds += 2.7  # between what is timed
    assert work.seconds_left == pytest.approx(1.1 * 201)


def test_work_within_work_is_not_timed_twice() -> None:
    clock = Clock()
    work = Work(clock)
    work.plan("look", 10)
    with work.doing("look", 1):
        do(work, clock, "build", 1, 3)
        clock.seconds += 2
        do(work, clock, "build", 1, 1)
    assert work.seconds_left == pytest.approx(9 * 2)
    work.plan("build", 5)
    assert work.seconds_left == pytest.approx(9 * 2 + 5 * 2)


def test_what_an_operation_took_so_far_is_not_left() -> None:
    clock = Clock()
    work = Work(clock)
    work.plan("rest", 10)
    work.plan("build", 4)
    do(work, clock, "build", 1, 1)
    do(work, clock, "rest", 2, 4)
    with work.doing("rest", 4):
        clock.seconds += 3
        do(work, clock, "build", 1, 1)
        assert work.seconds_left == pytest.approx(8 * 2 - 3 + 2 * 1)
        clock.seconds += 100  # it takes longer than was thought: what else is left is not done by that
        assert work.seconds_left == pytest.approx(4 * 2 + 2 * 1)


def test_what_was_done_before_takes_no_time_and_counts() -> None:
    clock = Clock()
    work = Work(clock)
    work.done_before("rest", 50)
    work.plan("rest", 50)
    do(work, clock, "rest", 10, 5)
    assert work.seconds_left == pytest.approx(20)
    assert work.share == pytest.approx(0.6)
    work.forget()
    assert (work.seconds_left, work.share) == (0, 1)


def test_a_kind_not_done_yet_takes_the_rate_of_one_like_it() -> None:
    clock = Clock()
    work = Work(clock)
    work.plan("rest", 1000)
    do(work, clock, "forward", 10, 1)
    assert work.seconds_left == pytest.approx(100)
    do(work, clock, "rest", 1, 1)  # its first run, ten times slower
    assert 100 < (work.seconds_left or 0) < 150


class Listening(Progress):
    """What is said, on a clock that counted operations drive."""

    def __init__(self) -> None:
        self.layerwise: list[LayerwiseParent] = []
        self.said: list[tuple[float, float, float, str]] = []
        self.steps = self.total = 0.0
        self.clock = lambda: 1e-6 * self.layerwise[0].arithmetic.done if self.layerwise else 0.0

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        assert (name, unit) == ("score", "alternatives")
        self.total = total

        def advance(steps: float, left: float | None = None, said: str = "") -> None:
            assert steps >= 0
            assert left is not None
            self.steps += steps
            self.said.append((self.clock(), self.steps, left, said))

        yield advance


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Listening]:
    made: list[Listening] = []

    def split(parent: Parent, library: Library, **more: Any) -> LayerwiseParent:
        made[-1].layerwise.append(split_layers(parent, library, **more))
        return made[-1].layerwise[-1]

    monkeypatch.setattr(library_scores, "split_layers", split)
    return lambda: made.append(Listening()) or made[-1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 8, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("parent")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def library_of(path: Path, near: Path | None = None) -> Library:
    parent = load_parent(path, Runtime(torch.device("cpu"), torch.float32), stream_near=near)
    recipe = LibraryRecipe(ffn_fractions=(0.5,), kv_methods=("pool",), keep_layers=(2, 3))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 3))


RECIPES = {
    "exact": ScoringRecipe(mode="exact", batch_tokens=3 * 24),
    "second_order": ScoringRecipe(mode="second_order", exact_passes=2, batch_tokens=3 * 24),
}


@pytest.mark.parametrize("mode", RECIPES)
@pytest.mark.parametrize("streamed", [False, True])
def test_time_left_is_right_after_the_first_tenth(
    mode: str, streamed: bool, path: Path, tmp_path: Path, listening: Callable[[], Listening]
) -> None:
    library, progress = library_of(path, tmp_path if streamed else None), listening()
    score_library(library, TOKENS, RECIPES[mode], recording=Recording(tmp_path / "journal", progress=progress))
    end = progress.clock()
    late = [(at, left) for at, _, left, _ in progress.said if 0.1 * end <= at <= 0.9 * end]
    assert len(late) > 10
    # Guesses before a kind was timed are for times, where more counts than the products of this clock.
    assert max(abs(at + left - end) / (end - at) for at, left in late) < 0.25
    assert progress.steps == pytest.approx(progress.total)
    said = progress.said[-1][3]
    assert f"{progress.total:.0f} scored" in said if mode == "exact" else "run exactly" in said
    assert said.endswith("tokens/s")


@pytest.mark.parametrize("mode", RECIPES)
def test_an_interrupted_run_goes_on_where_it_was(
    mode: str, path: Path, tmp_path: Path, listening: Callable[[], Listening]
) -> None:
    library, journal, progress = library_of(path), tmp_path / "journal", listening()
    score_library(library, TOKENS, RECIPES[mode], recording=Recording(journal, "a", progress=progress))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) * 4 // 5]))  # estimates come first, exact runs take longer
    progress = listening()
    score_library(library, TOKENS, RECIPES[mode], recording=Recording(journal, "a", progress=progress))
    at, steps, left, _ = progress.said[0]
    assert steps > 0.4 * progress.total
    assert at + left == pytest.approx(progress.clock(), rel=0.2)
