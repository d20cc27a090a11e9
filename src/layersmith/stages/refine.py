"""Refine a solution by evaluating whole candidate children."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from layersmith.costs.times import Times
from layersmith.errors import UnsupportedModel
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.folder import Run
from layersmith.run.progress import Progress
from layersmith.scoring.children import whole_models
from layersmith.scoring.score import Journal
from layersmith.search.problem import SearchProblem, Solution
from layersmith.search.refine import Refined, read_refined, refine
from layersmith.stages.times import within_time


def make_refined(
    run: Run,
    inputs: str,
    problem: SearchProblem,
    solution: Solution,
    library: Library,
    recipe: Recipe,
    tokens: torch.Tensor,
    progress: Progress,
    times: Times | None = None,
) -> Solution:
    """The solution, bettered by running whole models; as it is where that is not wanted, or nothing was removed."""
    if not recipe.search.refine_passes or all(a.kind == "parent" for a in solution.alternatives):
        return solution

    def make(folder: Path) -> None:
        refined = refined_solution(problem, solution, library, recipe, tokens, run.partial("refine"), inputs, progress)
        taken = within_time(solution, refined.solution, times, library.parent, recipe.costs, progress)
        refined = dataclasses.replace(refined, solution=taken)
        write_json(folder / "refine.json", refined.to_dict())

    try:
        run.do("refine", inputs, make)
    except UnsupportedModel as reason:
        progress.note(f"not refined: {reason}")
        return solution
    return read_refined(read_json(run.folder / "refine" / "refine.json")).solution


def refined_solution(
    problem: SearchProblem,
    solution: Solution,
    library: Library,
    recipe: Recipe,
    tokens: torch.Tensor,
    journal: Path | None,
    inputs: str,
    progress: Progress,
) -> Refined:
    """Run children like the solution on the scoring rows and search on; see :mod:`layersmith.search.refine`."""
    folder = journal.parent if journal is not None else None
    with progress.stage("refine", recipe.search.refine_passes, "passes") as advance, Journal(journal, inputs) as kept:
        models = whole_models(library, tokens, recipe, progress, folder)
        refined = refine(
            problem, solution, models, recipe.search, recipe.scoring.objective, kept, seed=recipe.seed, advance=advance
        )
    progress.note(str(refined))
    return refined
