"""``--dry-run``: what a run will do and take, and whether the budget can be met, from the config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.costs.counted import COSTS, ModelShape
from layersmith.costs.table import count_costs
from layersmith.data.read import read_documents
from layersmith.evaluation.task_size import tokens_of_tasks
from layersmith.heterogeneous.weight_files import check_files
from layersmith.library.formats import in_formats
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import Recipe
from layersmith.run.folder import Run
from layersmith.stages import long_context
from layersmith.stages.arithmetic import ranking_seconds
from layersmith.stages.automatic_formats import automatic_formats
from layersmith.stages.costs import check_reachable
from layersmith.stages.effort import TOP
from layersmith.stages.inspect import Outline, outline
from layersmith.stages.job import formats_of, kv_formats_of
from layersmith.stages.placement import Asked, Placement, place
from layersmith.stages.rounds import check_rounds, limits_of_round, of_round
from layersmith.stages.time_plan import TimePlan, forward_rate, plan_time
from layersmith.units import format_cost, format_seconds, format_whole_seconds


@dataclass(frozen=True)
class Reach:
    """A cost of the parent, and the least that a child can have."""

    parent: int
    smallest: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and take; printed, it is the text of ``--dry-run``.

    Attributes:
        parent, budget, data, out: As they were given.
        costs: Name of a cost to the range that children can reach.
        layers: Number of the parent's layers.
        alternatives: Number of alternatives of each kind.
        sequence_length: Tokens in a row of data; the three numbers of sequences count rows.
        device, dtype: Where and in what the run computes.
        within, level: Time that was asked for, and level of work; None if neither was.
        rounds: Budget of each round; one for a run without rounds.
        operations: Floating-point operations of each stage, in all rounds.
        operations_per_second: Rate of the parent's forward pass here, as measured.
        seconds: Time of each stage.
        tasks_not_estimated: Whether the time of tasks comes on top.
        parent_bytes: Memory for the parent's weights.
        statistics_gib: Most memory for statistics, in GiB.
        disk_bytes: Most disk space for the child.
        notes: What cannot be changed, and why.
        placement: What each of several processes takes, if it was asked for; ``seconds`` are then with all of them.
    """

    parent: str
    budget: str
    costs: dict[str, Reach]
    layers: int
    alternatives: dict[str, int]
    data: str
    sequence_length: int
    calibration_sequences: int
    scoring_sequences: int
    evaluation_sequences: int
    device: str
    dtype: str
    within: str | None
    level: float | None
    rounds: list[str]
    operations: dict[str, float]
    operations_per_second: float
    seconds: dict[str, float]
    tasks_not_estimated: bool
    parent_bytes: int
    statistics_gib: float
    disk_bytes: int
    out: str
    notes: list[str]
    placement: Placement | None = None

    def __str__(self) -> str:
        asked = "" if self.within is None else f", for a time of {self.within}"
        lines = [
            f"parent: {self.parent}, {format_cost('parameters', self.costs['parameters'].parent)} parameters",
            f"budget: {self.budget}",
            "can be reached:",
            *(
                f"  {name.replace('_', ' ')}: {format_cost(name, r.parent)} down to {format_cost(name, r.smallest)}"
                f" ({r.smallest / r.parent:.2f}x)"
                for name, r in self.costs.items()
            ),
            f"library: {sum(self.alternatives.values())} alternatives in {self.layers} layers ("
            + ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in self.alternatives.items())
            + ")",
            f"data: {self.data}, rows of {self.sequence_length} tokens: {self.calibration_sequences} calibration, "
            f"{self.scoring_sequences} scoring, {self.evaluation_sequences} evaluation",
            *([] if len(self.rounds) == 1 else [f"rounds: {len(self.rounds)}, each counted as if of the first parent"]),
            *(f"  round {n}: {limits}" for n, limits in enumerate(self.rounds, 1) if len(self.rounds) > 1),
            *([] if self.level is None else [f"level of work: {self.level:g} of {TOP}{asked}"]),
            f"estimated time: {format_seconds(round(sum(self.seconds.values())))} on this {self.device}, at "
            f"{self.operations_per_second / 1e9:,.1f} GFLOP/s in the parent's forward pass",
            *(
                (self._line(stage, seconds) for stage, seconds in self.seconds.items())
                if self.placement is None
                else self.placement.lines()
            ),
            *(["  tasks: not estimated"] if self.tasks_not_estimated else ()),
            f"memory: {format_cost('weight_bytes', self.parent_bytes)} for the parent's weights in {self.dtype}, "
            f"up to {self.statistics_gib:g} GiB for statistics",
            f"disk: at most {format_cost('weight_bytes', self.disk_bytes)} for the child in {self.out}",
            *(f"note: {note}" for note in self.notes),
            "nothing was written.",
        ]
        return "\n".join(lines)

    def _line(self, stage: str, seconds: float) -> str:
        count = f"{self.operations[stage] / 1e12:.2f} TFLOP, " if stage in self.operations else ""
        return f"  {stage}: {count}{format_whole_seconds(seconds)}"


def plan(
    parent: str | Path,
    out: str | Path,
    data: str | Path,
    recipe: Recipe,
    budget: Budget,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
    asked: Asked = Asked(),
) -> Plan:
    """What ``--dry-run`` prints; ``asked`` are processes and a device that need not be here.

    Raises:
        LayersmithError: What would stop the run before its work starts.
    """
    Run.check(Path(out))
    check_files(parent)
    next(iter(read_documents(data, field=recipe.data.field, split=recipe.data.split)), None)
    runtime = (machine := asked.machine(recipe)).runtime
    space = outline(parent, recipe.library, budget.workload, descriptor, trust_remote_code, recipe.checkpoint_dtype)
    long_context.require_tokens(recipe.distillation)
    notes = list(space.notes)
    recipe = automatic_formats(recipe, budget.limits, space, notes.append)
    priced = _in_formats(space, formats_of(recipe), kv_formats_of(recipe), budget)
    check_reachable(priced.alternatives, priced.costs, budget.limits, recipe.search, space.blocks)
    check_rounds(budget.limits, recipe)
    timed = plan_time(space, recipe, machine.rate or forward_rate(space, recipe, runtime), budget.limits.has_times)
    recipe, every, whole = timed.recipe, range(1, recipe.rounds.count), space.costs.parent
    operations, seconds = _of_all_rounds(space, timed)
    rankings = recipe.rounds.count * ranking_seconds(space, timed.rate)
    placement = place(space, recipe, machine, operations, seconds, rankings) if asked.is_any else None
    if placement is not None:
        seconds = {stage: share.seconds for stage, share in placement.stages.items()}
    return Plan(
        parent=str(parent),
        budget=str(budget.limits),
        costs={name: Reach(whole[name], _smallest(priced, name)) for name in COSTS if whole[name]},
        layers=len(space.axes),
        alternatives=dict(Counter(a.kind for a in space.alternatives if not a.is_parent)),
        data=str(data),
        sequence_length=recipe.data.sequence_length,
        calibration_sequences=recipe.data.calibration_sequences,
        scoring_sequences=recipe.data.scoring_sequences,
        evaluation_sequences=recipe.data.evaluation_sequences,
        device=runtime.device.type,
        dtype=str(runtime.dtype).removeprefix("torch."),
        within=recipe.effort.within,
        level=recipe.effort.level,
        rounds=[*(str(limits_of_round(budget.limits, recipe, n, whole)) for n in every), str(budget.limits)],
        operations=operations,
        operations_per_second=timed.rate,
        seconds=seconds,
        tasks_not_estimated=tokens_of_tasks(recipe.evaluation) is None,
        parent_bytes=whole["parameters"] * runtime.dtype.itemsize,
        statistics_gib=recipe.library.statistics_gib,
        disk_bytes=whole["weight_bytes"],
        out=str(out),
        notes=[*notes, *_not_planned(recipe, budget)],
        placement=placement,
    )


def _of_all_rounds(space: Outline, last: TimePlan) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and seconds of every stage in all rounds, from the plan of the last."""
    earlier = range(1, last.recipe.rounds.count)
    plans = [plan_time(space, of_round(last.recipe, n), last.rate, is_timed=False) for n in earlier] + [last]
    operations = {stage: sum(p.flops.get(stage, 0.0) for p in plans) for stage in last.flops}
    return operations, {stage: sum(p.seconds.get(stage, 0.0) for p in plans) for stage in last.seconds}


def _not_planned(recipe: Recipe, budget: Budget) -> Iterator[str]:
    if budget.limits.has_times:
        yield "latency limits cannot be checked in a dry run; a run checks them once the parent is timed."
    if recipe.hidden_size.fractions or recipe.hidden_size.sizes:
        yield "the run has other hidden sizes; each adds about the time of all stages up to the search."


def _in_formats(space: Outline, formats: Sequence[str], kv_formats: Sequence[str], budget: Budget) -> Outline:
    """The search space with all alternatives in formats as well."""
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    pairs = in_formats(space.alternatives, formats, kv_formats)
    costs = count_costs(shape, space.alternatives, budget.workload, formats, kv_formats) if pairs else space.costs
    return replace(space, alternatives=[*space.alternatives, *pairs], costs=costs)


def _smallest(space: Any, name: str) -> int:
    by_place: dict[tuple[int, str], int] = {}
    for alternative in space.alternatives:
        place = (alternative.layer, alternative.subblock)
        cost = space.costs.by_key[alternative.key][name]
        by_place[place] = min(cost, by_place.get(place, cost))
    return sum(by_place.values()) + min(fixed[name] for fixed in (space.costs.fixed, *space.costs.outside.values()))
