"""Plans the time of a run: the rate of this machine, the level of work that fits into ``effort.within``, the stages.

The level is chosen once and kept in the run's recipe. When the actual rate is known, the level of the work that is left
is chosen again: of refinement after the search, and of the refit and the training of the chosen layers after
refinement. Both are kept in the same way, so a resumed run makes the same choices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from layersmith.block_config import BlockConfig
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import build, decoder_layers
from layersmith.recipe import Recipe
from layersmith.run.header import HEADER
from layersmith.run.runtime import Runtime
from layersmith.run.timeline import Planned
from layersmith.stages.arithmetic import Found, SearchSpace, stage_flops, stage_seconds, stage_work
from layersmith.stages.costs import COSTS
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.effort import TOP, at_level, highest_level, with_effort
from layersmith.stages.inspect import Outline, outline
from layersmith.stages.job import Job
from layersmith.units import format_whole_seconds, parse_seconds

# How many times faster a square matrix product is than a forward pass, where the latter cannot be measured.
_MATRICES_ARE_FASTER = 2.5
# Tokens on which layers are timed: more take seconds, with fewer small models seem slower than they are.
_TIMED_TOKENS = 2048
# Layers with more bytes than this are not built to be timed.
_MOST_BYTES = 8e9
# Stages after the search, before two of which the rest is planned again: the setting and the name of what is chosen.
_FOLLOWING = ("refine", "pairs", "child", "evaluation", "tasks", "clock", "distilled")
_LEVEL_OF = {"refine": "late_level", "pairs": "last_level"}
_WORK_OF = {"refine": "refinement", "pairs": "local distillation of the chosen layers"}
# Stages that took less do not tell the rate.
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class TimePlan:
    """What the stages of a run will do and take.

    Attributes:
        recipe: The recipe, with the work of its level.
        rate: Operations per second of the parent's forward pass here.
        flops: Operations of each stage.
        seconds: Seconds of each stage.
    """

    recipe: Recipe
    rate: float
    flops: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def plan_time(space: SearchSpace, recipe: Recipe, rate: float, is_timed: bool, spent: float = 0.0) -> TimePlan:
    """Count all stages, at the level that fits into ``effort.within`` if that is given and no level is.

    Args:
        space: The search space.
        recipe: All settings.
        rate: Operations per second of the parent's forward pass.
        is_timed: Whether the budget limits a time.
        spent: Seconds of that time that are gone already.
    """

    def at(chosen: Recipe) -> TimePlan:
        flops = stage_flops(space, chosen)
        return TimePlan(chosen, rate, flops, stage_seconds(flops, space, chosen, rate, is_timed))

    effort = recipe.effort
    if effort.within is None or effort.level is not None:
        return at(with_effort(recipe))
    within = _within(recipe) - spent
    return at(at_level(recipe, highest_level(lambda level: at(at_level(recipe, level)).total, within)))


def choose_effort(job: Job, started: float) -> Recipe:
    """The recipe of a run with the work of its level; measures the rate if a level must be chosen for a time.

    Args:
        job: The job, before its run is opened.
        started: When the job began, as ``time.monotonic`` has it.
    """
    recipe, effort = job.recipe, job.recipe.effort
    if effort.within is None:
        return with_effort(recipe)
    if (job.run.folder / HEADER).is_file():
        known = Recipe.from_dict(job.run.header()["recipe"]).effort
        if known.within == effort.within and known.level is not None and effort.level in (None, known.level):
            return at_level(recipe, known.level, known.late_level, known.last_level)
    if effort.level is not None:
        return with_effort(recipe)
    space = outline(job.path, recipe.library, job.workload, job.family, job.trust_remote_code, recipe.checkpoint_dtype)
    job.rate = rate = forward_rate(space, recipe, job.runtime)
    plan = plan_time(space, recipe, rate, job.limits.has_times, time.monotonic() - started)
    chosen = plan.recipe.effort
    job.progress.note(
        f"--within {effort.within}: level {chosen.level:g} of {TOP}, planned to take "
        + format_whole_seconds(plan.total)
    )
    within = _within(recipe)
    if plan.total > 1.1 * within:
        job.progress.note(f"this is the least work there is; it does not fit into {effort.within}.")
    if chosen.level == TOP and plan.total < 0.9 * within:
        job.progress.note("this is the most work there is a use for. Global distillation could use more time.")
    return plan.recipe


def choose_late_effort(job: Job, asked: Recipe, planning: float, stage: str) -> Recipe:
    """The recipe with the level of the work that is left chosen from the time that is left, once for each stage.

    Args:
        job: The job, whose stages before this one are finished.
        asked: Its recipe before a level was applied; formats are those of the job.
        planning: Seconds that this process took before its first stage.
        stage: ``refine`` or ``pairs``, which is about to begin.
    """
    effort, asked = job.recipe.effort, replace(asked, formats=job.recipe.formats)
    if effort.within is None or effort.level is None or getattr(effort, _LEVEL_OF[stage]) is not None:
        return job.recipe
    first = effort.level
    before = first if effort.late_level is None else effort.late_level

    def at(level: float) -> Recipe:
        return at_level(asked, first, **{"late_level": effort.late_level, _LEVEL_OF[stage]: level})

    chosen, space, rate = before, space_of(job), _rate_so_far(job)
    if rate is not None:
        left = _within(job.recipe) - planning - sum(t["seconds"] for t in job.run.log.times())
        following = _FOLLOWING[_FOLLOWING.index(stage) :]

        def seconds(level: float) -> float:
            recipe = at(level)
            every = stage_seconds(stage_flops(space, recipe), space, recipe, rate)
            return sum(every.get(stage, 0.0) for stage in following)

        chosen = highest_level(seconds, left)
        if abs(chosen - before) > 0.1:
            what = "less" if chosen < before else "more"
            job.progress.note(
                f"{format_whole_seconds(left)} are left, so there is {what} {_WORK_OF[stage]} than was planned: "
                f"level {chosen:g} instead of {before:g}."
            )
    recipe = at(chosen)
    job.run.change_recipe(recipe)
    return recipe


def _rate_so_far(job: Job) -> float | None:
    """Operations per second of a forward pass, from the stages whose speed is most like that of those to come."""
    taken, work = job.run.log.worked(), stage_work(stage_flops(space_of(job), job.recipe))
    for known in (("refine",), ("statistics", "library", "scores")):
        made = [name for name in known if name in taken and work.get(name)]
        seconds = sum(taken[name] for name in made)
        if seconds >= _LEAST_SECONDS:
            return sum(work[name] for name in made) / seconds
    return None


def planned_work(job: Job) -> Planned:
    """What the stages take, once the costs are known."""
    space = space_of(job)
    flops = stage_flops(space, job.recipe)
    is_timed = job.limits.has_times
    return Planned(stage_work(flops), lambda rate: stage_seconds(flops, space, job.recipe, rate, is_timed), job.rate)


def space_of(job: Job) -> SearchSpace:
    """What work is counted from in a run whose costs are known."""
    survey = job.read(DESCRIBE)
    return Found(survey.alternatives, survey.axes, job.read(COSTS).counted)


def _within(recipe: Recipe) -> float:
    """Seconds that a round should take; most runs have one."""
    assert recipe.effort.within is not None
    return parse_seconds(recipe.effort.within, "--within") / recipe.rounds.count


# ---------------------------------------------------------------------------------------------- the rate


def forward_rate(space: Outline, recipe: Recipe, runtime: Runtime) -> float:
    """Operations per second of the parent's forward pass, measured now on its head and two of its layers.

    They have random weights. Where they cannot be built, the rate of a square matrix product takes their place.
    """
    count = len(space.blocks)
    kept = sorted({count // 2, min(count - 1, count // 2 + 1)})
    sizes = [0] * count
    for a in space.alternatives:
        if a.is_parent:
            sizes[a.layer] += int(space.costs.by_key[a.key]["active_parameters"])
    head, some = space.costs.fixed["active_parameters"], sum(sizes[i] for i in kept)
    stored = space.costs.fixed["parameters"] + max(1, len(kept)) * space.costs.parent["parameters"] / max(1, count)
    if some and stored * runtime.dtype.itemsize < _MOST_BYTES:
        with foreign_code("how fast are two layers?") as attempt:
            of_layers, of_rest = _seconds_of(space, kept, recipe, runtime)
        if not attempt.failed:
            tokens = _rows(recipe) * _length(space, recipe)
            return 2.0 * (sum(sizes) + head) * tokens / (of_rest + of_layers * sum(sizes) / some)
    return matrix_rate(runtime) / _MATRICES_ARE_FASTER


def _length(space: Outline, recipe: Recipe) -> int:
    positions = getattr(space.config, "max_position_embeddings", None) or recipe.data.sequence_length
    return min(recipe.data.sequence_length, positions)


def _rows(recipe: Recipe) -> int:
    """Rows that are timed at once: small matrices are slower, so there are no more than the run will have."""
    data = recipe.data
    most = max(data.calibration_sequences, data.scoring_sequences)
    return max(1, min(most, min(recipe.scoring.batch_tokens, _TIMED_TOKENS) // data.sequence_length))


@torch.no_grad()
def _seconds_of(space: Outline, kept: list[int], recipe: Recipe, runtime: Runtime) -> tuple[float, float]:
    """Seconds of a forward pass in some layers, and in all that is no layer; the other layers are left out."""
    blocks = [
        b if i in kept else BlockConfig(replace(b.attention, no_op=True), replace(b.ffn, no_op=True))
        for i, b in enumerate(space.blocks)
    ]
    model = build(space.config, blocks, dtype=runtime.dtype, device=runtime.device, descriptor=space.descriptor).eval()
    moments: list[float] = []

    def note(*_: Any) -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        moments.append(time.perf_counter())

    layers = decoder_layers(model, space.descriptor, len(blocks))
    for i in kept:
        layers[i].register_forward_pre_hook(note)
        layers[i].register_forward_hook(note)
    ids = torch.zeros((_rows(recipe), _length(space, recipe)), dtype=torch.long, device=runtime.device)
    of_layers = of_rest = float("inf")
    for rows in (ids[:1], ids, ids, ids):
        moments.clear()
        note()
        model(input_ids=rows, use_cache=False)
        note()
        begun, *within, ended = moments
        inside = sum(after - before for before, after in zip(within[::2], within[1::2], strict=True))
        if len(rows) == len(ids):
            of_layers, of_rest = min(of_layers, inside), min(of_rest, ended - begun - inside)
    return of_layers, of_rest


def matrix_rate(runtime: Runtime, size: int = 1024) -> float:
    """Operations per second of a square matrix product, measured now."""
    a = torch.randn(size, size, dtype=runtime.dtype, device=runtime.device)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
