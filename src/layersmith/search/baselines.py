"""What others would do with the same budget: narrow all layers alike, drop whole layers, choose at random.

All take the same alternatives and scores as the search, so that what differs is the solution.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.search.problem import SearchProblem, Solution

UNIFORM, DROPPED, RANDOM = "uniform narrowing", "layers dropped", "random"


def uniform(problem: SearchProblem, cost: str, budgets: Sequence[float]) -> list[Solution]:
    """For each budget the best solution in which all layers (that are alike in the parent) become the same."""
    rules = dataclasses.replace(problem.rules, uniform_groups=0)
    own = SearchProblem(problem.alternatives, problem.losses, problem.costs, problem.asked, rules, problem.blocks)
    found = []
    for budget in budgets:
        try:
            found.append(own.best({cost: budget}))
        except Infeasible:
            continue
    return _distinct(found)


def dropped(problem: SearchProblem, cost: str) -> list[Solution]:
    """One layer fewer at a time: those that score least, or the neighbours that do where that is less."""
    by_place = {(a.layer, a.subblock, a.kind): a for own in problem.by_place.values() for a in own}
    parent = {place: next((a for a in own if a.is_parent), own[0]) for place, own in problem.by_place.items()}
    layers = sorted({layer for layer, _ in problem.by_place})
    whole = {}
    for layer in layers:
        own = [by_place.get((layer, subblock, "no_op")) for subblock in ("attention", "ffn")]
        if None not in own:
            whole[layer] = [a for a in own if a is not None]
    loss = {layer: sum(problem.losses[a.key] for a in own) for layer, own in whole.items()}
    found = []
    for count in range(1, len(whole)):
        lowest = sorted(whole, key=lambda layer: (loss[layer], layer))[:count]
        spans = [
            list(range(first, first + count))
            for first in layers
            if all(i in whole for i in range(first, first + count))
        ]
        best = min([lowest, *spans], key=lambda own: sum(loss[layer] for layer in own))
        chosen = {(a.layer, a.subblock): a for layer in best for a in whole[layer]}
        found.append(problem.of([chosen.get(place, own) for place, own in sorted(parent.items())]))
    return _distinct(found)


def at_random(problem: SearchProblem, cost: str, budgets: Sequence[float], seed: int = 0) -> list[Solution]:
    """For each budget a random solution within it: narrowed until it fits, then widened while it does."""
    rng = random.Random(seed)
    found = []
    for limit in budgets:
        budget = problem.inside({cost: limit})[cost]
        chosen = {place: next((a for a in own if a.is_parent), own[0]) for place, own in problem.by_place.items()}
        costs = {a.key: problem.costs.by_key[a.key][cost] for own in problem.by_place.values() for a in own}
        used = problem.costs.fixed[cost] + sum(costs[a.key] for a in chosen.values())
        for narrower in (True, False):
            for _ in range(40 * len(chosen)):
                if narrower and used <= budget:
                    break
                place = rng.choice(list(chosen))
                other = rng.choice(problem.by_place[place])
                step = costs[other.key] - costs[chosen[place].key]
                if (step < 0) if narrower else (step >= 0 and used + step <= budget):
                    chosen[place], used = other, used + step
        if used <= budget:
            found.append(problem.of([own for _, own in sorted(chosen.items())]))
    return _distinct(found)


def all_of(problem: SearchProblem, cost: str, budgets: Sequence[float], seed: int = 0) -> dict[str, list[Solution]]:
    """Every baseline by its name."""
    return {
        UNIFORM: uniform(problem, cost, budgets),
        DROPPED: dropped(problem, cost),
        RANDOM: at_random(problem, cost, budgets, seed),
    }


def _distinct(solutions: Sequence[Solution]) -> list[Solution]:
    seen: dict[tuple[Alternative, ...], Solution] = {}
    for solution in solutions:
        seen.setdefault(solution.alternatives, solution)
    return list(seen.values())
