"""Nested solutions, against all of them one by one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from layersmith.costs.budget import parse_budget
from layersmith.costs.table import CostTable
from layersmith.errors import Infeasible, UsageError
from layersmith.library.alternative import Alternative
from layersmith.recipe import SearchRecipe
from layersmith.search.nested import nested
from layersmith.search.problem import SearchProblem

LAYERS = 2


def problem(seed: int, rules: SearchRecipe) -> SearchProblem:
    rng = random.Random(seed)
    alternatives, by_key, losses = [], {}, {}
    for layer in range(LAYERS):
        for subblock, kind in (("attention", "head_groups"), ("ffn", "ffn_width")):
            members = [Alternative(layer, subblock, "parent"), Alternative(layer, subblock, "no_op")]
            members += [Alternative(layer, subblock, kind, "contribution", size) for size in (2, 1)]
            members.append(Alternative(layer, subblock, "linear", "least_squares"))
            full = rng.randint(50, 90)
            for a, share in zip(members, (1.0, 0.0, 0.7, 0.3, 0.4), strict=True):
                by_key[a.key] = {"parameters": round(full * share)}
                losses[a.key] = 0.0 if a.is_parent else rng.random() * (1.2 - share)
            alternatives += members
    parent = {"parameters": 40 + sum(by_key[a.key]["parameters"] for a in alternatives if a.is_parent)}
    costs = CostTable(by_key, {"parameters": 40}, parent)
    return SearchProblem(alternatives, losses, costs, parse_budget(params=1.0).limits, rules)


def is_part(small: Alternative, large: Alternative) -> bool:
    """What may become of a part of a larger child."""
    if small == large or small.kind == "no_op":
        return True
    sliced = small.kind in ("head_groups", "ffn_width")
    return sliced and (large.kind == "parent" or (large.kind == small.kind and small.size <= large.size))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rules", [SearchRecipe(), SearchRecipe(max_removed_ffns=1), SearchRecipe(keep_layers=(1,))])
def test_nested_solutions_are_the_best(seed: int, rules: SearchRecipe) -> None:
    instance = problem(seed, rules)
    budgets = [parse_budget(params=share).limits for share in (0.9, 0.7)]
    found = nested(instance, budgets)
    assert found.proven_optimal
    for large, small in zip(found.solutions[0].alternatives, found.solutions[1].alternatives, strict=True):
        assert is_part(small, large)

    problems = [instance.within(limits) for limits in budgets]
    each = [[c for c in itertools.product(*instance.by_place.values()) if p.fits(c)] for p in problems]
    by_score = [sorted(((instance.score(c), c) for c in children), key=lambda pair: pair[0]) for children in each]
    best = math.inf
    for score, large in by_score[0]:
        for other, small in by_score[1]:
            if score + other >= best:
                break
            if all(map(is_part, small, large)):
                best = score + other
    assert math.isclose(found.score, best, rel_tol=1e-9)
    for solution, alone, children in zip(found.solutions, found.alone, each, strict=True):
        assert solution.costs["parameters"] <= solution.limits["parameters"]
        assert math.isclose(alone.score, min(map(instance.score, children)), rel_tol=1e-9)
        assert solution.score >= alone.score - 1e-12


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(Infeasible, match="smallest child"):
        nested(problem(0, SearchRecipe()), [parse_budget(params=share).limits for share in (0.8, 0.01)])
    with pytest.raises(UsageError, match="not on time"):
        nested(problem(0, SearchRecipe()), [parse_budget(params=0.8, ttft=0.5).limits])


def test_what_is_no_part_is_only_within_itself() -> None:
    parent, linear = Alternative(0, "ffn", "parent"), Alternative(0, "ffn", "linear", "least_squares")
    pooled = [Alternative(0, "attention", "kv_heads", "pool", size) for size in (2, 1)]
    assert linear.is_within(linear)
    assert not linear.is_within(parent)
    assert not pooled[1].is_within(pooled[0])
    experts = [Alternative(0, "ffn", "experts", "iterative", size) for size in (6, 4)]
    assert experts[1].is_within(experts[0])
    assert not experts[0].is_within(experts[1])
    assert not experts[1].is_within(Alternative(0, "ffn", "expert_width", "contribution", 6))
