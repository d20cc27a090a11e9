"""Refine the solution by evaluating whole candidate children, and write down the one that is realized."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layersmith.costs.table import CostTable
from layersmith.errors import UnsupportedModel
from layersmith.library.library import Library
from layersmith.recipe import ScoringRecipe, SearchRecipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.journal import Recording
from layersmith.run.progress import SILENT
from layersmith.run.stage import Making, Stage
from layersmith.scoring.children import child_evaluator
from layersmith.search.problem import SearchProblem, shapes_of
from layersmith.search.refine import Evaluations, Refined, read_refined, refine
from layersmith.search.solution import Solution
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.job import REFINEMENT, Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES
from layersmith.stages.search import SEARCH, found_by_search, problem_of, read_solution, within_time

_FILE = "refine.json"


@dataclass(frozen=True, eq=False)
class RefineSetup:
    """What children are evaluated with during refinement.

    Attributes:
        library: The library.
        rows: ``[N, T]`` scoring rows.
        search, scoring: These sections of the recipe.
        seed: Seed of the random factors and exchanges.
    """

    library: Library
    rows: torch.Tensor
    search: SearchRecipe
    scoring: ScoringRecipe
    seed: int


def refined_solution(problem: SearchProblem, solution: Solution, setup: RefineSetup, recording: Recording) -> Refined:
    """Evaluate children near a solution on the scoring rows; see :mod:`layersmith.search.refine`.

    Number formats stay as the solution has them. Children are evaluated in the parent's data type.

    Raises:
        UnsupportedModel: Children of this parent cannot be evaluated.
    """
    progress = recording.progress
    with (
        progress.stage("refine", setup.search.refine_passes, "passes") as advance,
        recording.journal() as journal,
    ):
        models = child_evaluator(setup.library, setup.rows, setup.scoring, progress, recording.folder)
        evaluations = Evaluations(models, setup.scoring.objective, journal, advance)
        with models.crew.led():
            if all(a == a.shape for a in solution.alternatives):
                refined = refine(problem, solution, evaluations, setup.search, setup.seed)
            else:
                refined = _refined_shapes(problem, solution, evaluations, setup)
    progress.note(str(refined))
    return refined


def _refined_shapes(
    problem: SearchProblem, solution: Solution, evaluations: Evaluations, setup: RefineSetup
) -> Refined:
    """Refine the shapes of a solution with number formats."""
    of_shapes = shapes_of(problem, solution)
    shapes = of_shapes.of([a.shape for a in solution.alternatives])
    refined = refine(of_shapes, shapes, evaluations, setup.search, setup.seed)
    if refined.solution.alternatives == shapes.alternatives:
        return dataclasses.replace(refined, solution=solution, plain=solution)
    pairs = solution.with_formats(refined.solution.alternatives)
    return dataclasses.replace(refined, solution=problem.of(pairs, embeddings=solution.embeddings), plain=solution)


def setup_of(job: Job) -> RefineSetup:
    recipe = job.recipe
    return RefineSetup(job.read(LIBRARY), job.read(DATA).scoring, recipe.search, recipe.scoring, recipe.seed)


def _is_wanted(job: Job) -> bool:
    changed = any(not a.shape.is_parent for a in job.read(SEARCH).solution.alternatives)
    return bool(job.recipe.search.refine_passes) and changed


def _make(job: Job, making: Making) -> None:
    """Without ``refine.json`` in its folder the stage says that children of this parent cannot be evaluated."""
    plain = job.read(SEARCH)
    try:
        refined = refined_solution(problem_of(job), plain.solution, setup_of(job), making.recording)
    except UnsupportedModel as reason:
        making.progress.note(f"not refined: {reason}")
        return
    taken = within_time(plain.solution, refined.solution, plain.times, job.parent, job.recipe.costs, making.progress)
    write_json(making.folder / _FILE, dataclasses.replace(refined, solution=taken).to_dict())


def _help(job: Job, making: Making) -> None:
    """Evaluate children that the first process chooses."""
    setup = setup_of(job)
    with suppress(UnsupportedModel):  # which the first process says
        child_evaluator(setup.library, setup.rows, setup.scoring, SILENT, making.recording.folder).crew.follow()


def _read(job: Job, folder: Path) -> Solution | None:
    return read_refined(read_json(folder / _FILE)).solution if (folder / _FILE).is_file() else None


REFINE = Stage(
    name="refine",
    inputs=lambda job: [
        *found_by_search(job),
        digest_of_split(job, "scoring"),
        *(job.settings("search")[name] for name in REFINEMENT),
    ],
    make=_make,
    read=_read,
    is_wanted=_is_wanted,
    meanwhile=_help,
)


def _chosen(job: Job) -> Solution:
    refined = job.read(REFINE) if _is_wanted(job) else None
    return refined or job.read(SEARCH).solution


def _write_solution(job: Job, making: Making) -> None:
    write_json(making.folder / "solution.json", _chosen(job).to_dict())
    write_json(making.folder / "costs.json", problem_of(job).costs.to_dict())


def read_costs(folder: Path) -> dict[str, dict[str, int]]:
    """Costs by key of the alternative, as the solution was found with them."""
    costs: dict[str, dict[str, int]] = CostTable.from_dict(read_json(folder / "costs.json")).by_key
    return costs


def _solution_inputs(job: Job) -> Any:
    return [job.made_from(SCORES), _chosen(job).to_dict()]


SOLUTION: Stage[Job, Solution] = Stage(
    name="solution",
    inputs=_solution_inputs,
    make=_write_solution,
    read=read_solution,
)
