"""The main job, from top to bottom: the stages in their order. Start reading here.

A stage that was done from the same inputs is skipped, and an interrupted one is resumed; see
:mod:`layersmith.run.folder`.
Every process of a launcher such as ``torchrun`` runs all of this. The first alone writes; the others help where
training is divided, and wait for it elsewhere (:mod:`layersmith.run.ranks`).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layersmith import schema
from layersmith.costs.budget import Budget
from layersmith.costs.counted import Workload
from layersmith.costs.table import CostTable, count_costs
from layersmith.costs.times import Times
from layersmith.data.splits import check_vocabulary, load_tokenizer, prepare
from layersmith.distillation.local import distill_chosen, distill_locally
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.evaluation.compare import compare, complete
from layersmith.execution.parent import Parent, load_parent
from layersmith.execution.streaming import is_too_large, load_streamed
from layersmith.heterogeneous.checkpoint import load
from layersmith.library.library import Library, Survey, build_library, survey
from layersmith.library.stored_weights import Kept
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import Recipe
from layersmith.report.card import complete_card, write_card
from layersmith.report.collect import collect
from layersmith.report.html import render
from layersmith.report.optional import read_optional
from layersmith.run import ranks
from layersmith.run.artifacts import fingerprint, read_json, write_json, write_tensors, write_text
from layersmith.run.folder import Run, versions
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import whole_models
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.regret import Axis
from layersmith.scoring.score import Journal, Score, losses
from layersmith.search import baselines
from layersmith.search.frontier import axes_of, frontier, to_dict
from layersmith.search.problem import Solution, Space
from layersmith.search.refine import Refined, read_refined, refine
from layersmith.stages.times import find_times, keep_times, reachable, solve, that_holds, time_child
from layersmith.units import format_count


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        run: its folder.
        child: the child's folder.
        solution: the solution, with the costs of parent and child.
        evaluation: the evaluation's table and rows, as in ``evaluation/evaluation.json``.
        report: the HTML page.
    """

    run: Path
    child: Path
    solution: Solution
    evaluation: dict[str, Any]
    report: Path

    def __str__(self) -> str:
        before, after = self.solution.parent_costs["parameters"], self.solution.costs["parameters"]
        loss, kl = self.metric("loss"), self.metric("kl_divergence")
        return (
            f"{format_count(before)} => {format_count(after)} parameters ({after / before:.2f}x), "
            f"loss {loss['parent']:.4f} => {loss['child']:.4f}, KL {kl['child']:.4f}; child: {self.child}"
        )

    def metric(self, name: str) -> dict[str, Any]:
        """One row of the evaluation's table, e.g. ``"loss"`` or ``"kl_divergence"``."""
        return next(row for row in self.evaluation["rows"] if row["metric"] == name)


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


# Runs solutions as whole models: for each its mean loss under the objective, and the standard error of that.
Measure = Callable[[Sequence[Solution]], list[dict[str, Any]]]
# Points of a frontier, and of each baseline, that are run as whole models where that is asked for.
MEASURED_POINTS = 10

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
        from layersmith.stages.distill import check_training, distill_child  # they stand on this module

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

        making = [schema.to_data(recipe.library), schema.to_data(recipe.local_distillation)]
        library_inputs = fingerprint([model.identity, data_inputs, *making, run_dtype(model)])
        library = make_library(run, library_inputs, model, recipe, found, tokens, progress)
        yield "library"

        def costs_by(known: Times | None) -> CostTable:
            return costs if known is None else known.into(costs, library.alternatives)

        axes = axes_of(library.alternatives, costs_by(times), budget)
        judging = [schema.to_data(recipe.scoring), [axis.cost for axis in axes]]
        score_inputs = fingerprint([library.identity, data_inputs, run_dtype(model), *judging])
        scores = make_scores(run, score_inputs, library, recipe, axes, tokens.scoring, progress)
        yield "scores"

        def space_of(known: Times | None) -> Space:
            return search_space(library, scores, recipe, costs_by(known), budget)

        space, solution, times = solve(run, score_inputs, library, recipe, times, space_of, progress)
        yield "settled"

        search_inputs = fingerprint([score_inputs, solution.to_dict(), schema.to_data(recipe.search)])
        run.do("frontier", search_inputs, lambda folder: write_frontier(folder, space, recipe, progress=progress))
        yield "frontier"

        solution = make_refined(run, search_inputs, space, solution, library, recipe, tokens.scoring, progress, times)
        yield "refine"

        solution_inputs = fingerprint([score_inputs, solution.to_dict()])
        run.do("solution", solution_inputs, lambda folder: write_solution(folder, solution, space.costs))
        yield "solution"

        library = teach_pairs(run, solution_inputs, library, solution, recipe, tokens.training, progress)
        yield "pairs"

        realize(run, solution_inputs, library, solution, tokenizer, recipe, progress)
        yield "child"

        evaluation = evaluate_child(run, solution_inputs, model, recipe, tokens.evaluation, tokenizer, progress)
        yield "evaluation"

        time_child(run, solution_inputs, model, budget, recipe, times, progress)
        yield "clock"
        result = finish(run, library, scores, solution, space.costs.by_key, evaluation, recipe)
        if recipe.distillation.tokens:
            distilled = distill_child(run, model, recipe, data, True, progress)
            yield "distilled"
            evaluation = distilled.after | {"samples": evaluation["samples"]}
            result = finish(run, library, scores, solution, space.costs.by_key, evaluation, recipe)
            result = dataclasses.replace(result, child=distilled.child)
        yield result


# ---------------------------------------------------------------------------------------------- stages


def examine(
    parent: str | Path,
    recipe: Recipe,
    budget: Budget,
    descriptor: type[ModelDescriptor] | None,
    progress: Progress = SILENT,
    near: Path | None = None,
) -> tuple[Parent, Survey, CostTable]:
    """Load the parent, find what can be changed in it, and make sure that the budget can be met at all."""
    seed_everything(recipe.seed)
    with progress.stage("describe", 1, "parent") as advance:
        model = open_parent(parent, recipe, near or Path.cwd(), descriptor)
        found = survey(model, recipe.library)
        costs = cost_table(model, found, budget)
        reachable(found.alternatives, costs, budget, recipe.search, model.blocks)
        advance(1)
    if model.stream is not None:
        progress.note("the parent's weights stay on the disk; a layer at a time is read.")
    for note in found.notes:
        progress.note(note)
    return model, found, costs


def open_parent(
    parent: str | Path, recipe: Recipe, near: Path, descriptor: type[ModelDescriptor] | None = None
) -> Parent:
    """Load a parent as a recipe says; what has to lie on the disk for it lies near a folder."""
    runtime = Runtime.detect(recipe.device, recipe.dtype)
    streams = recipe.stream == "always" or (recipe.stream == "auto" and is_too_large(parent, runtime))
    return load_parent(parent, runtime, descriptor, recipe.trust_remote_code, stream_near=near if streams else None)


def cost_table(model: Parent, found: Survey | Library, budget: Budget) -> CostTable:
    """Costs of all alternatives of a search space under the load that a budget names."""
    workload = Workload(budget.batch, budget.context)
    return count_costs(
        model.descriptor, model.config, model.blocks, found.alternatives, found.axes, model.dtype, workload
    )


def read_data(data: str | Path, recipe: Recipe, model: Parent, tokenizer: Any, progress: Progress) -> Any:
    """Token rows for calibration, scoring and evaluation."""
    longest = model.positions or recipe.data.sequence_length
    with progress.stage("data", 1, "source") as advance:
        rows = dataclasses.replace(recipe.data, sequence_length=min(recipe.data.sequence_length, longest))
        tokens = prepare(data, tokenizer, rows, recipe.seed)
        splits = (tokens.calibration, tokens.scoring, tokens.evaluation, tokens.training)
        largest = max(int(rows.max()) for rows in splits if len(rows))
        check_vocabulary(largest + 1, model.language_config.vocab_size)
        advance(1)
    for warning in tokens.description.get("warnings", ()):
        progress.note(warning)
    return tokens


def write_data(folder: Path, tokens: Any) -> None:
    rows = {name: getattr(tokens, name) for name in ("calibration", "scoring", "evaluation", "training")}
    write_tensors(folder / "tokens.safetensors", rows)
    write_json(folder / "data.json", tokens.description)


def make_library(
    run: Run, inputs: str, model: Parent, recipe: Recipe, found: Survey, tokens: Any, progress: Progress
) -> Library:
    """Prune, refit and train: the library, with what its alternatives have learned by themselves."""

    def prune() -> Library:
        return build_library(
            model,
            recipe.library,
            found,
            tokens.calibration,
            batch_sequences=recipe.scoring.rows_at_once(tokens.calibration.shape[1]),
            checkpoint=run.partial("library"),
            inputs=inputs,
            progress=progress,
        )

    def make() -> Library:
        work = run.work("library")
        if ranks.are_several():  # one prunes, and all train
            ranks.on_first(lambda: prune().write(work / "pruned"))
            pruned = Library.read(work / "pruned", model)
        else:
            pruned = prune()
        return distill_locally(
            pruned,
            tokens.calibration,
            tokens.training,
            recipe.local_distillation,
            seed=recipe.seed,
            work=work,
            inputs=inputs,
            progress=progress,
        )

    run.do("library", inputs, lambda folder: make().write(folder), make)
    return Library.read(run.folder / "library", model)


def teach_pairs(
    run: Run,
    inputs: str,
    library: Library,
    solution: Solution,
    recipe: Recipe,
    tokens: torch.Tensor,
    progress: Progress,
) -> Library:
    """Train what was chosen for each layer together."""

    def make() -> Kept:
        return distill_chosen(
            library,
            solution.alternatives,
            tokens,
            recipe.local_distillation,
            seed=recipe.seed,
            work=run.work("pairs"),
            inputs=inputs,
            progress=progress,
        ).pairs

    run.do("pairs", inputs, lambda folder: make().write(folder), make)
    return with_pairs(run, library)


def with_pairs(run: Run, library: Library) -> Library:
    """The library with what was trained together for the run's own solution, which other solutions may have in part."""
    return library.with_kept(library.kept, Kept.read(run.folder / "pairs"))


def make_scores(
    run: Run,
    inputs: str,
    library: Library,
    recipe: Recipe,
    axes: Sequence[Axis],
    tokens: torch.Tensor,
    progress: Progress,
) -> list[Score]:
    def make(folder: Path) -> None:
        scores = score_library(
            library,
            tokens,
            recipe.scoring,
            axes=axes,
            seed=recipe.seed,
            journal=run.partial("scores"),
            inputs=inputs,
            progress=progress,
        )
        write_json(folder / "scores.json", [s.to_dict() for s in scores])

    run.do("scores", inputs, make)
    return read_scores(run, library)


def read_scores(run: Run, library: Library) -> list[Score]:
    records = {record["of"]: record for record in read_json(run.folder / "scores" / "scores.json")}
    return [Score.from_dict(alternative, records[alternative.key]) for alternative in library.alternatives]


def search_space(library: Library, scores: list[Score], recipe: Recipe, costs: CostTable, budget: Budget) -> Space:
    """All solutions, as the recipe's objective and rules see them."""
    own = losses(scores, recipe.scoring.objective)
    return Space(library.alternatives, own, costs, budget, recipe.search, library.parent.blocks)


def write_frontier(
    folder: Path, space: Space, recipe: Recipe, measure: Measure | None = None, progress: Progress = SILENT
) -> None:
    """The frontier along the first cost that the budget limits, and what others would do.

    Args:
        folder: gets ``frontier.json``.
        space: of the solutions.
        recipe: how many points.
        measure: runs solutions as whole models; without it there are sums of scores only.
        progress: told of points.
    """
    cost = space.budget.limits[0].cost
    with progress.stage("frontier", recipe.search.frontier_points, "budgets") as advance:
        solutions = frontier(space, cost, recipe.search.frontier_points, advance)
    some = solutions[:: max(1, len(solutions) // MEASURED_POINTS)]
    budgets = [solution.costs[cost] for solution in some if solution.score > 0]
    others = baselines.all_of(space, cost, budgets, recipe.seed)
    if measure is not None:
        others = {name: own[:: max(1, -(-len(own) // MEASURED_POINTS))] for name, own in others.items()}
    wanted = [*some, *(solution for own in others.values() for solution in own)] if measure is not None else []
    measured = dict(zip((c.alternatives for c in wanted), measure(wanted) if measure else [], strict=True))
    data = to_dict(
        space, cost, recipe.scoring.objective, [(c, measured.get(c.alternatives)) for c in solutions],
        {name: [(c, measured.get(c.alternatives)) for c in own] for name, own in others.items()},
    )  # fmt: skip
    write_json(folder / "frontier.json", data)


def make_refined(
    run: Run,
    inputs: str,
    space: Space,
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
        refined = refined_solution(space, solution, library, recipe, tokens, run.partial("refine"), inputs, progress)
        taken = that_holds(solution, refined.solution, times, library.parent, recipe, progress)
        refined = dataclasses.replace(refined, solution=taken)
        write_json(folder / "refine.json", refined.to_dict())

    try:
        run.do("refine", inputs, make)
    except UnsupportedModel as reason:
        progress.note(f"not refined: {reason}")
        return solution
    return read_refined(read_json(run.folder / "refine" / "refine.json")).solution


def refined_solution(
    space: Space,
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
            space, solution, models, recipe.search, recipe.scoring.objective, kept, seed=recipe.seed, advance=advance
        )
    progress.note(str(refined))
    return refined


def write_solution(folder: Path, solution: Solution, costs: CostTable) -> None:
    write_json(folder / "solution.json", solution.to_dict())
    write_json(folder / "costs.json", costs.to_dict())


def realize(
    run: Run, inputs: str, library: Library, solution: Solution, tokenizer: Any, recipe: Recipe, progress: Progress
) -> None:
    """Write the child in the parent's dtype, and check that it is what the search counted."""

    def make(folder: Path) -> None:
        own = library.with_parent(at_stored_dtype(library.parent, recipe, run.folder))
        child = own.compose(solution.alternatives)
        counted = sum(parameter.numel() for parameter in child.parameters())
        if counted != solution.costs["parameters"]:
            raise RuntimeError(f"the child has {counted} parameters, the search counted {solution.costs['parameters']}")
        with quiet_transformers():
            child.save_pretrained(folder, **shards(library.parent))
            tokenizer.save_pretrained(folder)
        write_card(folder, run, library, solution, recipe)
        advance(1)

    with progress.stage("realize", 1, "child") as advance:
        run.do("child", inputs, make)


def shards(parent: Parent) -> dict[str, Any]:
    """How a child is cut into files: as usual, or so that few of its weights are in memory at once."""
    return {} if parent.stream is None else {"max_shard_size": "500MB"}


def at_stored_dtype(parent: Parent, recipe: Recipe, near: Path) -> Parent:
    """The parent in its checkpoint's dtype.

    From a wider dtype, in which it may be loaded, the way back is exact; otherwise it is read again.
    """
    if parent.runtime.dtype == parent.dtype:
        return parent
    runtime = Runtime(torch.device("cpu"), parent.dtype)
    stream_near = None if parent.stream is None else near
    return load_parent(parent.path, runtime, parent.descriptor, recipe.trust_remote_code, stream_near=stream_near)


def evaluate_child(
    run: Run,
    inputs: str,
    model: Parent,
    recipe: Recipe,
    tokens: torch.Tensor,
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Compare the child, as it lies on the disk, with its parent."""

    def make(folder: Path) -> None:
        child: Any
        if model.stream is None:
            child = load(run.folder / "child", dtype=model.runtime.dtype, device=model.runtime.device).eval()
        else:
            child, _, _ = load_streamed(run.folder / "child", model.runtime, model.descriptor, run.folder)
        comparison = compare(
            model.model, child, tokens, batch_sequences=recipe.scoring.rows_at_once(tokens.shape[1]), progress=progress
        )
        samples = []
        if recipe.completion_tokens and model.stream is None:  # each token would read all weights
            prompts = recipe.prompts or (tokenizer.decode(tokens[0][: min(48, len(tokens[0]) // 2)]),)
            for prompt in prompts:
                written = [complete(m, tokenizer, prompt, recipe.completion_tokens) for m in (model.model, child)]
                samples.append({"prompt": prompt, "parent": written[0], "child": written[1]})
        write_json(folder / "evaluation.json", comparison.to_dict() | {"samples": samples})

    run.do("evaluation", inputs, make)
    return read_json(run.folder / "evaluation" / "evaluation.json")


def finish(
    run: Run,
    library: Library,
    scores: list[Score],
    solution: Solution,
    costs: dict[str, dict[str, int]],
    evaluation: dict[str, Any],
    recipe: Recipe,
) -> Result:
    """Write the report, and what is known by now into the child's card."""

    def write() -> None:
        complete_card(run.folder / "child", run, library, solution, recipe, evaluation)
        report = collect(run.header(), library, scores, solution, costs, evaluation, recipe, read_optional(run))
        write_json(run.folder / "report.json", report)
        write_text(run.folder / "report.html", render(report))

    ranks.on_first(write)
    return Result(run.folder, run.folder / "child", solution, evaluation, run.folder / "report.html")


# ---------------------------------------------------------------------------------------------- shared


def run_dtype(model: Parent) -> str:
    return f"{model.runtime.dtype} on {model.runtime.device.type}"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
