import itertools
import random

import pytest

from layersmith.errors import Infeasible
from layersmith.search import core, program
from layersmith.search.solve import Candidate, Group, ProgramSolution, Solver, within

Instance = tuple[list[Group], dict[str, int], dict[str, int]]


def solve(
    groups: list[Group], limits: dict[str, int], fixed: dict[str, int], parent_costs: dict[str, int] | None = None
) -> ProgramSolution:
    return Solver(groups, fixed, parent_costs).solve(limits)


def instance(seed: int, scale: int = 1) -> Instance:
    rng = random.Random(seed)
    groups = []
    for g in range(rng.randint(1, 5)):
        full = {"parameters": rng.randint(5, 30) * scale + rng.randint(0, 3), "memory": rng.randint(5, 30) * scale}
        candidates = [Candidate(f"{g}.parent", 0.0, full, True)]
        for c in range(rng.randint(0, 4)):
            costs = {name: rng.randint(0, value) for name, value in full.items()}
            score = rng.choice([0.0, 0.5, 1.0, rng.random(), rng.random() * 1e-5, rng.random() * 50])
            candidates.append(Candidate(f"{g}.{c}", score, costs))
        rng.shuffle(candidates)
        groups.append(Group(str(g), tuple(candidates)))
    fixed = {"parameters": rng.randint(0, 10) * scale, "memory": 0}
    whole = {n: fixed[n] + sum(next(c for c in g.candidates if c.is_parent).costs[n] for g in groups) for n in fixed}
    limits = {"parameters": int(whole["parameters"] * rng.uniform(0.2, 1.05))}
    if rng.random() < 0.5:
        limits["memory"] = int(whole["memory"] * rng.uniform(0.2, 1.05))
    return groups, limits, fixed


def brute_force(groups: list[Group], limits: dict[str, int], fixed: dict[str, int]) -> float | None:
    best = None
    for chosen in itertools.product(*(range(len(g.candidates)) for g in groups)):
        if within(groups, chosen, limits, fixed):
            score = sum(g.candidates[i].score for g, i in zip(groups, chosen, strict=True))
            best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("scale", [1, 10**11])
def test_equals_brute_force(scale: int) -> None:
    infeasible = 0
    for seed in range(150):
        groups, limits, fixed = instance(seed, scale)
        expected = brute_force(groups, limits, fixed)
        if expected is None:
            infeasible += 1
            with pytest.raises(Infeasible):
                solve(groups, limits, fixed)
            continue
        solution = solve(groups, limits, fixed)
        assert solution.score == pytest.approx(expected, rel=1e-9, abs=1e-9), seed
        assert solution.proven_optimal
        check(groups, limits, fixed, solution)
    assert 5 < infeasible < 120


def check(groups: list[Group], limits: dict[str, int], fixed: dict[str, int], solution: ProgramSolution) -> None:
    by_key = {c.key: c for g in groups for c in g.candidates}
    for name in fixed:
        total = fixed[name] + sum(by_key[key].costs[name] for key in solution.chosen)
        assert total == solution.costs[name]
        assert total <= limits.get(name, total)


def test_limits_hold_to_the_last_unit() -> None:
    """One parameter over a budget of a hundred billion is over it."""
    big = 10**11
    for short in (0, 1):
        groups = [
            Group("a", (Candidate("a+", 0.0, {"parameters": big}, True), Candidate("a-", 1.0, {"parameters": 1}))),
            Group("b", (Candidate("b+", 0.0, {"parameters": big + 7}, True), Candidate("b-", 2.0, {"parameters": 0}))),
        ]
        solution = solve(groups, {"parameters": big + 7 + 1 - short}, {})
        assert solution.chosen == (("a-", "b+") if short == 0 else ("a+", "b-"))


def test_a_parent_that_fits_is_the_answer() -> None:
    for seed in range(30):
        groups, _, fixed = instance(seed)
        parents = tuple(next(c.key for c in g.candidates if c.is_parent) for g in groups)
        costs = {n: fixed[n] + sum(c.costs[n] for g in groups for c in g.candidates if c.is_parent) for n in fixed}
        assert solve(groups, costs, fixed).chosen == parents


def test_ties_change_as_little_as_they_can() -> None:
    groups = [
        Group(
            str(g),
            (Candidate(f"{g}-", 0.0, {"parameters": 6}), Candidate(f"{g}+", 0.0, {"parameters": 10}, True)),
        )
        for g in range(6)
    ]
    solution = solve(groups, {"parameters": 52}, {})
    assert sum(key.endswith("-") for key in solution.chosen) == 2
    assert solve(groups, {"parameters": 52}, {}).chosen == solution.chosen


def test_infeasible_says_what_is_possible() -> None:
    groups = [Group("a", (Candidate("a", 0.0, {"parameters": 900}, True), Candidate("b", 1.0, {"parameters": 300})))]
    with pytest.raises(Infeasible, match=r"parameters 0\.25x.*smallest child.*0\.40x") as refused:
        solve(groups, {"parameters": 250}, {"parameters": 100}, parent_costs={"parameters": 1000})
    assert refused.value.exit_code == 3


def test_limits_that_exclude_each_other() -> None:
    groups = [
        Group(
            "a",
            (
                Candidate("parent", 0.0, {"parameters": 10, "memory": 10}, True),
                Candidate("few parameters", 1.0, {"parameters": 1, "memory": 9}),
                Candidate("little memory", 1.0, {"parameters": 9, "memory": 1}),
            ),
        )
    ]
    with pytest.raises(Infeasible, match="not all together") as refused:
        solve(groups, {"parameters": 5, "memory": 5}, {})
    assert "parameters can be 9 at least" in str(refused.value)


def test_bad_scores_are_a_bug() -> None:
    for score in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="score"):
            solve([Group("a", (Candidate("a", score, {"parameters": 1}),))], {"parameters": 1}, {})


def test_what_is_beyond_proof_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unrelated costs: the best solution within the node limit, and a lower bound."""
    rng = random.Random(3)
    names = ["parameters", "memory", "kv_cache_bytes", "active_parameters"]
    groups = []
    for g in range(30):
        candidates = [Candidate(f"{g}.parent", 0.0, dict.fromkeys(names, 1000), True, 0)]
        candidates += [
            Candidate(f"{g}.{c}", rng.expovariate(1), {n: rng.randint(0, 1000) for n in names}) for c in range(12)
        ]
        groups.append(Group(str(g), tuple(candidates)))
    limits, fixed = dict.fromkeys(names, 9_200), dict.fromkeys(names, 0)
    proven = solve(groups, limits, fixed)
    assert proven.proven_optimal
    assert proven.bound == proven.score
    monkeypatch.setattr(core, "_MOST_STATES", 10)
    monkeypatch.setattr(program, "FIRST_NODES", 1)
    monkeypatch.setattr(program, "MOST_NODES", 2)
    solution = solve(groups, limits, fixed)
    check(groups, limits, fixed, solution)
    assert not solution.proven_optimal
    assert solution.bound < proven.score <= solution.score
