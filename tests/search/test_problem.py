"""Rules, several solutions, the frontier and baselines, against all solutions one by one."""

import dataclasses
import itertools
import random
from typing import Any

import pytest

from layersmith import AttentionConfig, BlockConfig, FFNConfig
from layersmith.costs.budget import parse_budget
from layersmith.costs.table import CostTable
from layersmith.errors import Infeasible, UsageError
from layersmith.library.alternative import Alternative
from layersmith.recipe import CombinedLimit, SearchRecipe
from layersmith.search import baselines
from layersmith.search.frontier import frontier, to_dict
from layersmith.search.problem import SearchProblem

LAYERS = 3
BLOCKS = [
    BlockConfig(AttentionConfig(num_key_value_heads=4, num_attention_heads=8), FFNConfig(intermediate_size=64))
] * LAYERS


def problem(seed: int, rules: SearchRecipe, params: float = 0.6) -> SearchProblem:
    rng = random.Random(seed)
    alternatives, by_key, losses = [], {}, {}
    for layer in range(LAYERS):
        for subblock, kind, sizes in (("attention", "kv_heads", (2, 1)), ("ffn", "ffn_width", (48, 20))):
            full = rng.randint(50, 90)
            members = [Alternative(layer, subblock, "parent"), Alternative(layer, subblock, "no_op")]
            members += [Alternative(layer, subblock, kind, "contribution", size) for size in sizes]
            for a, share in zip(members, (1.0, 0.0, 0.7, 0.3), strict=True):
                parameters = round(full * share)
                cache = parameters // 3 if subblock == "attention" else 0
                by_key[a.key] = {
                    "parameters": parameters, "active_parameters": parameters, "weight_bytes": 2 * parameters,
                    "kv_cache_bytes": cache, "memory_bytes": 2 * parameters + cache,
                }  # fmt: skip
                losses[a.key] = 0.0 if a.kind == "parent" else rng.random() * (1.2 - share)
            alternatives += members
    fixed = dict.fromkeys(by_key[alternatives[0].key], 0) | {"parameters": 40, "memory_bytes": 80, "weight_bytes": 80}
    parent = {n: fixed[n] + sum(by_key[a.key][n] for a in alternatives if a.kind == "parent") for n in fixed}
    return SearchProblem(
        alternatives, losses, CostTable(by_key, fixed, parent), parse_budget(params=params).limits, rules, BLOCKS
    )


RULES: dict[str, tuple[SearchRecipe, Any]] = {
    "none": (SearchRecipe(), lambda c, cost: True),
    "kept": (SearchRecipe(keep_layers=(1,)), lambda c, cost: all(a.kind == "parent" for a in c if a.layer == 1)),
    "attentions": (
        SearchRecipe(keep_attentions=(0, 2)),
        lambda c, cost: all(a.kind != "no_op" for a in c if a.subblock == "attention" and a.layer != 1),
    ),
    "no-ops": (
        SearchRecipe(max_removed_attentions=1, max_removed_ffns=0),
        lambda c, cost: (
            sum(a.kind == "no_op" for a in c if a.subblock == "attention") <= 1
            and not any(a.kind == "no_op" for a in c if a.subblock == "ffn")
        ),
    ),
    "uniform": (SearchRecipe(uniform_groups=0), lambda c, cost: len({a.name for a in c}) == 2),
    "groups": (
        SearchRecipe(uniform_groups=((0, 2),)),
        lambda c, cost: all(c[i].name == c[i + 4].name for i in (0, 1)),
    ),
    "parallel": (SearchRecipe(tensor_parallel=8), lambda c, cost: all(a.size != 20 for a in c)),
    "sum": (
        SearchRecipe(limits=(CombinedLimit({"params": 0.5, "kv_cache": 3}, 0.55),)),
        lambda c, cost: (
            0.5 * cost["parameters"] + 3 * cost["kv_cache_bytes"]
            <= 0.55 * (0.5 * cost["whole parameters"] + 3 * cost["whole kv_cache_bytes"])
        ),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_equals_brute_force(name: str) -> None:
    rules, holds = RULES[name]
    for seed in range(4):
        searched = problem(seed, rules)
        places: dict[Any, list[Alternative]] = {}
        for a in searched.alternatives:
            places.setdefault((a.layer, a.subblock), []).append(a)
        best = None
        for chosen in itertools.product(*(places[p] for p in sorted(places))):
            costs = searched.of(chosen).costs
            whole = {f"whole {k}": v for k, v in searched.costs.parent.items()}
            if costs["parameters"] <= searched.limits["parameters"] and holds(chosen, costs | whole):
                score = searched.score(chosen)
                best = score if best is None else min(best, score)
        if best is None:
            with pytest.raises(Infeasible):
                searched.best()
            continue
        solution = searched.best()
        assert solution.score == pytest.approx(best, rel=1e-12)
        assert holds(
            solution.alternatives, solution.costs | {f"whole {k}": v for k, v in searched.costs.parent.items()}
        )
        assert solution.costs["parameters"] <= searched.limits["parameters"]


def test_a_solution_prints_as_a_table() -> None:
    solution = problem(0, SearchRecipe()).best()
    layers, costs = (part.splitlines() for part in str(solution).split("\n\n"))
    assert layers[0].split() == ["layer", "attention", "ffn"]
    assert len(layers) == 1 + len({a.layer for a in solution.alternatives})
    assert len(costs) == 1 + len(solution.costs) + 1
    for a in solution.alternatives:
        assert ("unchanged" if a.kind == "parent" else f"parent => {a.name}") in layers[1 + a.layer]
    assert any(line.split()[0] == "parameters" for line in costs[1:])
    assert repr(solution).startswith("Solution(")
    assert "<td>" in solution._repr_html_()


def test_several_solutions_differ() -> None:
    searched = problem(1, SearchRecipe())
    solutions = searched.several(3, 3)
    assert [c.score for c in solutions] == sorted(c.score for c in solutions)
    for one, other in itertools.combinations(solutions, 2):
        assert sum(a != b for a, b in zip(one.alternatives, other.alternatives, strict=True)) >= 3


def test_the_frontier_falls_from_the_smallest_child_to_the_parent() -> None:
    searched = problem(2, SearchRecipe())
    points = frontier(searched, "parameters", 12)
    costs = [c.costs["parameters"] for c in points]
    assert costs == sorted(costs)
    assert [c.score for c in points] == sorted((c.score for c in points), reverse=True)
    assert costs[0] == searched.costs.fixed["parameters"]
    assert points[-1].score == 0
    for solution in points:
        assert SearchProblem(
            searched.alternatives,
            searched.losses,
            searched.costs,
            parse_budget(params="1.0").limits,
            searched.rules,
            BLOCKS,
        ).best(solution.limits).score == pytest.approx(solution.score)
    others = baselines.all_of(searched, "parameters", costs[1:-1], 0)
    for name, solutions in others.items():
        assert solutions, name
        for solution in solutions:
            assert solution.score >= searched.best({"parameters": solution.costs["parameters"]}).score - 1e-12
    data = to_dict(searched, "parameters", "kl_divergence", [(c, None) for c in points], {})
    assert data["points"][-1]["fraction"] == 1.0
    with pytest.raises(UsageError, match="unknown cost"):
        frontier(searched, "paramters")


def test_what_cannot_be_met_is_said() -> None:
    with pytest.raises(Infeasible, match=r"parameters 0\.05x.*smallest child"):
        problem(0, SearchRecipe(), 0.05).reachable()
    with pytest.raises(Infeasible, match=r"parameters 0\.20x.*smallest child.*0\.\d\dx"):
        problem(0, SearchRecipe(keep_layers=(0, 1, 2)), 0.2).reachable()
    with pytest.raises(Infeasible, match=r"no-op FFNs can be \d+ at least"):
        problem(0, SearchRecipe(max_removed_attentions=0, max_removed_ffns=0), 0.3).reachable()
    with pytest.raises(Infeasible, match="tensor_parallel 3"):  # a no-op would be divisible, but layer 0 stays
        problem(0, SearchRecipe(tensor_parallel=3, keep_layers=(0,)))
    for rules, match in (
        (SearchRecipe(keep_layers=(9,)), "layer 9 does not exist"),
        (SearchRecipe(keep_attentions=(9,)), "layer 9 does not exist"),
        (SearchRecipe(uniform_groups=((0, 1), (1, 2))), "named twice"),
        (SearchRecipe(limits=(CombinedLimit({"parms": 1}, 0.5),)), "Did you mean 'params'"),
        (SearchRecipe(limits=(CombinedLimit({"params": 1}, "7 parsecs"),)), "not an amount"),
    ):
        with pytest.raises(UsageError, match=match):
            problem(0, rules)
    with pytest.raises(UsageError, match="tensor_parallel"):
        dataclasses.replace(SearchRecipe(), tensor_parallel=0)
