"""Levels of work, the level for a given time, and a run that chooses its own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import layersmith
from layersmith.errors import UsageError
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json
from layersmith.run.progress import Progress
from layersmith.stages import effort, time_plan
from layersmith.stages.arithmetic import Found, ranking_seconds, stage_flops, stage_seconds
from layersmith.stages.dry_run import plan
from layersmith.stages.effort import TOP, at_level, highest_level, with_effort
from layersmith.stages.job import REFINEMENT
from layersmith.stages.library import AFTER_SEARCH
from layersmith.units import parse_seconds

SMALL: dict[str, Any] = {
    "data": {"sequence_length": 32}, "library": {"ffn_fractions": [0.5], "query_heads": False, "linear": []},
    "completion_tokens": 0, "costs": {"time_child": False},
}  # fmt: skip


def values(recipe: Recipe) -> dict[tuple[str, str], Any]:
    data = recipe.to_dict()
    return {
        (section, name): data[section][name] for section, name in {**effort._LEVELS, **effort._LATE, **effort._LAST}
    }


def test_more_work_never_means_less_of_anything() -> None:
    recipes = [values(at_level(Recipe(), level / 50)) for level in range(50 * TOP + 1)]
    for fewer, more in pairwise(recipes):
        assert all(fewer[key] <= more[key] for key in fewer)
    assert recipes[0] != recipes[-1]


def test_level_3_has_the_defaults_and_no_level_changes_nothing() -> None:
    assert values(at_level(Recipe(), 3)) == values(Recipe())
    assert with_effort(Recipe()) == Recipe()


def test_settings_that_were_changed_are_kept_and_a_level_is_applied_once() -> None:
    asked = Recipe().with_settings(["scoring.exact_passes=2.5", "data.evaluation_sequences=9"])
    chosen = at_level(asked, 4.5, 2.0, 1.0)
    assert (chosen.scoring.exact_passes, chosen.data.evaluation_sequences) == (2.5, 9)
    assert chosen.data.calibration_sequences == 192
    assert chosen.search.refine_passes == 5
    assert chosen.local_distillation.child_refit_sequences == 16
    assert with_effort(chosen) == chosen == Recipe.read(chosen.to_dict())


def test_what_is_chosen_after_the_search_makes_no_earlier_stage_again() -> None:
    assert {name for _, name in effort._LAST} <= set(AFTER_SEARCH)
    assert {name for _, name in effort._LATE} <= set(REFINEMENT)


def test_the_highest_level_within_a_time() -> None:
    assert highest_level(lambda level: 10 + level, 12.5) == 2.5
    assert highest_level(lambda level: 10 + level, 1) == 0
    assert highest_level(lambda level: 10 + level, 100) == TOP


def test_refinement_that_could_try_nothing_is_left_out() -> None:
    passes = [at_level(Recipe(), level / 10).search.refine_passes for level in range(21)]
    assert passes[0] == 0
    assert not any(0 < value < 4 for value in passes)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "here") == seconds
    assert Recipe.read({"effort": {"within": text}}).effort.within == text


@pytest.mark.parametrize("text", ["", "30", "-5min", "0s", "3 parsecs", "10GiB"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"effort.within.*is not a time"):
        Recipe.read({"effort": {"within": text}})


def test_a_plan_names_every_stage(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layersmith.stages.dry_run.forward_rate", lambda space, recipe, runtime: 1e9)
    parent = make_parent("llama")
    budget = layersmith.costs.budget.Budget.parse("0.7")
    plans = [
        str(plan(parent, tmp_path / "run", text_folder, Recipe.read(SMALL | {"effort": asked}), budget))
        for asked in ({"within": "1s"}, {"level": 2.5}, {"within": "10h"})
    ]
    levels = [float(text.partition("level of work: ")[2].split()[0]) for text in plans]
    assert levels == [0, 2.5, TOP]
    for stage in ("statistics", "library", "scores", "refine", "pairs", "child", "evaluation"):
        assert f"\n  {stage}: " in plans[1]


class Heard(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_keeps_the_levels_that_it_chose(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_plan, "forward_rate", lambda space, recipe, runtime: 2e9)
    heard, recipe = Heard(), SMALL | {"effort": {"within": "9s"}}
    given: dict[str, Any] = {"data": text_folder, "budget": 0.8, "recipe": recipe, "progress": heard}
    result = layersmith.compress(make_parent("llama"), tmp_path / "run", **given)
    chosen = Recipe.from_dict(read_json(result.run / "run.json")["recipe"])
    assert chosen.effort.level is not None
    assert chosen.effort.late_level is not None
    assert chosen.effort.last_level is not None
    assert any(note.startswith("--within 9s: level") for note in heard.notes)
    assert Recipe.read(result.run / "recipe.yaml") == chosen == with_effort(chosen)

    # Another speed of the machine changes nothing: nothing is made again.
    monkeypatch.setattr(time_plan, "forward_rate", lambda space, recipe, runtime: 1e5)
    log = (result.run / "log.jsonl").read_text()
    again = layersmith.compress(make_parent("llama"), tmp_path / "run", **given)
    assert '"begun"' not in (result.run / "log.jsonl").read_text()[len(log) :]
    assert Recipe.from_dict(read_json(again.run / "run.json")["recipe"]) == chosen


def outlines(make_parent: Callable[..., Path]) -> Iterator[Found]:
    from layersmith.costs.budget import Workload
    from layersmith.stages.inspect import outline

    for family in ("llama", "qwen3"):
        space = outline(make_parent(family), Recipe().library, Workload(1, 64))
        yield Found(space.alternatives, space.axes, space.costs)


def test_arithmetic_rises_with_the_level(make_parent: Callable[..., Path]) -> None:
    for space in outlines(make_parent):
        totals = [sum(stage_flops(space, at_level(Recipe(), level / 4)).values()) for level in range(4 * TOP + 1)]
        assert totals == sorted(totals)
        assert totals[0] * 20 < totals[-1]


def test_rankings_and_building_layers_take_time_however_many_rows_there_are(make_parent: Callable[..., Path]) -> None:
    for space in outlines(make_parent):
        few, many = (Recipe.from_dict({"data": {"calibration_sequences": rows}}) for rows in (1, 1000))
        taken = [stage_seconds(stage_flops(space, r), space, r, 1e18)["statistics"] for r in (few, many)]
        assert taken[0] == pytest.approx(taken[1], rel=1e-3)
        assert taken[0] == pytest.approx(ranking_seconds(space, 1e18), rel=1e-3)
        # By diagonals alone, as where all moments need too much memory, channels take no products.
        alternatives = [replace(a, method="contribution") if a.kind == "ffn_width" else a for a in space.alternatives]
        assert ranking_seconds(Found(alternatives, space.axes, space.costs), 1e6) < ranking_seconds(space, 1e6)
