"""Search: the best solution for the budget, the frontier of all budgets, and the solution that is realized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Limit, Limits
from layersmith.costs.stopwatch import Stopwatch
from layersmith.costs.table import CostTable
from layersmith.costs.times import Times
from layersmith.errors import InputError, some_of
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative
from layersmith.library.formats import EMBEDDINGS, embeddings_key
from layersmith.library.library import Library
from layersmith.recipe import CostsRecipe, Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.scoring.formats import FormatScores, foretold
from layersmith.scoring.score import Score, losses
from layersmith.search import baselines
from layersmith.search.frontier import frontier, to_dict
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution
from layersmith.search.time_limits import TOLERANCE, TimedSolution, overrun_of, solve_within
from layersmith.stages.costs import COSTS, read_times, write_times
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.formats import FORMATS, scores_of_formats
from layersmith.stages.job import REFINEMENT, Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES
from layersmith.stages.tasks import smallest_that_keeps, task_inputs

_FILE = "solution.json"

# Evaluates solutions as whole models: for each its mean loss under the objective, and the standard error of that.
Measure = Callable[[Sequence[Solution]], list[dict[str, Any]]]
# Points of a frontier, and of each baseline, that are evaluated as whole models where that is asked for.
MEASURED_POINTS = 10


def search_problem(
    library: Library,
    scores: list[Score],
    recipe: Recipe,
    costs: CostTable,
    limits: Limits,
    of_formats: FormatScores | None = None,
) -> SearchProblem:
    """The search problem under the recipe's objective and constraints; with formats if there are scores of some."""
    loss_by_key = losses(scores, recipe.scoring.objective)
    pairs = foretold(library.alternatives, loss_by_key, of_formats or {})
    loss_by_key |= {a.key: loss for a, loss in pairs.items()}
    outside = {name: of_format[EMBEDDINGS] for name, of_format in (of_formats or {}).items() if EMBEDDINGS in of_format}
    loss_by_key |= {embeddings_key(name): math.fsum(rows) / len(rows) for name, rows in outside.items()}
    costs = dataclasses.replace(costs, outside={name: costs.outside[name] for name in outside})
    alternatives = [*library.alternatives, *pairs]
    return SearchProblem(alternatives, loss_by_key, costs, limits, recipe.search, library.parent.blocks)


def problem_as_measured(job: Job) -> SearchProblem:
    """The search problem of a job, with times as they were measured."""
    library = job.read(LIBRARY)
    costs = job.read(COSTS).table(library.alternatives)
    return search_problem(library, job.read(SCORES), job.recipe, costs, job.limits, scores_of_formats(job))


def problem_of(job: Job) -> SearchProblem:
    """The search problem of a job, with times as they are known after the search."""

    def make() -> SearchProblem:
        found, problem = job.read(SEARCH), problem_as_measured(job)
        if job.recipe.evaluation.keep:
            problem = problem.within(found.solution.asked)
        return problem if found.times is None else problem.with_times(found.times)

    return job.once("problem", make)


# ---------------------------------------------------------------------------------------------- limits of time


@dataclass(frozen=True)
class Found:
    """What the search stage made.

    Attributes:
        solution: The best by scores that fits.
        times: Times as they were corrected by timing whole children; None if no child was timed.
    """

    solution: Solution
    times: Times | None


def stopwatch_for(times: Times | None, parent: Parent, recipe: CostsRecipe) -> Stopwatch | None:
    """What times whole children; None where times were not measured here, or the parent is not in memory."""
    if times is None or times.source != "measured" or parent.stream is not None:
        return None
    return Stopwatch(parent, times.workload, recipe)


def solve_in_time(problem: SearchProblem, times: Times, stopwatch: Stopwatch, progress: Progress) -> TimedSolution:
    """:func:`~layersmith.search.time_limits.solve_within`, with progress, and a note if no child is in time."""
    with progress.stage("time limits", 1, "child") as advance:
        timed = solve_within(problem, times, stopwatch)
        advance(1)
    if timed.overrun > TOLERANCE:
        progress.note(
            f"timed as a whole, the child exceeds its time limit by {timed.overrun:.1%}; no other solution that was "
            "timed is within it."
        )
    return timed


def within_time(
    plain: Solution, refined: Solution, times: Times | None, parent: Parent, recipe: CostsRecipe, progress: Progress
) -> Solution:
    """The refined solution, unless it exceeds a time limit when timed as a whole child; then the plain one."""
    stopwatch = stopwatch_for(times, parent, recipe)
    if times is None or stopwatch is None or refined.alternatives == plain.alternatives:
        return refined
    overrun = overrun_of(refined, times, stopwatch)
    if overrun <= TOLERANCE:
        return refined
    progress.note(f"the refined child exceeds its time limit by {overrun:.1%}; the unrefined solution is taken.")
    return plain


# ---------------------------------------------------------------------------------------------- stages


def _inputs(job: Job) -> Any:
    times = job.read(COSTS).times
    measured = None if times is None else times.to_dict(job.read(DESCRIBE).alternatives)
    keep = job.recipe.evaluation.keep
    kept = [*task_inputs(job), keep] if keep and _allows_parent(problem_as_measured(job)) else []
    made = [job.made_from(stage) for stage in ((SCORES, COSTS, FORMATS) if FORMATS.is_wanted(job) else (SCORES, COSTS))]
    return [*made, measured, job.settings("search", without=REFINEMENT), *kept]


def _allows_parent(problem: SearchProblem) -> bool:
    """Whether no limit says how small the child must be."""
    return problem.fits([a for a in problem.alternatives if a.is_parent])


def _make(job: Job, making: Making) -> None:
    times, problem = job.read(COSTS).times, problem_as_measured(job)
    stopwatch = stopwatch_for(times, job.parent, job.recipe.costs)
    if times is None or stopwatch is None:
        solution = problem.best()
    else:
        timed = solve_in_time(problem, times, stopwatch, making.progress)
        write_times(making.folder, timed.times, problem.alternatives)
        solution = timed.solution
    if job.recipe.evaluation.keep and _allows_parent(problem):
        solution = _limited_to_its_size(smallest_that_keeps(job, problem, making.progress))
    write_json(making.folder / _FILE, solution.to_dict())


def _limited_to_its_size(solution: Solution) -> Solution:
    """A solution whose size is now the budget."""
    size = solution.costs["parameters"]
    asked = Limits((Limit.of("parameters", size),))
    return dataclasses.replace(solution, limits={"parameters": size}, asked=asked)


def read_solution(job: Job, folder: Path) -> Solution:
    """Raises: InputError: The file is damaged, or of a model with more layers."""
    solution, num_layers = Solution.from_dict(read_json(folder / _FILE)), len(job.read(DESCRIBE).axes)
    if unknown := [a.key for a in solution.alternatives if a.layer >= num_layers]:
        raise InputError(f"{folder / _FILE}: {some_of(unknown)}, but the parent has {num_layers} layers.")
    return solution


SEARCH: Stage[Job, Found] = Stage(
    name="search",
    inputs=_inputs,
    make=_make,
    read=lambda job, folder: Found(read_solution(job, folder), read_times(folder)),
)


def found_by_search(job: Job) -> Any:
    """Inputs of the stages that go on from the search: with limits of time it differs between equal runs."""
    return [job.made_from(SEARCH), job.read(SEARCH).solution.to_dict()]


def frontier_record(
    problem: SearchProblem,
    num_points: int,
    objective: str,
    seed: int,
    progress: Progress,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """The frontier along the first cost that the budget limits, and baselines for comparison.

    Args:
        problem: The search problem to solve.
        num_points: Number of budgets.
        objective: Metric of the scores.
        seed: Seed of the random baseline.
        progress: Receives points.
        measure: Evaluates solutions as whole models; default: sums of scores only.

    Returns:
        The content of ``frontier.json``.
    """
    cost = problem.asked.each[0].cost
    with progress.stage("frontier", num_points, "budgets") as advance:
        solutions = frontier(problem, cost, num_points, advance)
    some = solutions[:: max(1, len(solutions) // MEASURED_POINTS)]
    budgets = [solution.costs[cost] for solution in some if solution.score > 0]
    others = baselines.all_of(problem, cost, budgets, seed)
    measured: dict[tuple[Alternative, ...], dict[str, Any]] = {}
    if measure is not None:
        others = {name: points[:: max(1, -(-len(points) // MEASURED_POINTS))] for name, points in others.items()}
        wanted = [*some, *(solution for points in others.values() for solution in points)]
        measured = dict(zip((solution.alternatives for solution in wanted), measure(wanted), strict=True))
    series: dict[str, Sequence[tuple[Solution, dict[str, Any] | None]]] = {
        name: [(s, measured.get(s.alternatives)) for s in points] for name, points in others.items()
    }
    points = [(s, measured.get(s.alternatives)) for s in solutions]
    return to_dict(problem, cost, objective, points, series)


def _write_frontier(job: Job, making: Making) -> None:
    recipe, problem = job.recipe, problem_of(job)
    points, objective = recipe.search.frontier_points, recipe.scoring.objective
    record = frontier_record(problem, points, objective, recipe.seed, making.progress)
    write_json(making.folder / "frontier.json", record)


FRONTIER: Stage[Job, dict[str, Any]] = Stage(
    name="frontier",
    inputs=found_by_search,
    make=_write_frontier,
    read=lambda job, folder: dict(read_json(folder / "frontier.json")),
)
