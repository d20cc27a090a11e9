"""The remaining time of a run, by a clock that the test moves."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping

import pytest
from rich.console import Console

from layersmith.run.progress import Lines, progress_on
from layersmith.run.stage import StageProgress
from layersmith.run.timeline import Planned, Timeline
from layersmith.stages.arithmetic import stage_work

# SmolLM2-135M-Instruct on one core, make demo-smollm2: counted operations (1e12), seconds besides, and all as measured.
COUNTED = stage_work(
    {"statistics": 16.72, "library": 17.36, "scores": 33.06, "refine": 19.84, "pairs": 24.22, "evaluation": 13.43}
)
BESIDES = {"statistics": 5.2, "library": 18.1, "scores": 18.1, "refine": 1.7, "pairs": 0.0, "evaluation": 0.4}
MEASURED = {
    "statistics": 212.8,
    "library": 368.2,
    "scores": 477.3,
    "refine": 268.9,
    "pairs": 324.3,
    "evaluation": 150.0,
}
FIXED = {"describe": 4.0, "frontier": 2.0, "clock": 60.0}
STAGES = ("describe", "statistics", "library", "scores", "frontier", "refine", "pairs", "evaluation", "clock")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def estimates(seconds: Mapping[str, float], work: Mapping[str, float], rate: float | None) -> list[tuple[float, float]]:
    """Share of the run that is done, and estimate over actual remaining time, at every step."""
    clock = Clock()
    timeline = Timeline(STAGES, clock=clock)
    timeline.planned = Planned(work, lambda r: FIXED | {s: w / r + BESIDES[s] for s, w in work.items()}, rate)
    total, ratios = sum(seconds.get(stage, 0.0) for stage in STAGES), []
    for stage in STAGES:
        timeline.enter(stage)
        timeline.begin(stage)
        for step in range(20):
            clock.now += seconds.get(stage, 0.0) / 20
            timeline.done(stage, (step + 1) / 20, None)
            if (left := timeline.left()) is not None and clock.now < total - 1:
                ratios.append((clock.now / total, left / (total - clock.now)))
        timeline.leave()
    assert timeline.left() == pytest.approx(0, abs=1e-6)
    return ratios


@pytest.mark.parametrize("rate", [None, 0.09, 0.06])
def test_right_within_a_fifth_after_a_tenth_of_a_recorded_run(rate: float | None) -> None:
    seen = estimates(MEASURED | FIXED, COUNTED, rate)
    assert all(0.8 < ratio < 1.2 for share, ratio in seen if 0.1 <= share <= 0.9), seen
    assert min(share for share, _ in seen) < 0.1


def test_stages_that_are_planned_wrongly_are_noticed_while_they_run() -> None:
    rng = random.Random(0)
    for _ in range(20):
        seconds = {stage: value * rng.uniform(0.75, 1.3) for stage, value in MEASURED.items()} | FIXED
        seen = [ratio for share, ratio in estimates(seconds, COUNTED, 0.08) if 0.1 <= share <= 0.9]
        assert min(seen) > 0.6
        assert max(seen) < 1.6


def test_tasks_are_a_part_of_the_evaluation_with_a_plan_of_their_own() -> None:
    clock = Clock()
    timeline = Timeline(("evaluation", "clock"), {"tasks": ("evaluation", 2)}, clock=clock)
    timeline.planned = Planned(
        {"evaluation": 10.0, "tasks": 40.0}, lambda r: {"evaluation": 10 / r, "tasks": 40 / r}, 1
    )
    timeline.enter("evaluation")
    assert timeline.left() == pytest.approx(50)
    assert timeline.begin("evaluate") == "evaluation"
    clock.now = 10
    timeline.done("evaluation", 1.0, None)
    assert timeline.left() == pytest.approx(40)
    assert timeline.begin("tasks") == "tasks"
    clock.now = 30
    timeline.done("tasks", 1.0, None)
    assert timeline.left() == pytest.approx(20, rel=0.1)  # those of the parent; the child's follow
    assert timeline.begin("tasks") == "tasks"
    clock.now = 50
    timeline.done("tasks", 1.0, None)
    timeline.leave()
    timeline.enter("clock")
    assert timeline.left() == pytest.approx(0)


def test_a_stage_that_was_made_before_says_nothing_about_the_rate() -> None:
    clock = Clock()
    timeline = Timeline(STAGES, planned=Planned(COUNTED, lambda r: {s: w / r for s, w in COUNTED.items()}), clock=clock)
    for stage in ("describe", "statistics"):
        timeline.enter(stage)
        timeline.leave()
    assert timeline.left() is None


def test_lines_and_bars_say_which_stage_it_is_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersmith.run.progress._SECONDS_BETWEEN_LINES", -1.0)
    for terminal in (False, True):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=110, _environ={"TERM": "xterm-256color"})
        progress, clock = progress_on(screen), Clock()
        assert isinstance(progress, Lines)
        timeline = Timeline(("statistics", "library"), clock=clock)
        timeline.planned = Planned({"statistics": 1, "library": 3}, lambda r: {"statistics": 1 / r, "library": 3 / r})
        progress.timeline = timeline
        timeline.enter("statistics")
        with StageProgress(progress, "statistics").stage("statistics", 10, "rows") as advance:
            clock.now = 20.0
            advance(5)
            clock.now = 40.0
            advance(5)
        timeline.leave()
        assert isinstance(screen.file, io.StringIO)
        text = screen.file.getvalue()
        if terminal:
            assert "1/2 statistics" in text
        else:
            assert "stage 1 of 2, statistics: 50% of 10 rows, about" in text
            assert "left; 2 min 20 s left in all\n" in text
            assert text.endswith("left in all\n")
            assert "stage 1 of 2, statistics: done in" in text
