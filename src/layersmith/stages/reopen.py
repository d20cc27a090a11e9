"""What can be asked of a run, or of a model, after the main job: another budget, the report, an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layersmith.costs.budget import Budget
from layersmith.costs.times import Times
from layersmith.data.splits import evaluation_rows, load_tokenizer
from layersmith.errors import InputError, UnsupportedModel, UsageError, did_you_mean
from layersmith.evaluation.compare import compare
from layersmith.heterogeneous.checkpoint import load, save
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import DataRecipe, Recipe, ScoringRecipe, SearchRecipe
from layersmith.report.card import write_card
from layersmith.run.artifacts import read_json, read_tensors, whole_folder
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import whole_models
from layersmith.scoring.metrics import METRICS, loss_of
from layersmith.scoring.score import standard_error
from layersmith.search.problem import SearchProblem, Solution
from layersmith.search.time_limits import TimedSolution
from layersmith.stages.describe import at_stored_dtype, cost_table, open_parent
from layersmith.stages.library import with_pairs
from layersmith.stages.refine import refined_solution
from layersmith.stages.report import finish
from layersmith.stages.scores import read_scores
from layersmith.stages.search import search_problem, write_frontier
from layersmith.stages.times import find_times, solve_in_time, stopwatch_for, within_time


def reopen(run: Run, descriptor: type[ModelDescriptor] | None = None) -> tuple[Recipe, Library]:
    """The recipe and library of a finished run.

    Raises:
        InputError: the run is not finished, or its parent is gone or another one now.
    """
    header = run.header()
    recipe = Recipe.from_dict(header["recipe"], str(run.folder / "run.json"))
    for stage in ("library", "scores"):
        if stage not in header["stages"]:
            raise InputError(f"{run.folder}: its {stage} are not finished. Run the same compress command again.")
    parent = open_parent(run.meant(header["parent"]["path"]), recipe, run.folder, descriptor)
    if parent.identity != header["parent"]["identity"]:
        raise InputError(f"{parent.path}: not the parent of {run.folder} any more; its weights or config changed.")
    return recipe, Library.read(run.folder / "library", parent)


def search_again(
    run_folder: str | Path, budget: Budget, objective: str | None = None, out: str | Path | None = None, **more: Any
) -> tuple[Library, Solution]:
    """The best child of a finished run for another budget; see :func:`search_several`."""
    library, (solution, *_) = search_several(run_folder, budget, objective, out, **more)
    return library, solution


def search_several(
    run_folder: str | Path,
    budget: Budget,
    objective: str | None = None,
    out: str | Path | None = None,
    progress: Progress = SILENT,
    descriptor: type[ModelDescriptor] | None = None,
    rules: SearchRecipe | None = None,
    refine: bool | None = None,
    solutions: int = 1,
    min_distance: int = 1,
) -> tuple[Library, list[Solution]]:
    """The best children of a finished run for another budget; the first is written to ``out`` if that is given.

    Where the first has for a layer what the run's own solution has, it is written with what was trained there together,
    elsewhere with what its alternatives learned by themselves.

    Args:
        run_folder: the run.
        budget: upper limits.
        objective: metric to search by; default: the recipe's.
        out: the child's folder.
        progress: told where the work is.
        descriptor: of the family.
        rules: what a solution must satisfy beside the budget; default: the recipe's.
        refine: whether whole children are run on the run's scoring rows to better the solution; default: if a child is
            written and the recipe has passes for it.
        solutions: how many solutions, best first; the first is the child.
        min_distance: in how many subblocks each differs from those before, at least.

    Raises:
        Infeasible: no child of the run's library fits.
        UsageError: an unknown objective.
    """
    run = Run.existing(run_folder)
    if objective is not None and objective not in METRICS:
        raise UsageError(f"--objective {objective}: unknown. {did_you_mean(objective, METRICS)}")
    if out is not None and Path(out).exists():
        raise InputError(f"{out}: already there. Choose another folder.")
    if solutions < 1 or min_distance < 1:
        raise UsageError("--solutions and --min-distance must be at least 1.")
    recipe, library, problem, times = _problem(run, budget, objective, descriptor, rules, progress)
    stopwatch = stopwatch_for(times, library.parent, recipe.costs) if out is not None else None
    timed: TimedSolution | None = None
    if times is not None and stopwatch is not None:
        timed = solve_in_time(problem, times, stopwatch, progress)
        problem = timed.problem
    best = problem.several(solutions, min_distance)
    if timed is not None:
        best[0] = timed.solution
    passes = recipe.search.refine_passes
    if refine and not passes:
        passes = SearchRecipe.refine_passes
    wanted = (out is not None if refine is None else refine) and passes and best[0].score > 0
    if wanted:
        recipe = dataclasses.replace(recipe, search=dataclasses.replace(recipe.search, refine_passes=passes))
        rows, known = scoring_rows(run), timed.times if timed is not None else None
        try:
            refined = refined_solution(problem, best[0], library, recipe, rows, None, "", progress)
        except UnsupportedModel as reason:
            if refine:
                raise
            progress.note(f"not refined: {reason}")
        else:
            best[0] = within_time(best[0], refined.solution, known, library.parent, recipe.costs, progress)
    if out is not None:
        with progress.stage("realize", 1, "child") as advance:
            taught = with_pairs(run, library)
            own = taught.with_parent(at_stored_dtype(library.parent, recipe, run.folder))
            save(
                own.compose(best[0].alternatives),
                out,
                tokenizer=load_tokenizer(library.parent.path),
                more=lambda folder: write_card(folder, run, library, best[0], recipe),
            )
            advance(1)
    return library, best


def frontier_again(
    run_folder: str | Path,
    budget: Budget,
    objective: str | None = None,
    progress: Progress = SILENT,
    descriptor: type[ModelDescriptor] | None = None,
    rules: SearchRecipe | None = None,
    measure: bool = False,
) -> Path:
    """The whole frontier of a finished run along the first cost of a budget, as ``frontier/frontier.json`` in it.

    Args:
        measure: also run some of its children, and baselines, as whole models on the run's scoring rows.
        run_folder, budget, objective, progress, descriptor, rules: see :func:`search_again`.

    Raises:
        Infeasible: the other limits of the budget cannot be met.
    """
    run = Run.existing(run_folder)
    recipe, library, problem, _ = _problem(run, budget, objective, descriptor, rules, progress)

    def measured(solutions: Sequence[Solution]) -> list[dict[str, Any]]:
        rows = scoring_rows(run)
        models = whole_models(library, rows, recipe, progress, run.folder)
        everything = [*solutions, problem.of([a for a in library.alternatives if a.kind == "parent"])]
        with progress.stage("measure", len(rows), "sequences") as advance:
            found = models.run([c.alternatives for c in everything], range(len(rows)), advance)
        *own_rows, parent = [[values[recipe.scoring.objective] for values in own] for own in found]
        whole = math.fsum(parent) / len(parent)
        return [
            {
                "mean": loss_of(recipe.scoring.objective, math.fsum(own) / len(own), whole),
                "error": standard_error(own),
            }
            for own in own_rows
        ]

    with whole_folder(run.folder / "frontier") as folder:
        write_frontier(folder, problem, recipe, measured if measure else None, progress)
    return run.folder / "frontier" / "frontier.json"


def scoring_rows(run: Run) -> torch.Tensor:
    """``[N, T]``, the rows on which the alternatives of a run were scored."""
    return read_tensors(run.folder / "data" / "tokens.safetensors")["scoring"]


def _problem(
    run: Run,
    budget: Budget,
    objective: str | None,
    descriptor: type[ModelDescriptor] | None,
    rules: SearchRecipe | None,
    progress: Progress,
) -> tuple[Recipe, Library, SearchProblem, Times | None]:
    recipe, library = reopen(run, descriptor)
    chosen: Any = objective or recipe.scoring.objective
    scoring = dataclasses.replace(recipe.scoring, objective=chosen, mode="auto")
    recipe = dataclasses.replace(recipe, scoring=scoring, search=rules or recipe.search)
    costs = cost_table(library.parent, library, budget)
    times = find_times(run, library.parent, library, costs, budget, recipe, progress)
    if times is not None:
        costs = times.into(costs, library.alternatives)
    problem = search_problem(library, read_scores(run, library), recipe, costs, budget)
    return recipe, library, problem, times


def report_again(run_folder: str | Path) -> Path:
    """Write a finished run's report anew."""
    run = Run.existing(run_folder)
    recipe, library = reopen(run)
    for stage, file in (("solution", "solution.json"), ("evaluation", "evaluation.json")):
        if not (run.folder / stage / file).is_file():
            raise InputError(f"{run.folder}: its {stage} is not finished. Run the same compress command again.")
    solution = Solution.from_dict(read_json(run.folder / "solution" / "solution.json"))
    evaluation = read_json(run.folder / "evaluation" / "evaluation.json")
    scores = read_scores(run, library)
    costs = read_json(run.folder / "solution" / "costs.json")["alternatives"]
    return finish(run, library, scores, solution, costs, evaluation, recipe).report


def evaluate_model(
    model: str | Path,
    data: str | Path,
    parent: str | Path | None = None,
    sequences: int = DataRecipe.evaluation_sequences,
    sequence_length: int = DataRecipe.sequence_length,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Loss and perplexity of a model, and its agreement with a parent, on text.

    Raises:
        UsageError: sizes that are not positive.
    """
    if sequences < 1 or sequence_length < 2:
        raise UsageError("--sequences must be at least 1 and --sequence-length at least 2.")
    runtime = Runtime.detect(device, "auto")
    loaded = load(model, dtype=runtime.dtype, device=runtime.device).eval()
    reference = load(parent, dtype=runtime.dtype, device=runtime.device).eval() if parent is not None else loaded
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or sequence_length
    length = min(sequence_length, longest)
    wanted = DataRecipe(sequence_length=length, evaluation_sequences=sequences)
    rows = evaluation_rows(data, load_tokenizer(model), wanted, seed)
    batch = max(1, ScoringRecipe.batch_tokens // rows.shape[1])
    return compare(reference, loaded, rows, batch_sequences=batch, progress=progress).to_dict()
