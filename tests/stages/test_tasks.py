"""The share of the parent's accuracy that a child keeps, on tasks whose results follow from a child's size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layersmith
from layersmith import pipeline
from layersmith.errors import Infeasible, InputError, UsageError
from layersmith.evaluation.tasks import TaskResult
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json
from layersmith.run.progress import Progress
from layersmith.stages import tasks
from layersmith.stages.tasks import kept_shares
from tests.conftest import TINY_RECIPE

ITEMS = 1000


class Heard(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def quiz(monkeypatch: pytest.MonkeyPatch, make_parent: Callable[..., Path]) -> Path:
    """A parent, and a task on which a model answers as many items as it has parameters."""
    parent = make_parent("llama")
    whole = sum(p.numel() for p in layersmith.load(parent).parameters())

    def run(model: Any, tokenizer: Any, recipe: Any, progress: Any) -> list[TaskResult]:
        right = round(ITEMS * sum(p.numel() for p in model.parameters()) / whole)
        return [TaskResult("quiz", "acc", [1.0] * right + [0.0] * (ITEMS - right), 0.5)]

    monkeypatch.setattr(tasks, "run_tasks", run)
    monkeypatch.setattr(pipeline, "require_tasks", lambda tasks: None)
    return parent


def asking(share: float) -> dict[str, Any]:
    return TINY_RECIPE | {"evaluation": {"tasks": ["quiz"], "keep": {"quiz": share}}}


def test_the_smallest_child_that_keeps_the_share(quiz: Path, text_folder: Path, tmp_path: Path) -> None:
    heard = Heard()
    result = layersmith.compress(
        quiz, tmp_path / "run", data=text_folder, budget="1.0", recipe=asking(0.9), progress=heard
    )
    fraction = result.solution.costs["parameters"] / result.solution.parent_costs["parameters"]
    tried = [note for note in heard.notes if note.startswith("keep: at ")]
    assert len(tried) == tasks._TRIES
    assert all("±" in note for note in tried)
    assert 0.9 <= fraction < 0.93
    row = result.metric("quiz/kept")
    assert row["child"] == pytest.approx(fraction, abs=1 / ITEMS)
    report = read_json(result.run / "report.json")
    assert any(row["metric"] == "quiz/kept" for row in report["evaluation"]["rows"])
    assert "share of the parent's accuracy (0.9 asked)" in (result.child / "README.md").read_text()
    again = layersmith.compress(quiz, tmp_path / "run", data=text_folder, budget="1.0", recipe=asking(0.9))
    assert again.solution.alternatives == result.solution.alternatives


def test_a_child_within_a_limit_that_keeps_less_is_refused(quiz: Path, text_folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": text_folder, "budget": 0.8}
    with pytest.raises(Infeasible, match=r"keeps quiz 0\.[78].*0\.9 asked"):
        layersmith.compress(quiz, tmp_path / "run", recipe=asking(0.9), **given)
    assert (tmp_path / "run" / "child" / "config.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    kept = layersmith.compress(quiz, tmp_path / "other", recipe=asking(0.7), **given)
    assert kept.metric("quiz/kept")["child"] >= 0.7


def test_the_share_is_paired_by_item() -> None:
    before = [TaskResult("quiz", "acc", [1.0, 1.0, 1.0, 0.0], 0.5), TaskResult("quiz", "perplexity", [-1.0] * 4, None)]
    after = [TaskResult("quiz", "acc", [1.0, 1.0, 0.0, 0.0], 0.5), TaskResult("quiz", "perplexity", [-2.0] * 4, None)]
    (kept,) = kept_shares({"quiz": 0.5}, before, after)
    assert kept.share == pytest.approx(2 / 3)
    residuals = [1 / 3, 1 / 3, -2 / 3, 0.0]
    assert kept.error == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 3 / 4) / 0.75)
    assert kept.holds
    (same,) = kept_shares({"quiz": 1.0}, before, before)
    assert (same.share, same.error) == (1.0, 0.0)


def test_what_cannot_be_kept_is_refused() -> None:
    nothing = [TaskResult("quiz", "acc", [0.0, 0.0], 0.5)]
    with pytest.raises(InputError, match="parent's is 0"):
        kept_shares({"quiz": 0.9}, nothing, nothing)
    with pytest.raises(UsageError, match="not one of the tasks"):
        Recipe.read({"evaluation": {"keep": {"quiz": 0.9}}})
    with pytest.raises(UsageError, match="keep"):
        Recipe.read({"evaluation": {"tasks": ["quiz"], "keep": {"quiz": 1.5}}})
