"""``--dry-run``: what a run will do and take, and whether the budget can be met, from the config alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from layersmith.costs.budget import Budget
from layersmith.costs.counted import COSTS
from layersmith.data.read import read_documents
from layersmith.heterogeneous.checkpoint import check_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import Recipe
from layersmith.run.folder import Run
from layersmith.run.runtime import Runtime
from layersmith.stages.arithmetic import stage_flops
from layersmith.stages.costs import check_reachable
from layersmith.stages.inspect import outline
from layersmith.units import format_cost, format_seconds


def plan(
    parent: str | Path,
    out: str | Path,
    data: str | Path,
    recipe: Recipe,
    budget: Budget,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """The text that ``--dry-run`` prints.

    Raises:
        LayersmithError: What would stop the run before its work starts.
    """
    Run.check(Path(out))
    check_files(parent)
    next(iter(read_documents(data, field=recipe.data.field, split=recipe.data.split)), None)
    runtime = Runtime.detect(recipe.device, recipe.dtype)
    space = outline(parent, recipe.library, budget.workload, descriptor, trust_remote_code, recipe.checkpoint_dtype)
    check_reachable(space.alternatives, space.costs, budget.limits, recipe.search, space.blocks)
    whole = space.costs.parent
    smallest = {name: _smallest(space, name) for name in COSTS}
    flops = stage_flops(space, recipe)
    kinds: dict[str, int] = {}
    for alternative in space.alternatives:
        if not alternative.is_parent:
            kinds[alternative.kind] = kinds.get(alternative.kind, 0) + 1
    rate = matrix_rate(runtime)
    lines = [
        f"parent: {parent}, {format_cost('parameters', whole['parameters'])} parameters",
        f"budget: {budget.limits}",
        "can be reached:",
        *(
            f"  {name.replace('_', ' ')}: {format_cost(name, whole[name])} down to {format_cost(name, smallest[name])}"
            f" ({smallest[name] / whole[name]:.2f}x)"
            for name in COSTS
            if whole[name]
        ),
        f"library: {sum(kinds.values())} alternatives in {len(space.axes)} layers ("
        + ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
        + ")",
        f"data: {data}, rows of {recipe.data.sequence_length} tokens: {recipe.data.calibration_sequences} calibration, "
        f"{recipe.data.scoring_sequences} scoring, {recipe.data.evaluation_sequences} evaluation",
        f"estimated time: {_between(sum(flops.values()) / rate)} on this {runtime.device.type}, two to four times that "
        f"of matrix products alone at {rate / 1e9:,.0f} GFLOP/s",
        *(f"  {name}: {value / 1e12:.2f} TFLOP, {_between(value / rate)}" for name, value in flops.items()),
        *(["  tasks: not estimated"] if recipe.evaluation.tasks else ()),
        f"memory: {format_cost('weight_bytes', whole['parameters'] * runtime.dtype.itemsize)} for the parent's weights "
        f"in {str(runtime.dtype).removeprefix('torch.')}, up to {recipe.library.statistics_gib:g} GiB for statistics",
        f"disk: at most {format_cost('weight_bytes', whole['weight_bytes'])} for the child in {out}",
        *(f"note: {note}" for note in space.notes),
        *(
            ["note: latency limits cannot be checked in a dry run; a run checks them once the parent is timed."]
            if budget.limits.has_times
            else ()
        ),
        "nothing was written.",
    ]
    return "\n".join(lines)


def _between(seconds: float) -> str:
    shortest, longest = (format_seconds(max(1, round(times * seconds))) for times in (2, 4))
    return f"{shortest} to {longest}"


def _smallest(space: Any, name: str) -> int:
    by_place: dict[tuple[int, str], int] = {}
    for alternative in space.alternatives:
        place = (alternative.layer, alternative.subblock)
        cost = space.costs.by_key[alternative.key][name]
        by_place[place] = min(cost, by_place.get(place, cost))
    return sum(by_place.values()) + space.costs.fixed[name]


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
