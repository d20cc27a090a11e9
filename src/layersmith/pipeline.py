"""The main job, from top to bottom: the stages in their order. Start reading here.

A stage that was done from the same inputs is skipped, and an interrupted one is resumed; see
:mod:`layersmith.run.folder`.
Every process of a launcher such as ``torchrun`` runs all of this. The first alone writes; the others help where
training is divided, and wait for it elsewhere (:mod:`layersmith.run.ranks`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.data.splits import load_tokenizer
from layersmith.errors import UsageError
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import Recipe
from layersmith.records import to_data
from layersmith.run import ranks
from layersmith.run.artifacts import fingerprint
from layersmith.run.folder import Run, versions
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.search.frontier import axes_of
from layersmith.stages.data import read_data, write_data
from layersmith.stages.describe import examine, run_dtype
from layersmith.stages.distill import check_training, distill_child
from layersmith.stages.evaluate import evaluate_child
from layersmith.stages.library import make_library, teach_pairs
from layersmith.stages.realize import realize
from layersmith.stages.refine import make_refined
from layersmith.stages.report import Result, finish
from layersmith.stages.scores import make_scores
from layersmith.stages.search import search_problem, write_frontier, write_solution
from layersmith.stages.times import find_times, keep_times, solve, time_child


def compress(
    parent: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    budget: Budget | dict[str, Any] | str | float,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Make a smaller model of a parent, for a budget: the main job.

    Args:
        parent: checkpoint folder or hub id.
        out: the run's folder; the child is ``out/child``. An interrupted run is gone on with.
        data: text, JSONL or Parquet file, a folder of them, or a hub dataset's name.
        budget: a fraction of the parent's parameters, or a mapping such as ``{"memory": "10GiB", "batch": 8}``.
        recipe: a :class:`~layersmith.recipe.Recipe`, a mapping, or a YAML file; default: the defaults.
        descriptor: of the family; default: ``layersmith.describe(parent)``.
        progress: told where the run is.

    Raises:
        LayersmithError: whatever the user can mend, before work starts where that is possible.
    """
    *_, result = stages(parent, out, data, budget, recipe, descriptor, progress)
    assert isinstance(result, Result)
    return result


# The stages, by the names of their folders, in their order.
STAGES = (
    "costs", "data", "library", "scores", "settled", "frontier", "refine", "solution", "pairs", "child", "evaluation",
    "clock",
)  # fmt: skip


def stages(
    parent: str | Path,
    out: str | Path,
    data: str | Path,
    budget: Budget | dict[str, Any] | str | float,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
) -> Iterator[str | Result]:
    """:func:`compress`, one stage after another: yields the name of each when it is done, and the result last.

    Whoever stops asking stops the run; the same arguments go on with it later.
    """
    recipe, budget, run = Recipe.read(recipe), Budget.parse(budget), Run(Path(out))
    ranks.start(Runtime.detect(recipe.device, recipe.dtype))
    ranks.on_first(lambda: Run.check(run.folder))
    started = time.monotonic()
    model, found, costs = examine(parent, recipe, budget, descriptor, progress, run.folder)
    if recipe.distillation.tokens and model.stream is not None:
        raise UsageError(
            f"{parent}: larger than the memory, so it cannot be distilled here. Set distillation.tokens to 0, or "
            "stream to never in the recipe."
        )
    tokenizer = load_tokenizer(parent, trust_remote_code=recipe.trust_remote_code)
    tokens = ranks.from_first(lambda: read_data(data, recipe, model, tokenizer, progress))
    if recipe.distillation.tokens:
        check_training(model, recipe, tokens.description["sequence_length"], run.folder)
    times = ranks.from_first(lambda: find_times(run, model, found, costs, budget, recipe, progress))

    header = {
        "parent": {"path": str(parent), "identity": model.identity, "descriptor": model.descriptor.__name__},
        "data": tokens.description,
        "budget": budget.to_dict(),
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "versions": versions(),
        "working_directory": str(Path.cwd()),
    }
    with ranks.first(lambda: run.open(header, recipe)):
        ranks.on_first(lambda: run.log_once("describe", time.monotonic() - started))
        if times is not None:
            keep_times(run, times, model, found, budget, recipe)
        yield "costs"

        data_inputs = fingerprint(tokens.description["sha256"])
        run.do("data", data_inputs, lambda folder: write_data(folder, tokens))
        yield "data"

        making = [to_data(recipe.library), to_data(recipe.local_distillation)]
        library_inputs = fingerprint([model.identity, data_inputs, *making, run_dtype(model)])
        library = make_library(run, library_inputs, model, recipe, found, tokens, progress)
        yield "library"

        costs = costs if times is None else times.into(costs, library.alternatives)
        axes = axes_of(library.alternatives, costs, budget)
        judging = [to_data(recipe.scoring), [axis.cost for axis in axes]]
        score_inputs = fingerprint([library.identity, data_inputs, run_dtype(model), *judging])
        scores = make_scores(run, score_inputs, library, recipe, axes, tokens.scoring, progress)
        yield "scores"

        problem = search_problem(library, scores, recipe, costs, budget)
        problem, solution, times = solve(run, score_inputs, problem, times, library.parent, recipe, progress)
        yield "settled"

        search_inputs = fingerprint([score_inputs, solution.to_dict(), to_data(recipe.search)])
        run.do("frontier", search_inputs, lambda folder: write_frontier(folder, problem, recipe, progress=progress))
        yield "frontier"

        solution = make_refined(run, search_inputs, problem, solution, library, recipe, tokens.scoring, progress, times)
        yield "refine"

        solution_inputs = fingerprint([score_inputs, solution.to_dict()])
        run.do("solution", solution_inputs, lambda folder: write_solution(folder, solution, problem.costs))
        yield "solution"

        library = teach_pairs(run, solution_inputs, library, solution, recipe, tokens.training, progress)
        yield "pairs"

        realize(run, solution_inputs, library, solution, tokenizer, recipe, progress)
        yield "child"

        evaluation = evaluate_child(run, solution_inputs, model, recipe, tokens.evaluation, tokenizer, progress)
        yield "evaluation"

        time_child(run, solution_inputs, model, budget, recipe, times, progress)
        yield "clock"
        result = finish(run, library, scores, solution, problem.costs.by_key, evaluation, recipe)
        if recipe.distillation.tokens:
            distilled = distill_child(run, model, recipe, data, True, progress)
            yield "distilled"
            evaluation = distilled.after | {"samples": evaluation["samples"]}
            result = finish(run, library, scores, solution, problem.costs.by_key, evaluation, recipe)
            result = dataclasses.replace(result, child=distilled.child)
        yield result
