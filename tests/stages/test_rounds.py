"""Compression in rounds: budgets between the parent's and the child's, one run a round, and one first parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import layersmith
from layersmith.costs.budget import Limits, parse_budget
from layersmith.errors import UsageError
from layersmith.evaluation.compare import compare
from layersmith.pipeline import Result, stages
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json
from layersmith.stages.reopen import search
from layersmith.stages.rounds import check_rounds, limits_of_round, of_round
from tests.conftest import TINY_RECIPE


def limits(**budget: str) -> Limits:
    return parse_budget(**budget).limits


def recipe(**rounds: object) -> Recipe:
    return Recipe.from_dict({"rounds": rounds, "distillation": {"tokens": 500}})


def test_each_round_shrinks_what_the_budget_limits_by_the_same_factor() -> None:
    costs = {"parameters": 1000, "kv_cache_bytes": 80}
    asked = limits(params="0.512", kv_cache="0.125")
    amounts = [limits_of_round(asked, recipe(count=3), number, costs).resolve(costs) for number in (1, 2)]
    assert amounts == [{"parameters": 800, "kv_cache_bytes": 40}, {"parameters": 640, "kv_cache_bytes": 20}]


def test_sizes_and_tokens_of_rounds_can_be_given() -> None:
    chosen = recipe(count=3, sizes=[0.9, 0.7], tokens=[100, 0])
    costs = {"parameters": 1000}
    for asked, second in ((limits(params="0.5"), 700), (limits(params="0.8"), 800), (limits(ttft="2s"), 700)):
        first = limits_of_round(asked, chosen, 1, costs).resolve(costs)
        assert (first, limits_of_round(asked, chosen, 2, costs).resolve(costs)) == (
            {"parameters": 900},
            {"parameters": second},
        )
    assert [of_round(chosen, n).distillation.tokens for n in (1, 2)] == [100, 0]
    assert [of_round(recipe(count=3), n).distillation.tokens for n in (1, 2)] == [50, 50]


def test_rounds_need_sizes_and_as_many_as_there_are_rounds() -> None:
    with pytest.raises(UsageError, match=r"rounds\.sizes"):
        check_rounds(limits(ttft="2s"), recipe(count=2))
    with pytest.raises(UsageError, match="as an amount"):
        check_rounds(limits(ttft="0.5", params="0.8"), recipe(count=2))
    for wrong in ({"count": 3, "sizes": [0.9]}, {"count": 3, "sizes": [0.7, 0.9]}, {"count": 2, "tokens": [1, 2]}):
        with pytest.raises(UsageError):
            recipe(**wrong)


def test_a_run_in_rounds_is_resumed_inside_a_round_and_measured_against_the_first_parent(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    parent, run = make_parent("llama", num_hidden_layers=2), tmp_path / "rounds" / "run"  # a name that rounds have
    settings = TINY_RECIPE | {
        "local_distillation": {"coupled_tokens": 0},
        "search": {"refine_passes": 0, "frontier_points": 3},
        "distillation": {"tokens": 512, "batch_tokens": 256, "device_tokens": 256},
        "rounds": {"count": 2, "tokens": [512]},
    }
    for reached in stages(parent, run, text_folder, 0.7, settings):
        if reached == "rounds/1/scores":
            break
    (result,) = [r for r in stages(parent, run, text_folder, 0.7, settings) if isinstance(r, Result)]
    assert layersmith.compress(parent, run, data=text_folder, budget=0.7, recipe=settings).child == result.child

    first, last = layersmith.load(run / "rounds" / "1" / "distilled"), layersmith.load(result.child)
    original = layersmith.load(parent)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (original, first, last)]
    assert sizes[0] > sizes[1] > sizes[2] == result.solution.costs["parameters"] <= 0.7 * sizes[0]
    assert result.solution.parent_costs["parameters"] == sizes[0]  # fractions are of the first parent
    events = [(r["stage"], r["event"]) for r in map(json.loads, (run / "rounds/1/log.jsonl").read_text().splitlines())]
    assert events.count(("scores", "begun")) == 1  # what was finished before the interruption is not done again

    rows = load_file(run / "data" / "tokens.safetensors")["evaluation"].long()
    table = {row["metric"]: row for row in compare(original, last, rows, batch_sequences=2).to_dict()["rows"]}
    assert result.metric("kl_divergence")["child"] == pytest.approx(table["kl_divergence"]["child"], abs=1e-5)
    rounds = read_json(run / "report.json")["rounds"]
    assert [(r["number"], r["parameters"], r["tokens"]) for r in rounds] == [(1, sizes[1], 512), (2, sizes[2], 512)]
    assert rounds[1]["kl_distilled"] == result.metric("kl_divergence")["child"]
    assert "in 2 rounds" in (result.child / "README.md").read_text(encoding="utf-8")

    moved = run.rename(tmp_path / "moved")
    assert search(moved, 0.65, progress=False).solutions[0].costs["parameters"] <= 0.65 * sizes[0]
