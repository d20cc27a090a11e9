"""Commands on a finished run: search another budget, compute its frontier, and write the report again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.errors import UnsupportedModel, UsageError, did_you_mean
from layersmith.heterogeneous.checkpoint import save
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import AUTOMATIC, Recipe, SearchRecipe
from layersmith.report.card import Child, model_card
from layersmith.run.artifacts import fingerprint, refuse_existing, whole_folder, write_json, write_text
from layersmith.run.cards import CARD
from layersmith.run.folder import ASKED_FRONTIER
from layersmith.run.journal import Recording
from layersmith.run.progress import SILENT, Callback, Progress, progress_of
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.metrics import METRICS, loss_of
from layersmith.scoring.score import standard_error
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution
from layersmith.stages.automatic_formats import reason_against
from layersmith.stages.costs import COSTS, find_costs
from layersmith.stages.data import DATA
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.distill import COMPARED
from layersmith.stages.evaluate import EVALUATION
from layersmith.stages.job import Job, job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD, composed, write_formats
from layersmith.stages.refine import SOLUTION, refined_solution, setup_of
from layersmith.stages.report import Result, write_report
from layersmith.stages.scores import SCORES
from layersmith.stages.search import (
    frontier_record,
    problem_as_measured,
    solve_in_time,
    stopwatch_for,
    within_time,
)
from layersmith.stages.training_rows import is_wanted
from layersmith.tables import Shown, Table

# Each solution takes a solver run, and rules out those before it.
_MOST_SOLUTIONS = 100


@dataclass(frozen=True)
class SearchRequest:
    """Another search in a finished run.

    Attributes:
        run_folder: Folder of the run.
        budget: Upper limits.
        objective: Metric to search by; default: the recipe's.
        rules: Rules on the solution besides the budget; default: the recipe's.
        descriptor: Descriptor of the parent's model family; default: inferred.
        verify: Hash all files of the run that are read, also large ones whose size and time of change are as before.
        trust_remote_code: Let Transformers run code from the parent's folder or hub page.
        times_on: Device, and server or None, that times are predicted for; default: the run's times.
        formats: Number formats of weights, of those of the run; default: all of those.
    """

    run_folder: str | Path
    budget: Budget
    objective: str | None = None
    rules: SearchRecipe | None = None
    descriptor: type[ModelDescriptor] | None = None
    verify: bool = False
    trust_remote_code: bool = False
    times_on: tuple[str, str | None] | None = None
    formats: Sequence[str] | None = None

    def open(self, progress: Progress) -> tuple[Job, SearchProblem]:
        """The run with these settings, and the search problem under them.

        Raises:
            UsageError: An unknown objective.
        """
        if self.objective is not None and self.objective not in METRICS:
            raise UsageError(f"--objective {self.objective}: unknown. {did_you_mean(self.objective, METRICS)}")
        job = job_of_run(
            self.run_folder, (DESCRIBE, COSTS, LIBRARY, SCORES), self.descriptor, progress, self._changed, self.verify,
            self.trust_remote_code,
        )  # fmt: skip
        job.limits, job.workload = self.budget.limits, self.budget.workload
        known = job.read(COSTS).times if self.times_on is None else None
        job.put(COSTS, find_costs(job, progress, known))
        return job, problem_as_measured(job)

    def _changed(self, recipe: Recipe) -> Recipe:
        objective: Any = self.objective or recipe.scoring.objective
        scoring = dataclasses.replace(recipe.scoring, objective=objective, mode="auto")
        costs = recipe.costs
        if self.times_on is not None:
            device, server = self.times_on
            costs = dataclasses.replace(costs, device=device, server=server, times=None)
        formats = recipe.formats if self.formats is None else tuple(self.formats)
        rules = self.rules or recipe.search
        changed = dataclasses.replace(recipe, scoring=scoring, costs=costs, search=rules, formats=formats)
        if AUTOMATIC in formats and reason_against(changed, self.budget.limits):
            return dataclasses.replace(changed, formats=())
        return changed


@dataclass(frozen=True, repr=False)
class Searched(Shown):
    """Solutions of a search, best first; ``solutions[0]`` is the child's.

    Attributes:
        solutions: The solutions.
        library: The run's alternatives, and its parent.
        child: Folder of the child, if one was written.
    """

    solutions: tuple[Solution, ...]
    library: Library
    child: Path | None = None

    def tables(self) -> list[Table]:
        """The tables of all solutions."""
        return [table for solution in self.solutions for table in solution.tables()]

    def __repr__(self) -> str:
        return f"Searched({list(self.solutions)}, child={self.child})"


def search(
    run: str | Path,
    budget: Budget | dict[str, Any] | str | float,
    *,
    objective: str | None = None,
    rules: SearchRecipe | None = None,
    out: str | Path | None = None,
    refine: bool | None = None,
    solutions: int = 1,
    min_distance: int = 1,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    times_on: tuple[str, str | None] | None = None,
    formats: Sequence[str] | None = None,
) -> Searched:
    """Find the best child for another budget from the scores of a finished run, in seconds.

    Args:
        run: Folder that ``compress`` made.
        budget: A fraction of the parent's parameters, or a mapping such as ``{"memory": "10GiB", "batch": 8}``.
        objective: Metric to minimise, e.g. ``"kl_divergence"`` (nats per token); default: the recipe's.
        rules: Rules on the solution besides the budget; default: the recipe's section ``search``.
        out: New folder for the child; default: none is written.
        refine: Improve the first solution by evaluating whole children; default: if a child is written.
        solutions: Number of solutions.
        min_distance: Least number of subblocks in which solutions differ.
        descriptor: Descriptor of the parent's model family; default: inferred.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends.
        verify: Hash all files of the run, also large ones whose size and time of change are as before.
        trust_remote_code: Let Transformers run code from the parent's folder or hub page.
        times_on: Device, and server or None, that times are predicted for; default: the run's times.
        formats: Number formats of weights, of those of the run; default: all of those.

    Raises:
        Infeasible: No child of the run's library fits.
        InputError: The run is not finished, or ``out`` exists.
        UsageError: An argument is wrong.
    """
    request = SearchRequest(
        run, Budget.parse(budget), objective, rules, descriptor, verify, trust_remote_code, times_on, formats
    )
    shown, how = progress_of(progress, callback), {"solutions": solutions, "min_distance": min_distance}
    library, best = search_several(request, out=out, refine=refine, progress=shown, **how)
    return Searched(tuple(best), library, None if out is None else Path(out))


def search_several(
    request: SearchRequest,
    *,
    out: str | Path | None = None,
    refine: bool | None = None,
    solutions: int = 1,
    min_distance: int = 1,
    progress: Progress = SILENT,
) -> tuple[Library, list[Solution]]:
    """The best solutions of a finished run for another budget; the first is written to ``out`` if that is given.

    A layer that is the same in the run's own solution is written with its jointly trained weights, any other with the
    weights that its alternatives learned by themselves.

    Args:
        request: The run and the new budget.
        out: Folder for the child.
        refine: Refine the first solution by evaluating whole children on the run's scoring rows; default: if a child is
            written and the recipe has passes for it.
        solutions: Number of solutions, best first; the first is the child.
        min_distance: Number of subblocks in which each differs from those before, at least.
        progress: Receives steps and notes.

    Raises:
        Infeasible: No child of the run's library fits.
        UsageError: An unknown objective.
    """
    if out is not None:
        refuse_existing(Path(out))
    if not 1 <= solutions <= _MOST_SOLUTIONS or min_distance < 1:
        raise UsageError(f"--solutions must be 1 to {_MOST_SOLUTIONS}, and --min-distance at least 1.")
    job, problem = request.open(progress)
    library, recipe, times = job.read(LIBRARY), job.recipe, job.read(COSTS).times
    stopwatch = stopwatch_for(times, job.parent, recipe.costs) if out is not None else None
    timed = None
    if times is not None and stopwatch is not None:
        timed = solve_in_time(problem, times, stopwatch, progress)
        problem = timed.problem
    best = problem.several(solutions, min_distance)
    if timed is not None:
        best[0] = timed.solution
    wants = out is not None if refine is None else refine
    passes = recipe.search.refine_passes or (SearchRecipe.refine_passes if refine else 0)
    if wants and passes and best[0].score > 0 and any(not a.shape.is_parent for a in best[0].alternatives):
        search = dataclasses.replace(recipe.search, refine_passes=passes)
        setup = dataclasses.replace(setup_of(job), search=search)
        try:
            refined = refined_solution(problem, best[0], setup, Recording(progress=progress))
        except UnsupportedModel as reason:
            if refine:
                raise
            progress.note(f"not refined: {reason}")
        else:
            corrected = None if timed is None else timed.times
            best[0] = within_time(best[0], refined.solution, corrected, job.parent, recipe.costs, progress)
    if out is not None:
        with job.run.locked():
            _write_child(job, best[0], Path(out), progress)
    return library, best


def _write_child(job: Job, solution: Solution, out: Path, progress: Progress) -> None:
    child = Child(job.run, job.read(LIBRARY), solution, job.recipe)

    def write_extra(folder: Path) -> None:
        write_formats(folder, model, rounded)
        write_text(folder / CARD, model_card(folder, child))

    with composed(job, solution, progress) as (model, rounded), progress.stage(CHILD.name, 1, "child") as advance:
        save(
            model,
            out,
            tokenizer=job.tokenizer,
            write_extra=write_extra,
        )
        advance(1)


def frontier_again(request: SearchRequest, *, measure: bool = False, progress: Progress = SILENT) -> Path:
    """The whole frontier of a finished run along the first cost of a budget, as ``asked-frontier/frontier.json`` in it.

    Args:
        request: The run and the new budget.
        measure: Also evaluate some of its children, and of the baselines', as whole models on the run's scoring rows.
        progress: Receives steps and notes.

    Raises:
        Infeasible: The other limits of the budget cannot be met.
    """
    job, problem = request.open(progress)
    recipe, library, objective = job.recipe, job.read(LIBRARY), job.recipe.scoring.objective

    def measured(solutions: Sequence[Solution]) -> list[dict[str, Any]]:
        rows = job.read(DATA).scoring
        models = child_evaluator(library, rows, recipe.scoring, progress, job.run.folder)
        parent = problem.of([a for a in library.alternatives if a.is_parent])
        wanted = [solution.alternatives for solution in (*solutions, parent)]
        with progress.stage("measure", len(rows), "sequences") as advance:
            metrics = models.run(wanted, range(len(rows)), advance)
        *by_child, by_parent = [[row[objective] for row in by_row] for by_row in metrics]
        whole = math.fsum(by_parent) / len(by_parent)
        return [
            {
                "mean": loss_of(objective, math.fsum(values) / len(values), whole),
                "error": standard_error(values),
            }
            for values in by_child
        ]

    run, points, evaluate = job.run, recipe.search.frontier_points, measured if measure else None
    with run.locked():
        with whole_folder(run.folder / ASKED_FRONTIER) as folder:
            record = frontier_record(problem, points, objective, recipe.seed, progress, evaluate)
            write_json(folder / "frontier.json", record)
        digest = fingerprint([request.budget.to_dict(), recipe.to_dict()])
        run.finished(ASKED_FRONTIER, digest, run.record_of(ASKED_FRONTIER))
    return run.folder / ASKED_FRONTIER / "frontier.json"


def report(
    run: str | Path,
    *,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Result:
    """Write the report of a finished run again.

    Args:
        run: Folder that ``compress`` made.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends.
        verify: Hash all files of the run, also large ones whose size and time of change are as before.
        trust_remote_code: Let Transformers run code from the folders of parent and child.

    Returns:
        The result that ``compress`` returned; its ``report`` is the page.

    Raises:
        InputError: The run is not finished, or a file of it is damaged.
    """
    needed = (DESCRIBE, DATA, LIBRARY, SCORES, SOLUTION, EVALUATION)
    shown = progress_of(progress, callback)
    job = job_of_run(run, needed, progress=shown, verify=verify, trust_remote_code=trust_remote_code)
    is_distilled = is_wanted(job) and job.made_from(COMPARED) is not None
    with job.run.locked():
        return write_report(job, is_distilled=is_distilled, again=True)
