"""Baselines for the same budget: shrink all layers equally, remove whole layers, or choose at random.

They use the same alternatives and scores as the search, so that only the solution differs.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from contextlib import suppress

from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

UNIFORM, DROPPED, RANDOM = "uniform narrowing", "layers dropped", "random"


def uniform(problem: SearchProblem, cost: str, budgets: Sequence[float]) -> list[Solution]:
    """For each budget, the best solution in which all layers of one block config stay identical."""
    rules = dataclasses.replace(problem.rules, uniform_groups=0)
    alike = SearchProblem(
        alternatives=problem.alternatives,
        losses=problem.losses,
        costs=problem.costs,
        limits=problem.asked,
        rules=rules,
        blocks=problem.blocks,
    )
    solutions = []
    for budget in budgets:
        with suppress(Infeasible):
            solutions.append(alike.best({cost: budget}))
    return _distinct(solutions)


def dropped(problem: SearchProblem, cost: str) -> list[Solution]:
    """For each number of layers, remove those with the lowest losses, or neighbours if their sum is lower."""
    by_kind = {(a.layer, a.subblock, a.kind): a for members in problem.by_place.values() for a in members}
    unchanged = _unchanged(problem)
    layers = sorted({layer for layer, _ in problem.by_place})
    no_ops = {}
    for layer in layers:
        removed = [by_kind.get((layer, subblock, "no_op")) for subblock in ("attention", "ffn")]
        if None not in removed:
            no_ops[layer] = [a for a in removed if a is not None]
    loss = {layer: sum(problem.losses[a.key] for a in removed) for layer, removed in no_ops.items()}
    solutions = []
    for count in range(1, len(no_ops)):
        lowest = sorted(no_ops, key=lambda layer: (loss[layer], layer))[:count]
        spans = [
            list(range(first, first + count))
            for first in layers
            if all(i in no_ops for i in range(first, first + count))
        ]
        best = min([lowest, *spans], key=lambda removed: sum(loss[layer] for layer in removed))
        chosen = {(a.layer, a.subblock): a for layer in best for a in no_ops[layer]}
        solutions.append(problem.of([chosen.get(place, a) for place, a in sorted(unchanged.items())]))
    return _distinct(solutions)


def at_random(problem: SearchProblem, cost: str, budgets: Sequence[float], seed: int = 0) -> list[Solution]:
    """For each budget, a random solution: random exchanges shrink the parent until it fits, then widen it again."""
    rng = random.Random(seed)
    solutions = []
    for limit in budgets:
        budget = problem.conversion.to_sums({cost: limit})[cost]
        chosen = _unchanged(problem)
        costs = {a.key: problem.costs.by_key[a.key][cost] for members in problem.by_place.values() for a in members}
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
            solutions.append(problem.of([a for _, a in sorted(chosen.items())]))
    return _distinct(solutions)


def all_of(problem: SearchProblem, cost: str, budgets: Sequence[float], seed: int = 0) -> dict[str, list[Solution]]:
    """Name of each baseline to its solutions."""
    return {
        UNIFORM: uniform(problem, cost, budgets),
        DROPPED: dropped(problem, cost),
        RANDOM: at_random(problem, cost, budgets, seed),
    }


def _unchanged(problem: SearchProblem) -> dict[tuple[int, str], Alternative]:
    """The parent's alternative for every subblock, or the first one where rules exclude the parent's."""
    places = problem.by_place.items()
    return {place: next((a for a in members if a.is_parent), members[0]) for place, members in places}


def _distinct(solutions: Sequence[Solution]) -> list[Solution]:
    seen: dict[tuple[Alternative, ...], Solution] = {}
    for solution in solutions:
        seen.setdefault(solution.alternatives, solution)
    return list(seen.values())
