"""Plans the time of a run: the rate of this machine, the level of work that fits into ``effort.within``, the stages.

The level is chosen once and kept in the run's recipe. After the search, when the actual rate is known, the level of the
work that is left (refinement and joint distillation) is chosen again, once, and kept in the same way. So a resumed run
makes the same choices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from layersmith.block_config import BlockConfig
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import build
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
from layersmith.units import format_seconds, parse_seconds

# How many times faster a square matrix product is than a forward pass, where the latter cannot be measured.
_MATRICES_ARE_FASTER = 2.5
# Tokens on which layers are timed: more take seconds, with fewer small models seem slower than they are.
_TIMED_TOKENS = 2048
# Layers with more bytes than this are not built to be timed.
_MOST_BYTES = 8e9
# Stages after the search that can be planned again, and those by which the rate is known then.
_ADAPT, _KNOWN_BY = ("refine", "pairs"), ("statistics", "library", "scores")
_FOLLOWING = ("child", "evaluation", "tasks", "clock", "distilled")


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
            return at_level(recipe, known.level, known.late_level)
    if effort.level is not None:
        return with_effort(recipe)
    space = outline(job.path, recipe.library, job.workload, job.family, job.trust_remote_code, recipe.checkpoint_dtype)
    job.rate = rate = forward_rate(space, recipe, job.runtime)
    plan = plan_time(space, recipe, rate, job.limits.has_times, time.monotonic() - started)
    chosen = plan.recipe.effort
    job.progress.note(f"--within {effort.within}: level {chosen.level:g} of {TOP}, planned to take " + _of(plan.total))
    within = _within(recipe)
    if plan.total > 1.1 * within:
        job.progress.note(f"this is the least work there is; it does not fit into {effort.within}.")
    if chosen.level == TOP and plan.total < 0.9 * within:
        job.progress.note("this is the most work there is a use for. Global distillation could use more time.")
    return plan.recipe


def choose_late_effort(job: Job, asked: Recipe, planning: float) -> Recipe:
    """The recipe with the level of the work after the search chosen from the time that is left, once for a run.

    Args:
        job: The job, whose scores and search are finished.
        asked: Its recipe before a level was applied; formats are those of the job.
        planning: Seconds that this process took before its first stage.
    """
    effort = job.recipe.effort
    if effort.within is None or effort.level is None or effort.late_level is not None:
        return job.recipe
    space, level, asked = space_of(job), effort.level, replace(asked, formats=job.recipe.formats)
    taken = job.run.log.worked()
    flops, made = stage_flops(space, job.recipe), [stage for stage in _KNOWN_BY if stage in taken]
    work = sum(stage_work(flops)[stage] for stage in made)
    late_level = level
    if made and work:
        rate = work / max(1e-9, sum(taken[stage] for stage in made))
        spent = planning + sum(t["seconds"] for t in job.run.log.times())
        left = _within(job.recipe) - spent

        def seconds(late: float) -> float:
            recipe = at_level(asked, level, late)
            every = stage_seconds(stage_flops(space, recipe), space, recipe, rate)
            return sum(every.get(stage, 0.0) for stage in (*_ADAPT, *_FOLLOWING))

        late_level = highest_level(seconds, left)
        if abs(late_level - level) > 0.1:
            what = "less" if late_level < level else "more"
            job.progress.note(
                f"{_of(left)} are left, so there is {what} refinement and joint distillation than was planned: "
                f"level {late_level:g} instead of {level:g}."
            )
    recipe = at_level(asked, level, late_level)
    job.run.change_recipe(recipe)
    return recipe


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


def _of(seconds: float) -> str:
    return format_seconds(max(1, round(seconds)))


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
            of_head, of_some = (_seconds_of(space, layers, recipe, runtime) for layers in ([], kept))
        if not attempt.failed and of_some > of_head:
            tokens = _rows(recipe) * _length(space, recipe)
            whole = of_head + (of_some - of_head) * sum(sizes) / some
            return 2.0 * (sum(sizes) + head) * tokens / whole
    return matrix_rate(runtime) / _MATRICES_ARE_FASTER


def _length(space: Outline, recipe: Recipe) -> int:
    positions = getattr(space.config, "max_position_embeddings", None) or recipe.data.sequence_length
    return min(recipe.data.sequence_length, positions)


def _rows(recipe: Recipe) -> int:
    return max(1, min(recipe.scoring.batch_tokens, _TIMED_TOKENS) // recipe.data.sequence_length)


@torch.no_grad()
def _seconds_of(space: Outline, layers: list[int], recipe: Recipe, runtime: Runtime) -> float:
    """Seconds of a forward pass through the head and some layers, the others being left out."""
    blocks = [
        b if i in layers else BlockConfig(replace(b.attention, no_op=True), replace(b.ffn, no_op=True))
        for i, b in enumerate(space.blocks)
    ]
    model = build(space.config, blocks, dtype=runtime.dtype, device=runtime.device, descriptor=space.descriptor).eval()
    ids = torch.zeros((_rows(recipe), _length(space, recipe)), dtype=torch.long, device=runtime.device)
    best = float("inf")
    for rows in (ids[:1], ids, ids):
        started = time.perf_counter()
        logits = model(input_ids=rows, use_cache=False).logits
        float(logits[0, 0, 0])  # waits for the device
        if len(rows) == len(ids):
            best = min(best, time.perf_counter() - started)
    return best


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
