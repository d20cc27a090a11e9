"""Whole children against the models that they are, and refinement: deterministic, resumable, never worse."""

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layersmith.costs.budget import Workload, parse_budget
from layersmith.costs.table import CostTable
from layersmith.data.splits import load_tokenizer
from layersmith.demo.job import MODEL
from layersmith.evaluation.compare import compare
from layersmith.execution.layerwise import split_layers
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.pipeline import stages
from layersmith.recipe import LibraryRecipe, ScoringRecipe, SearchRecipe
from layersmith.run.journal import Journal
from layersmith.run.progress import SILENT
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import ChildEvaluator, child_evaluator
from layersmith.scoring.library_scores import score_library
from layersmith.search.problem import SearchProblem
from layersmith.search.refine import Evaluations, read_refined, refine
from layersmith.stages.costs import cost_table
from layersmith.stages.data import DATA
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.search import problem_as_measured
from tests.conftest import TINY_RECIPE


@pytest.fixture(scope="module")
def scored(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scored") / "run"
    for stage in stages(make_parent("llama"), folder, text_folder, 0.8, TINY_RECIPE):
        if stage == "scores":
            break
    job = job_of_run(folder)
    return job.read(LIBRARY), problem_as_measured(job), job.read(DATA).scoring


def models(scored: Any, is_layerwise: bool = True) -> ChildEvaluator:
    library, _, rows = scored
    return ChildEvaluator(library, split_layers(library.parent, library) if is_layerwise else None, rows, 2)


@pytest.mark.parametrize("is_layerwise", [True, False])
def test_whole_children_lose_what_the_written_ones_do(scored: Any, is_layerwise: bool) -> None:
    library, problem, rows = scored
    solutions = [solution.alternatives for solution in problem.several(3, 2)]
    results = models(scored, is_layerwise).run(solutions, range(len(rows)))
    for chosen, rows_of_child in zip(solutions, results, strict=True):
        expected = compare(library.parent.model, library.compose(chosen), rows, batch_sequences=2)
        values = torch.tensor([row["kl_divergence"] for row in rows_of_child])
        assert torch.allclose(values, torch.tensor(expected.metrics["kl_divergence"]), rtol=1e-3, atol=1e-6)


def test_scores_that_are_wrong_are_mended() -> None:
    """On a trained model: with scores that are off by random factors the program's solution is far from the best."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    rows = torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])[: 16 * 128].view(16, 128)
    parent, recipe = load_parent(MODEL, Runtime(torch.device("cpu"), torch.float32)), LibraryRecipe(linear=(), no_op=())
    library = build_library(parent, recipe, survey(parent, recipe), Calibration(rows, 8))
    rng, limits = random.Random(1), parse_budget(params="0.7").limits
    scores = score_library(library, rows, ScoringRecipe(mode="second_order", exact_passes=0))
    losses = {s.alternative.key: max(0.0, s.mean("kl_divergence")) for s in scores}
    costs = cost_table(parent, library, Workload())
    right = SearchProblem(library.alternatives, losses, costs, limits)
    factors = {(a.layer, a.subblock): math.exp(rng.gauss(0, 1)) for a in library.alternatives}
    wrong = SearchProblem(
        library.alternatives, {a.key: losses[a.key] * factors[a.layer, a.subblock] for a in library.alternatives},
        costs, limits,
    )  # fmt: skip
    evaluator = child_evaluator(library, rows, ScoringRecipe(), SILENT)
    with Journal(None, "") as journal:
        best = refine(wrong, wrong.best(), Evaluations(evaluator, "kl_divergence", journal), SearchRecipe())
    assert best.passes <= SearchRecipe.refine_passes
    before, after = best.measured["plain"], best.measured["choice"]
    of_right = math.fsum(row["kl_divergence"] for row in evaluator.run([right.best().alternatives], range(16))[0]) / 16
    assert before > 1.15 * of_right
    assert before - after > 0.5 * (before - of_right)


class _CoupledLayers(SimpleNamespace):
    """Evaluates children in which an attention and the FFN behind it are of use only together."""

    def cost(self, children: Sequence[Any], num_rows: int) -> float:
        return len(children) * num_rows / len(self.tokens)

    def run(self, children: Sequence[Any], rows: Sequence[int]) -> list[list[dict[str, float]]]:
        gone = [Counter(a.layer for a in child if a.is_no_op) for child in children]
        losses = [sum({1: 1.0, 2: 0.5 + i / 16}[count] for i, count in layers.items()) for layers in gone]
        return [[{"kl_divergence": loss}] * len(rows) for loss in losses]


def test_layers_whose_subblocks_need_each_other_are_removed_as_wholes() -> None:
    places = [(i, subblock) for i in range(8) for subblock in ("attention", "ffn")]
    alternatives = [Alternative(i, s, kind) for i, s in places for kind in ("parent", "no_op")]
    costs = CostTable(
        {a.key: {"parameters": 10 * a.is_parent} for a in alternatives}, {"parameters": 0}, {"parameters": 160}
    )
    # By itself, the attention of an even layer and the FFN of an odd one seem to be of least use.
    alone = {
        a.key: a.is_no_op * (0.9 if (a.layer % 2 == 0) == (a.subblock == "attention") else 1.0) for a in alternatives
    }
    problem = SearchProblem(alternatives, alone, costs, parse_budget(params="0.75").limits)
    library = SimpleNamespace(alternatives=alternatives)
    models: Any = _CoupledLayers(tokens=torch.zeros(16, 4), layerwise=None, library=library)
    with Journal(None, "") as journal:
        best = refine(problem, problem.best(), Evaluations(models, "kl_divergence", journal), SearchRecipe())
    assert best.measured["plain"] == 4.0
    assert best.measured["choice"] == 0.5 + 0.5 + 1 / 16


class _Stop(Exception):
    pass


@pytest.mark.parametrize("objective", ["kl_divergence", "lm_loss"])
def test_refinement(scored: Any, tmp_path: Path, objective: str) -> None:
    _, problem, rows = scored
    recipe, plain = SearchRecipe(refine_passes=14, refine_rows=2), problem.best()

    def run(path: Path, stop_after: float = 1e9) -> Any:
        done = 0.0

        def advance(passes: float) -> None:
            nonlocal done
            done += passes
            if done > stop_after:
                raise _Stop

        with Journal(path, "x") as journal:
            return refine(problem, plain, Evaluations(models(scored), objective, journal, advance), recipe)

    whole = run(tmp_path / "whole")
    assert whole.tried > 1
    assert whole.passes <= recipe.refine_passes
    assert whole.measured["choice"] <= whole.measured["plain"]
    assert problem.fits(whole.solution.alternatives)
    assert whole.measured["rows"] == len(rows)
    with pytest.raises(_Stop):
        run(tmp_path / "interrupted", 2.0)
    assert run(tmp_path / "interrupted").to_dict() == whole.to_dict()
    assert read_refined(whole.to_dict()).to_dict() == whole.to_dict()
