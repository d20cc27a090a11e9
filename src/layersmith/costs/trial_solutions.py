"""Whole children that are timed to correct the sums of their parts, chosen as the search would choose them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from layersmith.costs.clock import LEAST_ROUNDS
from layersmith.costs.stopwatch import Stopwatch, check
from layersmith.costs.table import CostTable
from layersmith.costs.times import Check, Times
from layersmith.library.alternative import Alternative
from layersmith.recipe import CostsRecipe
from layersmith.run.progress import Progress

# Bisection steps for the price of time at which a solution takes the wanted time: the 18 orders of magnitude between
# the first bounds shrink to rounding.
_BISECTIONS = 60
_SEED = 0

Place = tuple[int, str]


def time_trial_solutions(
    watch: Stopwatch,
    times: Times,
    alternatives: Sequence[Alternative],
    costs: CostTable,
    recipe: CostsRecipe,
    progress: Progress,
) -> list[Check]:
    """Time ``recipe.checks`` trial solutions as whole models, from fast to slow."""
    children = {}
    for k, solution in enumerate(trial_solutions(times, alternatives, costs, recipe.checks), 1):
        parameters = costs.fixed["parameters"] + sum(costs.by_key[a.key]["parameters"] for a in solution)
        children[f"made-up choice {k}"] = solution, parameters / costs.parent["parameters"]
    with progress.stage("check times", max(recipe.rounds, LEAST_ROUNDS) + 1, "rounds") as advance:
        return check(watch, times, children, recipe, advance)


def trial_solutions(
    times: Times, alternatives: Sequence[Alternative], costs: CostTable, count: int
) -> list[list[Alternative]]:
    """The solver's solutions at evenly spaced times if scores were drawn at random.

    The solver picks alternatives that look fast for their score, in all layers alike, so its solutions differ from the
    sums of their parts in another way than random children do. A score here is the square of the share of parameters
    removed, times one random number of the subblock and one of the alternative. Each solution is that of the
    Lagrangian relaxation: every subblock minimizes its score plus a price times its time.
    """
    rng = random.Random(_SEED)
    whole = times.parent(alternatives)
    time_share = {
        a.key: (times.by_key[a.key].prefill / whole.prefill + times.by_key[a.key].decode / whole.decode) / 2
        for a in alternatives
    }
    places: dict[Place, list[Alternative]] = {}
    for a in alternatives:
        places.setdefault((a.layer, a.subblock), []).append(a)
    parents = {place: next(a for a in members if a.is_parent) for place, members in sorted(places.items())}
    outside = 1 - sum(time_share[a.key] for a in parents.values())
    solutions = []
    for k in range(count):
        scores: dict[str, float] = {}
        for place, parent in parents.items():
            difficulty = rng.lognormvariate(0, 1)
            most = costs.by_key[parent.key]["parameters"]
            for a in places[place]:
                removed = 1 - costs.by_key[a.key]["parameters"] / most if most else 1.0
                scores[a.key] = 0.0 if a is parent else difficulty * removed**2 * rng.lognormvariate(0, 0.5)
        wanted = outside + (1 - outside) * (k + 0.5) / count
        solutions.append(_solution_with_time(wanted, outside, list(places.values()), scores, time_share))
    return solutions


def _solution_with_time(
    wanted: float,
    outside: float,
    places: Sequence[Sequence[Alternative]],
    scores: Mapping[str, float],
    time_share: Mapping[str, float],
) -> list[Alternative]:
    """The relaxed solution that takes ``wanted`` of the parent's time, by bisection of the price of time."""
    low, high = 1e-9, 1e9
    solution: list[Alternative] = []
    for _ in range(_BISECTIONS):
        price = math.sqrt(low * high)
        solution = [
            min(members, key=lambda a: (scores[a.key] + price * time_share[a.key], a.key)) for members in places
        ]
        taken = outside + sum(time_share[a.key] for a in solution)
        low, high = (price, high) if taken > wanted else (low, price)
    return solution
