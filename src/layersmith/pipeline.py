"""The main job, from top to bottom: the list of stages and one loop. Start reading here.

A stage that was made from the same inputs is skipped, and an interrupted one is resumed; see
:mod:`layersmith.run.folder`. Every process of a launcher such as ``torchrun`` runs all of this. The first alone writes;
the others help where work is divided, and wait for it elsewhere (:mod:`layersmith.run.ranks`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.data.in_memory import Text, source_of
from layersmith.errors import Infeasible
from layersmith.evaluation.tasks import require_tasks
from layersmith.heterogeneous.in_memory import Model, checkpoint_of
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import HiddenSizeRecipe, Recipe
from layersmith.run import ranks
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Callback, Progress, progress_of
from layersmith.run.stage import Stage
from layersmith.run.store import Store
from layersmith.run.timeline import Timeline
from layersmith.stages import long_context
from layersmith.stages.automatic_formats import with_formats, without_impossible
from layersmith.stages.costs import COSTS
from layersmith.stages.data import DATA, digest_of_source
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.distill import COMPARED, DISTILLATION, remove_checkpoints
from layersmith.stages.evaluate import CLOCK, EVALUATION
from layersmith.stages.formats import FORMATS
from layersmith.stages.hidden_size import HIDDEN_SIZE, NARROWED, hidden_sizes_of
from layersmith.stages.job import Job, ask_together, seed_everything
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD, PAIRS
from layersmith.stages.refine import REFINE, SOLUTION
from layersmith.stages.report import Result, write_report
from layersmith.stages.rounds import place_of, rounds_of
from layersmith.stages.scores import SCORES
from layersmith.stages.search import FRONTIER, SEARCH
from layersmith.stages.statistics import STATISTICS
from layersmith.stages.tasks import check_kept
from layersmith.stages.time_plan import choose_effort, choose_late_effort, planned_work
from layersmith.stages.training_rows import check, is_wanted

# Stages that find out whether the request can be met. A new run that is refused here leaves no folder behind.
PREPARATION: tuple[Stage[Job, Any], ...] = (
    HIDDEN_SIZE, # what every hidden size would cost
    DESCRIBE,    # what can be changed in each layer of the parent
    DATA,        # token rows
    COSTS,       # parameters, bytes and times of every alternative
)  # fmt: skip
WORK: tuple[Stage[Job, Any], ...] = (
    STATISTICS,  # importance of channels, heads and experts
    LIBRARY,     # alternatives, refitted and trained
    SCORES,      # loss increase of every alternative
    FORMATS,     # loss increase of every number format
    SEARCH,      # the best solution by scores
    FRONTIER,    # the best solution for every other budget
    REFINE,      # a better one, by evaluating whole children
    SOLUTION,    # the one that is realized
    PAIRS,       # its alternatives, trained together layer by layer
    CHILD,       # the checkpoint
    EVALUATION,  # its quality
    CLOCK,       # its speed
)  # fmt: skip
# Of a run with other hidden sizes: what makes their parents, and what tells the cost of each.
PARENTS: tuple[Stage[Job, Any], ...] = (DATA, NARROWED)
BY_SCORES = (*PREPARATION, *WORK[: WORK.index(SEARCH) + 1])
STAGES = (*PREPARATION, *WORK, *DISTILLATION)


def compress(
    parent: Model,
    out: str | Path,
    *,
    data: Text,
    budget: Budget | dict[str, Any] | str | float,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Result:
    """Make a smaller model of a parent for a budget. Call it again with the same arguments to resume it.

    Args:
        parent: Checkpoint folder, hub id or GGUF file; or a ``PreTrainedModel``, or a pair of one and its tokenizer,
            which is written to the user's cache first. Quantized weights are dequantized first.
        out: Folder of the run; the child is ``out/child``. Runs next to each other share what they have in common.
        data: Text, JSONL or Parquet file, a folder of them, or the name of a hub dataset; or a ``datasets.Dataset`` or
            a list of strings, which is written to the user's cache first.
        budget: A fraction of the parent's parameters, or a mapping such as ``{"memory": "10GiB", "batch": 8}``.
        recipe: A :class:`~layersmith.recipe.Recipe`, a mapping, or a YAML file; default: the defaults.
        descriptor: Descriptor of the parent's model family; default: ``layersmith.describe(parent)``.
        progress: Whether to show progress; or a :class:`~layersmith.run.progress.Progress` that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends. If it
            raises an exception, the run is interrupted and can be resumed.
        verify: Hash all files of the run, also large ones whose size and time of change are as before.
        trust_remote_code: Let Transformers run code from the parent's folder or hub page. No recipe can allow it.

    Returns:
        The folders of run and child, the solution, and the evaluation; notebooks show it as tables.

    Raises:
        UsageError: An argument or a setting is wrong.
        InputError: Parent or data are missing or damaged, or the folder has another run.
        Infeasible: No child can meet the budget.
    """
    shown = progress_of(progress, callback)
    *_, result = stages(parent, out, data, budget, recipe, descriptor, shown, verify, trust_remote_code)
    assert isinstance(result, Result)
    return result


def stages(
    parent: Model,
    out: str | Path,
    data: Text,
    budget: Budget | dict[str, Any] | str | float,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[str | Result]:
    """:func:`compress` as a generator: yields the name of each stage when it is done, and the result last.

    Names of stages of rounds before the last begin with the round, as in ``rounds/1/scores``.

    Stop iterating to interrupt the run. Calling again with the same arguments resumes it.
    """
    folder, asked = Path(out), Budget.parse(budget)
    whole = Job(
        run=Run(folder, Store.near(folder), verify),
        source=checkpoint_of(parent),
        data=source_of(data),
        limits=asked.limits,
        workload=asked.workload,
        recipe=Recipe.read(recipe),
        family=descriptor,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    seed_everything(whole.recipe.seed)
    ranks.start(whole.runtime)
    with ranks.watched():
        ranks.on_first(lambda: Run.check(folder))
        require_tasks(whole.recipe.evaluation.tasks)
        long_context.require_tokens(whole.recipe.distillation)
        _ = whole.path  # a parent in another format is converted by all processes together
        whole.recipe = ranks.from_first(lambda: with_formats(whole))
        for job in rounds_of(whole):
            ask_together(job)
            for part, is_part in hidden_sizes_of(job):
                ask_together(part)
                for step in _run_part(part) if is_part else _run(part):
                    if isinstance(step, str):
                        yield place_of(part, folder) + step
                    elif part.run.folder == folder:
                        yield step


def _run_part(job: Job) -> Iterator[str]:
    """The stages that tell what a hidden size would cost, or those that make narrow parents."""
    makes_parents, job.progress.timeline = job.recipe.hidden_size != HiddenSizeRecipe(), None
    header = ranks.from_first(lambda: job.header(digest_of_source(job)))
    with ranks.first(lambda: job.run.open(header, job.recipe)), suppress(Infeasible), job.run.removed_if_refused():
        for stage in PARENTS if makes_parents else BY_SCORES:
            if stage is COSTS:
                job.recipe = ranks.from_first(lambda: without_impossible(job))
            job.do(stage)
            yield stage.name


def _run(job: Job) -> Iterator[str | Result]:
    """All stages of a job; most runs have one job."""
    started, job.progress.timeline = time.monotonic(), None
    asked_recipe, job.recipe = job.recipe, ranks.from_first(lambda: choose_effort(job, started))
    _show_where(job)
    planning = time.monotonic() - started
    header = ranks.from_first(lambda: job.header(digest_of_source(job)))
    with ranks.first(lambda: job.run.open(header, job.recipe)):
        with job.run.removed_if_refused():
            for stage in PREPARATION:
                if stage is COSTS:
                    job.recipe = ranks.from_first(lambda: without_impossible(job))
                job.do(stage)
                yield stage.name
            if is_wanted(job):
                ranks.together(partial(check, job))
        for stage in WORK:
            if stage in (REFINE, PAIRS):
                job.recipe = ranks.from_first(partial(choose_late_effort, job, asked_recipe, planning, stage.name))
            if stage in (STATISTICS, REFINE, PAIRS):
                _show_where(job)
            job.do(stage)
            yield stage.name
        if is_wanted(job):
            if job.made_from(COMPARED) is None:  # to be read while the child is distilled
                write_report(job, is_distilled=False)
            for stage in DISTILLATION:
                job.do(stage)
                yield stage.name
            ranks.on_first(lambda: remove_checkpoints(job))
        result = write_report(job, is_distilled=is_wanted(job))
        check_kept(job, result.evaluation["rows"])
        yield result


def _show_where(job: Job) -> None:
    """Let the progress show the number of each stage and, once the costs are known, the time that is left."""
    progress = job.progress
    if progress is SILENT:
        return
    if progress.timeline is None:
        wanted = STAGES if is_wanted(job) else (*PREPARATION, *WORK)
        progress.timeline = Timeline([stage.name for stage in wanted], {"tasks": (EVALUATION.name, 2)})
    else:
        progress.timeline.planned = planned_work(job)
