"""Curves from sums of parts to whole children, and the program on both sides of them."""

from __future__ import annotations

import itertools
import random

import pytest

from layersmith.costs.budget import Budget
from layersmith.costs.curve import Bend, Curve
from layersmith.costs.table import CostTable
from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.recipe import CombinedLimit, SearchRecipe
from layersmith.search.frontier import frontier
from layersmith.search.problem import SearchProblem


def test_a_curve_goes_through_what_was_seen_as_far_as_it_is_not_noise() -> None:
    exact = Curve.fitted(0.1, [(0.5, 0.55, 1e-6), (0.8, 0.78, 1e-6), (0.3, 0.36, 1e-6)])
    assert [exact(x) for x in (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.2)] == pytest.approx(
        [0.05, 0.1, 0.36, 0.55, 0.78, 1.0, 1.2], abs=1e-4
    )
    assert all(exact.inverse(exact(x)) == pytest.approx(x) for x in (0.02, 0.2, 0.44, 0.9, 1.1))
    noisy = Curve.fitted(0.1, [(0.5, 0.55, 1.0)])
    assert noisy(0.5) == pytest.approx(0.5, abs=0.001)
    backwards = Curve.fitted(0.0, [(0.5, 0.9, 1e-6), (0.6, 0.3, 1e-6)])
    steps = [backwards(x / 100) for x in range(101)]
    assert all(after > before for before, after in itertools.pairwise(steps))
    assert Curve.fitted(0.1, []) == Curve()


def test_noisy_checks_make_sums_no_worse() -> None:
    """Of a truth that is bent, and of one that is not, with errors as large as what is bent."""
    rng = random.Random(0)
    for depth in (0.0, 0.2):
        truth = [(x / 7, x / 7 + depth * x / 7 * (1 - x / 7)) for x in range(1, 7)]
        before = after = 0.0
        for _ in range(200):
            curve = Curve.fitted(0.0, [(x, y + rng.gauss(0, 0.02), 0.02) for x, y in truth])
            before += sum((y - x) ** 2 for x, y in truth)
            after += sum((y - curve(x)) ** 2 for x, y in truth)
        assert after < (0.4 * before if depth else 200 * 6 * 0.02**2)


ALTERNATIVES = [
    Alternative(layer, subblock, kind, size=2 if kind == "ffn_width" else 0)
    for layer in range(6)
    for subblock in ("attention", "ffn")
    for kind in ("parent", "ffn_width", "no_op")
    if subblock == "ffn" or kind != "ffn_width"
]


def table(bent: bool) -> CostTable:
    """Attentions take most of a decode step, FFNs of a prefill; the smallest child takes 0.1."""
    share = {"parent": 1.0, "ffn_width": 0.4, "no_op": 0.0}
    by_key = {}
    for a in ALTERNATIVES:
        prefill, decode = (0.05, 0.1) if a.subblock == "attention" else (0.1, 0.05)
        seconds = (share[a.kind] * prefill, share[a.kind] * decode)
        by_key[a.key] = {
            "parameters": int(share[a.kind] * 1000), "prefill_seconds": seconds[0], "decode_seconds": seconds[1],
            "token_seconds": seconds[0] / 8 + seconds[1],
        }  # fmt: skip
    fixed = {"parameters": 100, "prefill_seconds": 0.1, "decode_seconds": 0.1, "token_seconds": 0.1 / 8 + 0.1}
    parent = {
        name: fixed[name] + sum(by_key[a.key][name] for a in ALTERNATIVES if a.kind == "parent") for name in fixed
    }
    up, down = Curve((0.1, 0.5, 1.0), (0.1, 0.6, 1.0)), Curve((0.1, 0.5, 1.0), (0.1, 0.42, 1.0))
    curves = {"prefill_seconds": down, "decode_seconds": up}
    made_of = {"token_seconds": {"prefill_seconds": 1 / 8, "decode_seconds": 1.0}}
    return CostTable(by_key, fixed, parent, Bend(curves, parent, made_of) if bent else None)  # type: ignore[arg-type]


def problem(budget: Budget, rules: SearchRecipe | None = None) -> SearchProblem:
    rng = random.Random(4)
    loss = {"parent": 0.0, "ffn_width": 0.3, "no_op": 1.0}
    losses = {a.key: loss[a.kind] * rng.uniform(0.5, 2) for a in ALTERNATIVES}
    return SearchProblem(ALTERNATIVES, losses, table(True), budget.limits, rules or SearchRecipe())


@pytest.mark.parametrize("fraction", [0.35, 0.6, 0.85])
@pytest.mark.parametrize("key", ["ttft", "time_per_token", "throughput"])
def test_limits_are_on_whole_children(key: str, fraction: float) -> None:
    limit = f"{1 / fraction}x" if key == "throughput" else fraction
    cost = {"ttft": "prefill_seconds", "time_per_token": "decode_seconds", "throughput": "token_seconds"}[key]
    limited = problem(Budget.parse({key: limit}))
    solution = limited.best()
    whole = fraction * solution.parent_costs[cost]
    assert 0.85 * whole < solution.costs[cost] <= whole * (1 + 1e-9)
    assert limited.fits(solution.alternatives)
    # No other solution within the limit is better where one time is limited: tried by brute force over counts of kinds.
    if key != "throughput":
        plain = SearchProblem(ALTERNATIVES, limited.losses, table(False), limited.asked)
        bend = limited.costs.bend
        assert bend is not None
        total = bend.curves[cost].inverse(fraction) * solution.parent_costs[cost]
        assert solution.score == pytest.approx(plain.best({cost: total * (1 + 1e-12)}).score)


def test_limits_on_sums_of_costs_are_on_whole_children() -> None:
    rules = SearchRecipe(limits=(CombinedLimit(costs={"ttft": 1, "time_per_token": 2}, at_most=0.5),))
    solution = problem(Budget.parse(1.0), rules).best()
    one, whole = solution.costs, solution.parent_costs
    limit = 0.5 * (whole["prefill_seconds"] + 2 * whole["decode_seconds"])
    assert 0.85 * limit < one["prefill_seconds"] + 2 * one["decode_seconds"] <= limit * (1 + 1e-9)


def test_the_frontier_is_of_whole_children() -> None:
    solutions = frontier(problem(Budget.parse({"time_per_token": 1.0})), "decode_seconds", 20)
    bend = table(True).bend
    assert bend is not None
    for solution in solutions:
        sums = table(False).fixed["decode_seconds"] + sum(
            table(False).by_key[a.key]["decode_seconds"] for a in solution.alternatives
        )
        whole = solution.parent_costs["decode_seconds"]
        assert solution.costs["decode_seconds"] / whole == pytest.approx(bend.curves["decode_seconds"](sums / whole))
        assert solution.costs["decode_seconds"] <= solution.limits["decode_seconds"] * (1 + 1e-9)
    assert solutions[0].costs["decode_seconds"] == pytest.approx(0.1)


def test_what_cannot_be_is_told_of_whole_children() -> None:
    rules = SearchRecipe(keep_layers=(0, 1, 2))
    with pytest.raises(Infeasible) as error:
        problem(Budget.parse({"time_per_token": 0.5}), rules).best()
    whole = table(True).parent["decode_seconds"]
    least = Curve((0.1, 0.5, 1.0), (0.1, 0.6, 1.0))((0.1 + 0.45) / whole) * whole
    assert f"{0.5 * whole * 1e3:.3g} ms" in str(error.value)
    assert f"{least * 1e3:.3g} ms" in str(error.value)
