"""The frontier: the best solutions for a series of budgets of one cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from layersmith.costs.budget import COSTS, Limit, Limits, is_time
from layersmith.costs.table import CostTable
from layersmith.errors import Infeasible, UsageError, did_you_mean
from layersmith.library.alternative import Alternative
from layersmith.scoring.regret import Axis
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

# Child sizes for which scores are made, as shares of the parent's cost, whatever the budget of this run.
_SIZES = (0.9, 0.8, 0.7, 0.6, 0.5)


def axes_of(alternatives: Sequence[Alternative], costs: CostTable, limits: Limits) -> list[Axis]:
    """The costs along which children will be chosen: parameters, and the limited costs."""
    axes: list[Axis] = []
    for name in dict.fromkeys(["parameters", *(limit.cost for limit in limits)]):
        whole = costs.parent.get(name)
        if not whole or any(name not in costs.by_key[a.key] for a in alternatives):
            continue  # a combination of several costs
        shares = {a.key: costs.by_key[a.key][name] / whole for a in alternatives}
        if any(shares == axis.shares for axis in axes):
            continue  # equal shares, such as bytes where all weights have one precision
        places: dict[tuple[int, str], float] = {}
        for a in alternatives:
            place = a.layer, a.subblock
            places[place] = min(places.get(place, math.inf), shares[a.key])
        fixed = costs.fixed[name] / whole
        least = fixed + math.fsum(places.values())
        axes.append(Axis(name, shares, fixed, tuple(size for size in _SIZES if size > least)))
    return axes


def frontier(
    problem: SearchProblem,
    cost: str = "parameters",
    points: int = 50,
    advance: Callable[[float], None] = lambda points: None,
) -> list[Solution]:
    """Solutions from the smallest child to the parent, by rising cost; limits on other costs are kept.

    Equal solutions are listed once, so there may be fewer than ``points``.

    Args:
        problem: The search problem to solve.
        cost: The cost along which budgets vary.
        points: Number of evenly spaced budgets.
        advance: Called with 1 after each budget.

    Raises:
        UsageError: The cost is unknown.
        Infeasible: The other limits cannot be met.
    """
    if cost not in problem.costs.parent:
        raise UsageError(f"frontier: unknown cost {cost!r}. {did_you_mean(cost, problem.costs.parent)}")
    others = {name: limit for name, limit in problem.limits.items() if name != cost}
    whole = problem.costs.parent[cost]
    least = problem.least(cost, others)
    solutions: list[Solution] = []
    for k in range(points):
        limit: Any = least + (whole - least) * k / (points - 1)
        limit = math.floor(limit) if isinstance(whole, int) else limit
        try:
            solution = problem.best({**others, cost: max(limit, least)})
        except Infeasible:  # by rounding, at the lowest budget of a cost that is not a whole number
            solution = None
        advance(1)
        if solution is not None and (not solutions or solution.alternatives != solutions[-1].alternatives):
            solutions.append(_for(solution, {**others, cost: max(limit, least)}))
    return solutions


def _for(solution: Solution, limits: dict[str, Any]) -> Solution:
    """The solution with the limits for which it is the best."""
    known = all(cost in COSTS and (isinstance(limit, int) or is_time(cost)) for cost, limit in limits.items())
    asked = solution.asked
    if known:
        asked = Limits(tuple(Limit.of(cost, limit) for cost, limit in limits.items()))
    return dataclasses.replace(solution, limits=limits, asked=asked)


def point(
    solution: Solution, cost: str, measured: dict[str, Any] | None = None, with_solution: bool = True
) -> dict[str, Any]:
    """One point of a frontier or a baseline, as in ``frontier.json``."""
    whole = solution.parent_costs[cost]
    data = {
        "cost": solution.costs[cost],
        "fraction": solution.costs[cost] / whole if whole else 1.0,
        "score": solution.score,
        "measured": measured,
    }
    return data | ({"solution": solution.to_dict()} if with_solution else {})


def to_dict(
    problem: SearchProblem,
    cost: str,
    objective: str,
    solutions: Sequence[tuple[Solution, dict[str, Any] | None]],
    baselines: dict[str, Sequence[tuple[Solution, dict[str, Any] | None]]],
) -> dict[str, Any]:
    """Content of ``frontier.json``: points, with metrics for those that were evaluated as whole models."""
    return {
        "cost": cost,
        "objective": objective,
        "points": [point(solution, cost, measured) for solution, measured in solutions],
        "baselines": [
            {"name": name, "points": [point(solution, cost, measured, False) for solution, measured in of_baseline]}
            for name, of_baseline in baselines.items()
        ],
        "budget": {"limit": problem.limits.get(cost), "limits": problem.limits, "parent": problem.costs.parent},
    }
