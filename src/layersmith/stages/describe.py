"""The first stage: load the parent, find what can be changed in it, and count what everything costs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Budget, Limit
from layersmith.costs.counted import Workload
from layersmith.costs.table import CostTable, count_costs
from layersmith.costs.times import PREFILL
from layersmith.execution.parent import Parent, load_parent
from layersmith.execution.streaming import is_too_large
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library, Survey, survey
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import Recipe, SearchRecipe
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.search.problem import SearchProblem
from layersmith.search.rules import without_times


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


def reachable(
    alternatives: Sequence[Alternative],
    costs: CostTable,
    budget: Budget,
    rules: SearchRecipe,
    blocks: Sequence[BlockConfig],
) -> None:
    """Make sure that limits can be met, those of time only where the costs have times.

    Raises:
        Infeasible: they cannot.
    """
    if PREFILL not in costs.parent:
        rules = without_times(rules)
        budget = budget.counted or dataclasses.replace(budget, limits=(Limit("parameters", fraction="1"),))
    SearchProblem(alternatives, dict.fromkeys(costs.by_key, 0.0), costs, budget, rules, blocks).reachable()


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


def at_stored_dtype(parent: Parent, recipe: Recipe, near: Path) -> Parent:
    """The parent in its checkpoint's dtype.

    From a wider dtype, in which it may be loaded, the way back is exact; otherwise it is read again.
    """
    if parent.runtime.dtype == parent.dtype:
        return parent
    runtime = Runtime(torch.device("cpu"), parent.dtype)
    stream_near = None if parent.stream is None else near
    return load_parent(parent.path, runtime, parent.descriptor, recipe.trust_remote_code, stream_near=stream_near)


def run_dtype(model: Parent) -> str:
    return f"{model.runtime.dtype} on {model.runtime.device.type}"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
