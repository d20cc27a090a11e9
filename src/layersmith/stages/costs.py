"""Costs of every alternative: counted, and measured where the budget limits a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layersmith.block_config import BlockConfig
from layersmith.costs.aiconfigurator import predict_served
from layersmith.costs.budget import Limit, Limits, Workload
from layersmith.costs.counted import ModelShape, context_note
from layersmith.costs.measured import measure
from layersmith.costs.roofline import device_of, predict
from layersmith.costs.stopwatch import Stopwatch
from layersmith.costs.table import CostTable, count_costs
from layersmith.costs.times import PREFILL, Times, from_csv, to_csv
from layersmith.distillation.quantize import layerwise_of
from layersmith.errors import Infeasible, InputError, UnsupportedModel, UsageError
from layersmith.execution.parent import Parent, load_parent
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.library.alternative import Alternative
from layersmith.library.formats import embeddings_key, in_formats, kv_key
from layersmith.library.library import Library
from layersmith.library.survey import Survey, survey
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import CostsRecipe, Recipe, SearchRecipe
from layersmith.run.artifacts import read_json, write_json, write_text
from layersmith.run.digests import content_digest
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.run.stage import Making, Stage
from layersmith.search.problem import SearchProblem
from layersmith.search.rules import without_times
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.inspect import outline
from layersmith.stages.job import REFINEMENT, Job, is_streamed

_COUNTED, _TIMES = "costs.json", "times.json"


@dataclass(frozen=True)
class Costs:
    """Costs of a search space.

    Attributes:
        counted: Parameters and bytes.
        times: Times of all alternatives; None if neither a limit nor a rule asks for any.
    """

    counted: CostTable
    times: Times | None

    def table(self, alternatives: Sequence[Alternative], corrected: Times | None = None) -> CostTable:
        """All costs, with the times as they were measured or as they were corrected later."""
        times = corrected or self.times
        return self.counted if times is None else times.into(self.counted, alternatives)


def shape_of(parent: Parent, survey: Survey | Library) -> ModelShape:
    return ModelShape(parent.descriptor, parent.config, parent.blocks, survey.axes, parent.dtype)


def cost_table(
    parent: Parent,
    survey: Survey | Library,
    workload: Workload,
    formats: Sequence[str] = (),
    kv_formats: Sequence[str] = (),
) -> CostTable:
    """Count the costs of all alternatives of a parent, also in formats."""
    return count_costs(shape_of(parent, survey), survey.alternatives, workload, formats, kv_formats)


def check_reachable(
    alternatives: Sequence[Alternative],
    costs: CostTable,
    limits: Limits,
    rules: SearchRecipe,
    blocks: Sequence[BlockConfig],
) -> None:
    """Check that some child meets the limits; limits of time only if the costs have times.

    Raises:
        Infeasible: None does.
    """
    if PREFILL not in costs.parent:
        rules = without_times(rules)
        limits = limits.counted or Limits((Limit("parameters", fraction="1"),))
    keys = [*costs.by_key, *map(embeddings_key, costs.outside)]
    SearchProblem(alternatives, dict.fromkeys(keys, 0.0), costs, limits, rules, blocks).reachable()


def wants_times(limits: Limits, rules: SearchRecipe) -> bool:
    """Whether a limit or a rule is about time."""
    return limits.has_times or without_times(rules) != rules


def find_times(
    parent: Parent,
    survey: Survey,
    recipe: CostsRecipe,
    workload: Workload,
    progress: Progress,
    check: Callable[[Times], None] = lambda fastest: None,
) -> Times:
    """Times of all alternatives: from a file, predicted for a device, or measured here.

    Args:
        parent: The parent.
        survey: All alternatives.
        recipe: The recipe's section ``costs``.
        workload: Workload to time.
        progress: Receives steps and notes.
        check: Called with a quick lower bound before the long work, to refuse a budget that no child can meet.
    """
    within = workload.within(parent.positions)
    if recipe.times is not None:
        return from_csv(recipe.times, survey.alternatives, within)
    if recipe.device is not None:
        return predicted_times(parent, survey, recipe, within, progress)
    costs = cost_table(parent, survey, within)
    return measure(Stopwatch(parent, within, recipe), survey.alternatives, costs, progress, check)


def predicted_times(
    parent: Parent,
    survey: Survey,
    recipe: CostsRecipe,
    workload: Workload,
    progress: Progress,
    formats: Sequence[Sequence[str]] = ((), ()),
) -> Times:
    """Times of all alternatives on the recipe's device, also in number formats of weights and of the KV cache."""
    device, shape = str(recipe.device), shape_of(parent, survey)
    alternatives = [*survey.alternatives, *in_formats(survey.alternatives, *formats)]
    if recipe.server is None:
        return predict(device, shape, alternatives, cost_table(parent, survey, workload, *formats), workload)
    with progress.stage("times", 1, "device") as advance:
        times = predict_served(device, recipe.server, shape, alternatives, workload)
        advance(1)
    return times


def times_of(
    path: str | Path,
    recipe: Recipe,
    workload: Workload,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
    trust_remote_code: bool = False,
) -> tuple[Times, list[Alternative]]:
    """Times of all alternatives of a parent, without a run."""
    runtime = Runtime.detect(recipe.device, recipe.dtype)
    path = ordinary_checkpoint(path, recipe.checkpoint_dtype, trust_remote_code, progress)
    near = Path.cwd() if is_streamed(path, recipe, runtime) else None
    with progress.stage(DESCRIBE.name, 1, "parent") as advance:
        parent = load_parent(path, runtime, descriptor, trust_remote_code, stream_near=near)
        surveyed = survey(parent, recipe.library)
        advance(1)
    times = find_times(parent, surveyed, recipe.costs, workload, progress)
    for note in context_note(workload.context, times.workload):
        progress.note(note)
    return times, surveyed.alternatives


def costs_of_first(job: Job) -> dict[str, int]:
    """Counted costs of the first parent, which all rounds' budgets and results refer to."""
    recipe = job.recipe
    source = job.source if job.first is None else job.first
    space = outline(source, recipe.library, job.workload, job.family, job.trust_remote_code, recipe.checkpoint_dtype)
    return space.costs.parent


def find_costs(job: Job, progress: Progress, known: Times | None = None) -> Costs:
    """Count, measure if a limit or rule is about time, and check that the limits can be met.

    Args:
        job: The job.
        progress: Receives steps and notes.
        known: Times that are not measured again if they are for the same workload.

    Raises:
        Infeasible: They cannot.
    """
    parent, surveyed, rules, source = job.parent, job.read(DESCRIBE), job.recipe.search, job.recipe.costs
    if source.device is not None and source.server is None:
        device_of(source.device)  # raises
    if source.times is not None and not Path(source.times).is_file():
        raise InputError(f"recipe costs.times: {source.times}: no such file.")
    formats, kv_formats = job.formats, job.kv_formats
    is_predicted = source.device is not None and source.times is None
    if (formats or kv_formats) and wants_times(job.limits, rules) and not is_predicted:
        raise UsageError(
            f"formats {', '.join([*formats, *kv_formats])}: their times cannot be measured here, as PyTorch computes "
            "with unpacked weights. Set costs.device to predict them, or leave out the formats or the limit on a time."
        )
    counted = cost_table(parent, surveyed, job.workload, formats, kv_formats)
    if job.first is not None:
        counted = dataclasses.replace(counted, parent=costs_of_first(job))
    for note in context_note(job.workload.context, counted.workload):
        progress.note(note)
    _check_caches(parent, surveyed, smaller_caches(surveyed.alternatives, counted, kv_formats))

    def check(times: Times | None) -> None:
        table = Costs(counted, times).table(surveyed.alternatives)
        alternatives = [*surveyed.alternatives, *in_formats(surveyed.alternatives, formats, kv_formats)]
        check_reachable(alternatives, table, job.limits, rules, parent.blocks)

    def check_fastest(fastest: Times) -> None:
        """Refuse early if even a child of no-ops takes twice what is allowed; near misses are measured in full."""
        try:
            check(dataclasses.replace(fastest, fixed=fastest.fixed.scaled(0.5, 0.5)))
        except Infeasible:
            check(fastest)
            raise

    check(None)
    if not wants_times(job.limits, rules):
        return Costs(counted, None)
    times = known
    if times is None or times.workload != job.workload.within(parent.positions):
        if is_predicted:
            within = job.workload.within(parent.positions)
            times = predicted_times(parent, surveyed, source, within, progress, (formats, kv_formats))
        else:
            times = find_times(parent, surveyed, source, job.workload, progress, check_fastest)
    check(times)
    return Costs(counted, times)


def smaller_caches(
    alternatives: Sequence[Alternative], costs: CostTable, kv_formats: Sequence[str]
) -> list[Alternative]:
    """The parent's attentions with keys and values in each of some formats that makes the KV cache smaller."""
    pairs, by_key = in_formats([a for a in alternatives if a.is_parent], (), kv_formats), costs.by_key
    return [a for a in pairs if by_key[a.key]["kv_cache_bytes"] < by_key[a.shape.key]["kv_cache_bytes"]]


@torch.no_grad()
def _check_caches(parent: Parent, survey: Survey, caches: Sequence[Alternative]) -> None:
    """Raises: UnsupportedModel: Rounding the keys and values of a layer does not change what it returns."""
    if not caches:
        return
    library = Library(parent, survey.axes, survey.alternatives, {}, {}, [])
    layerwise = layerwise_of(parent, library)
    batch = layerwise.start(torch.arange(3, 19, device=parent.runtime.device)[None] % layerwise.vocab_size)
    hidden = layerwise.hidden_states(batch)
    for a in caches:
        if torch.equal(layerwise.run(batch, a.layer, hidden[a.layer], library.layer(a)), hidden[a.layer + 1]):
            raise UnsupportedModel(
                f"layer {a.layer}: what its attention keeps of keys and values cannot be rounded. Leave kv_formats out."
            )


def _inputs(job: Job) -> Any:
    given = job.recipe.costs.times
    file = None if given is None else content_digest(Path(given))
    sections = [job.settings("costs"), job.settings("search", without=REFINEMENT)]
    sections += [*job.formats, *map(kv_key, job.kv_formats)]
    return [job.made_from(DESCRIBE), job.limits.to_data(), dataclasses.asdict(job.workload), *sections, file, job.dtype]


def _make(job: Job, making: Making) -> None:
    surveyed = job.read(DESCRIBE)
    costs = find_costs(job, making.progress)
    write_json(making.folder / _COUNTED, costs.counted.to_dict())
    if costs.times is not None:
        write_times(making.folder, costs.times, surveyed.alternatives)


def write_times(folder: Path, times: Times, alternatives: Sequence[Alternative]) -> None:
    write_json(folder / _TIMES, times.to_dict(alternatives))
    write_text(folder / "times.csv", to_csv(times, alternatives))


def read_times(folder: Path) -> Times | None:
    file = folder / _TIMES
    return Times.from_dict(read_json(file)) if file.is_file() else None


def _read(job: Job, folder: Path) -> Costs:
    data = read_json(folder / _COUNTED)
    return Costs(CostTable.from_dict(data), read_times(folder))


COSTS = Stage(
    name="costs",
    inputs=_inputs,
    make=_make,
    read=_read,
)
