"""What a run does about time: find times of alternatives, make sure that a solution holds, time parent and child."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.costs.clock import device_name
from layersmith.costs.counted import Workload
from layersmith.costs.measured import measure
from layersmith.costs.roofline import predict
from layersmith.costs.stopwatch import Stopwatch, time_models
from layersmith.costs.table import CostTable, count_costs
from layersmith.costs.times import Times, costs_of, from_csv, kept_in, to_csv
from layersmith.errors import Infeasible, InputError
from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import load
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library, Survey, survey
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import CostsRecipe, Recipe
from layersmith.records import to_data
from layersmith.run import ranks
from layersmith.run.artifacts import file_digest, fingerprint, read_json, write_json, write_text
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress
from layersmith.search.problem import SearchProblem, Solution
from layersmith.search.rules import without_times
from layersmith.search.time_limits import TOLERANCE, TimedSolution, overrun_of, solve_within
from layersmith.stages.describe import open_parent, reachable


def find_times(
    run: Run,
    model: Parent,
    found: Survey | Library,
    costs: CostTable,
    budget: Budget,
    recipe: Recipe,
    progress: Progress,
) -> Times | None:
    """Times of all alternatives, if the budget or a rule asks for any: those of the run, of a file, of a device, or
    measured now.

    Raises:
        Infeasible: the budget cannot be met by them.
    """
    if not budget.has_times and without_times(recipe.search) == recipe.search:
        return None
    workload = Workload(budget.batch, budget.context, budget.generate).within(model.positions)
    if workload.context < budget.context:
        progress.note(f"times are for {workload.context:,} tokens, all that the model knows, not {budget.context:,}.")
    kept = run.folder / "costs" / "times.json"
    inputs = times_inputs(model, budget, recipe)
    if kept.is_file() and (run.folder / "run.json").is_file() and run.is_done("costs", inputs):
        times = Times.from_dict(read_json(kept))
    else:

        def possible(least: Times) -> None:
            """Refuse what a model of no-ops is twice as slow as allowed for; nothing that is hardly off."""

            def check(own: Times) -> None:
                reachable(found.alternatives, own.into(costs, found.alternatives), budget, recipe.search, model.blocks)

            try:
                check(dataclasses.replace(least, fixed=least.fixed.scaled(0.5, 0.5)))
            except Infeasible:
                check(least)
                raise

        times = _found(model, found, costs, workload, recipe, progress, possible)
    reachable(found.alternatives, times.into(costs, found.alternatives), budget, recipe.search, model.blocks)
    return times


def _found(
    model: Parent,
    found: Survey | Library,
    costs: CostTable,
    workload: Workload,
    recipe: Recipe,
    progress: Progress,
    possible: Callable[[Times], None] = lambda least: None,
) -> Times:
    """Times from where the recipe says."""
    if recipe.costs.times is not None:
        return from_csv(recipe.costs.times, found.alternatives, workload)
    if recipe.costs.device is not None:
        counted = count_costs(
            model.descriptor, model.config, model.blocks, found.alternatives, found.axes, model.dtype, workload
        )
        return predict(
            recipe.costs.device, model.language_config, model.blocks, found.axes, found.alternatives, counted,
            model.dtype, workload,
        )  # fmt: skip
    return measure(model, found.alternatives, costs, workload, recipe.costs, progress, possible)


def times_of(
    parent: str | Path,
    recipe: Recipe,
    workload: Workload,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
) -> tuple[Times, list[Alternative]]:
    """Times of all alternatives of a parent, without a run."""
    with progress.stage("describe", 1, "parent") as advance:
        model = open_parent(parent, recipe, Path.cwd(), descriptor)
        found = survey(model, recipe.library)
        advance(1)
    own = workload.within(model.positions)
    costs = count_costs(model.descriptor, model.config, model.blocks, found.alternatives, found.axes, model.dtype, own)
    return _found(model, found, costs, own, recipe, progress), found.alternatives


def times_inputs(model: Parent, budget: Budget, recipe: Recipe) -> str:
    """Digest of what the times of a run depend on.

    Raises:
        InputError: the file with times cannot be read.
    """
    given = None
    if recipe.costs.times is not None:
        try:
            given = file_digest(Path(recipe.costs.times))
        except OSError as error:
            raise InputError(f"{recipe.costs.times}: cannot be read ({error.strerror}).") from error
    load = [budget.batch, budget.context, budget.generate]
    library = to_data(recipe.library)
    runs_on = [str(model.runtime.dtype), model.runtime.device.type]
    return fingerprint([model.identity, load, library, to_data(recipe.costs), given, runs_on])


def keep_times(run: Run, times: Times, model: Parent, found: Survey, budget: Budget, recipe: Recipe) -> None:
    """The stage ``costs``."""
    run.do("costs", times_inputs(model, budget, recipe), lambda folder: write_times(folder, times, found.alternatives))


def kept_times(run: Run) -> Times | None:
    """The times of a run as they were known last; None where its budget has no limit of time."""
    data = kept_in(run.folder)
    return None if data is None else Times.from_dict(data)


def write_times(folder: Path, times: Times, alternatives: Sequence[Alternative]) -> None:
    write_json(folder / "times.json", times.to_dict(alternatives))
    write_text(folder / "times.csv", to_csv(times, alternatives))


def solve(
    run: Run,
    inputs: str,
    problem: SearchProblem,
    times: Times | None,
    parent: Parent,
    recipe: Recipe,
    progress: Progress,
) -> tuple[SearchProblem, Solution, Times | None]:
    """The best solution; where times were measured here, one that is within its limits when timed as a whole child.

    Args:
        run: Gets the stage ``settled``.
        inputs: Digest of all that the problem depends on except times.
        problem: The search problem, with the times among its costs.
        times: Times of all alternatives; None if the budget has no limit of time.
        parent: The parent.
        recipe: Recipe of the run.
        progress: Shows the work.
    """
    stopwatch = stopwatch_for(times, parent, recipe.costs)
    if times is None or stopwatch is None:
        return problem, ranks.from_first(problem.best), times

    def make(folder: Path) -> None:
        timed = solve_in_time(problem, times, stopwatch, progress)
        write_times(folder, timed.times, problem.alternatives)
        write_json(folder / "choice.json", timed.solution.to_dict())

    run.do("settled", fingerprint([inputs, times.to_dict(problem.alternatives), to_data(recipe.search)]), make)
    corrected = Times.from_dict(read_json(run.folder / "settled" / "times.json"))
    solution = Solution.from_dict(read_json(run.folder / "settled" / "choice.json"))
    return problem.with_times(corrected), solution, corrected


def stopwatch_for(times: Times | None, parent: Parent, recipe: CostsRecipe) -> Stopwatch | None:
    """What times whole children; None where times were not measured here, or the parent is not in memory."""
    if times is None or times.source != "measured" or parent.stream is not None:
        return None
    return Stopwatch(parent, times.workload, recipe)


def solve_in_time(problem: SearchProblem, times: Times, stopwatch: Stopwatch, progress: Progress) -> TimedSolution:
    """:func:`~layersmith.search.time_limits.solve_within`, with progress, and a note if no child is in time."""
    with progress.stage("settle", 1, "child") as advance:
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


def time_child(
    run: Run,
    inputs: str,
    model: Parent,
    budget: Budget,
    recipe: Recipe,
    times: Times | None,
    progress: Progress,
) -> None:
    """The stage ``clock``: parent and child, as it lies on the disk, against the clock.

    Nothing is measured where times are those of another machine, or the parent is not in memory.
    """

    def make(folder: Path) -> None:
        child: Any = load(run.folder / "child", dtype=model.runtime.dtype, device=model.runtime.device).eval()
        with foreign_code("do parent and child generate?", refusal_is_answer=True) as attempt:
            measured = time_models([model.model, child], workload, recipe.costs, model.language_config.vocab_size)
        if attempt.failed:
            progress.note(f"parent and child are not timed: they do not generate here ({attempt.reason}).")
            return
        before, after = (costs_of(measurement.time, workload) for measurement in measured)
        how = {"batch": workload.batch, "prompt": workload.prompt, "generated": workload.generated}
        noise = {
            name: {"error": dataclasses.asdict(m.error), "spread": dataclasses.asdict(m.spread), "busy": m.busy}
            for name, m in zip(("parent", "child"), measured, strict=True)
        }
        data = {"parent": before, "child": after, **how, "device": device_name(model.runtime), "noise": noise}
        if any(m.busy for m in measured):
            widest = max(max(m.spread.prefill, m.spread.decode) for m in measured)
            progress.note(
                f"the machine was busy while parent and child were timed: repeats of one time differ by {widest:.0%}. "
                "Do not read a speed-up from these times; time them again on a quiet machine."
            )
        write_json(folder / "times.json", data)

    here = (times is None or times.source == "measured") and model.stream is None
    if not here or not (budget.has_times or recipe.costs.time_child):
        return
    workload = Workload(budget.batch, budget.context, budget.generate).within(model.positions)
    if not budget.has_times:  # nobody waits for it, so it has to be quick
        workload = workload.within(recipe.data.sequence_length)
    with progress.stage("clock", 1, "pair") as advance:
        run.do("clock", fingerprint([inputs, to_data(recipe.costs), dataclasses.asdict(workload)]), make)
        advance(1)
