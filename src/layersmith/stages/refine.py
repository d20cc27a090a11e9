"""Refine the solution by evaluating whole candidate children, and write down the one that is realized."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from layersmith.errors import UnsupportedModel
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.journal import Journal
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.scoring.children import child_evaluator
from layersmith.search.problem import SearchProblem
from layersmith.search.refine import Refined, read_refined, refine
from layersmith.search.solution import Solution
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES
from layersmith.stages.search import SEARCH, found_by_search, problem_of, read_solution, within_time

_FILE = "refine.json"


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
    """Evaluate children near a solution on the scoring rows; see :mod:`layersmith.search.refine`.

    Raises:
        UnsupportedModel: Children of this parent cannot be evaluated.
    """
    folder = journal.parent if journal is not None else None
    with progress.stage("refine", recipe.search.refine_passes, "passes") as advance, Journal(journal, inputs) as kept:
        models = child_evaluator(library, tokens, recipe.scoring, progress, folder)
        refined = refine(
            problem, solution, models, recipe.search, recipe.scoring.objective, kept, seed=recipe.seed, advance=advance
        )
    progress.note(str(refined))
    return refined


def _is_wanted(job: Job) -> bool:
    changed = any(not a.is_parent for a in job.read(SEARCH).solution.alternatives)
    return bool(job.recipe.search.refine_passes) and changed


def _make(job: Job, making: Making) -> None:
    """Without ``refine.json`` in its folder the stage says that children of this parent cannot be evaluated."""
    plain, library, tokens = job.read(SEARCH), job.read(LIBRARY), job.read(DATA).scoring
    try:
        refined = refined_solution(
            problem_of(job), plain.solution, library, job.recipe, tokens, making.unfinished, making.inputs,
            making.progress,
        )  # fmt: skip
    except UnsupportedModel as reason:
        making.progress.note(f"not refined: {reason}")
        return
    taken = within_time(plain.solution, refined.solution, plain.times, job.parent, job.recipe.costs, making.progress)
    write_json(making.folder / _FILE, dataclasses.replace(refined, solution=taken).to_dict())


def _read(job: Job, folder: Path) -> Solution | None:
    return read_refined(read_json(folder / _FILE)).solution if (folder / _FILE).is_file() else None


REFINE = Stage(
    name="refine",
    inputs=lambda job: [*found_by_search(job), digest_of_split(job, "scoring")],
    make=_make,
    read=_read,
    is_wanted=_is_wanted,
)


def _chosen(job: Job) -> Solution:
    refined = job.read(REFINE) if _is_wanted(job) else None
    return refined or job.read(SEARCH).solution


def _write_solution(job: Job, making: Making) -> None:
    write_json(making.folder / "solution.json", _chosen(job).to_dict())
    write_json(making.folder / "costs.json", problem_of(job).costs.to_dict())


def read_costs(folder: Path) -> dict[str, dict[str, int]]:
    """Costs by key of the alternative, as the solution was found with them."""
    costs: dict[str, dict[str, int]] = read_json(folder / "costs.json")["alternatives"]
    return costs


def _solution_inputs(job: Job) -> Any:
    return [job.made_from(SCORES), _chosen(job).to_dict()]


SOLUTION: Stage[Job, Solution] = Stage(
    name="solution",
    inputs=_solution_inputs,
    make=_write_solution,
    read=lambda job, folder: read_solution(folder),
)
