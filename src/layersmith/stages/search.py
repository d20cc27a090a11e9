"""Search: the problem, the frontier, and the solution as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget
from layersmith.costs.table import CostTable
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.run.artifacts import write_json
from layersmith.run.progress import SILENT, Progress
from layersmith.scoring.score import Score, losses
from layersmith.search import baselines
from layersmith.search.frontier import frontier, to_dict
from layersmith.search.problem import SearchProblem, Solution

# Runs solutions as whole models: for each its mean loss under the objective, and the standard error of that.
Measure = Callable[[Sequence[Solution]], list[dict[str, Any]]]
# Points of a frontier, and of each baseline, that are run as whole models where that is asked for.
MEASURED_POINTS = 10


def search_problem(
    library: Library, scores: list[Score], recipe: Recipe, costs: CostTable, budget: Budget
) -> SearchProblem:
    """The search problem under the recipe's objective and constraints."""
    own = losses(scores, recipe.scoring.objective)
    return SearchProblem(library.alternatives, own, costs, budget, recipe.search, library.parent.blocks)


def write_frontier(
    folder: Path, problem: SearchProblem, recipe: Recipe, measure: Measure | None = None, progress: Progress = SILENT
) -> None:
    """The frontier along the first cost that the budget limits, and what others would do.

    Args:
        folder: gets ``frontier.json``.
        problem: The search problem to solve.
        recipe: how many points.
        measure: runs solutions as whole models; without it there are sums of scores only.
        progress: told of points.
    """
    cost = problem.budget.limits[0].cost
    with progress.stage("frontier", recipe.search.frontier_points, "budgets") as advance:
        solutions = frontier(problem, cost, recipe.search.frontier_points, advance)
    some = solutions[:: max(1, len(solutions) // MEASURED_POINTS)]
    budgets = [solution.costs[cost] for solution in some if solution.score > 0]
    others = baselines.all_of(problem, cost, budgets, recipe.seed)
    if measure is not None:
        others = {name: own[:: max(1, -(-len(own) // MEASURED_POINTS))] for name, own in others.items()}
    wanted = [*some, *(solution for own in others.values() for solution in own)] if measure is not None else []
    measured = dict(zip((c.alternatives for c in wanted), measure(wanted) if measure else [], strict=True))
    data = to_dict(
        problem, cost, recipe.scoring.objective, [(c, measured.get(c.alternatives)) for c in solutions],
        {name: [(c, measured.get(c.alternatives)) for c in own] for name, own in others.items()},
    )  # fmt: skip
    write_json(folder / "frontier.json", data)


def write_solution(folder: Path, solution: Solution, costs: CostTable) -> None:
    write_json(folder / "solution.json", solution.to_dict())
    write_json(folder / "costs.json", costs.to_dict())
