"""Times of alternatives: given, predicted, and measured with a clock that tells the same each time."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layersmith
from layersmith.costs import clock
from layersmith.costs.budget import Budget, Workload, parse_limit
from layersmith.costs.clock import median_polish
from layersmith.costs.measured import measure
from layersmith.costs.roofline import DEVICES, predict
from layersmith.costs.savings import Shape, shrink
from layersmith.costs.stopwatch import Stopwatch
from layersmith.costs.times import TIMES, Times, Timing, costs_of, from_csv, to_csv
from layersmith.errors import Infeasible, InputError, UsageError
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.alternative import child_blocks
from layersmith.library.axes.feasible import any_orders, no_maps
from layersmith.library.formats import in_formats
from layersmith.library.library import Library
from layersmith.library.survey import Survey, survey
from layersmith.recipe import CostsRecipe, LibraryRecipe, Recipe
from layersmith.run.artifacts import read_json
from layersmith.run.runtime import Runtime
from layersmith.search.problem import SearchProblem
from layersmith.search.time_limits import solve_within
from layersmith.stages.costs import cost_table, shape_of, times_of
from tests.conftest import TINY_RECIPE

LOAD = Workload(batch=2, context=48, generate=16)
BUDGET = Budget.parse({"params": 1.0, "batch": 2, "context": 48, "generate": 16})


@pytest.fixture(scope="module")
def parent(make_parent: Callable[..., Path]) -> Parent:
    return load_parent(make_parent("qwen2_windows"), Runtime(torch.device("cpu"), torch.float32))


@pytest.fixture(scope="module")
def space(parent: Parent) -> Survey:
    return survey(parent, LibraryRecipe(ffn_fractions=(0.5, 0.25)))


def takes(model: Any) -> Timing:
    """A clock for tests: what a model's layers hold, and something beside."""
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    return Timing(1e-3 + 1e-6 * inside, 1e-4 + 2e-8 * inside)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model takes the same each time; the models that were timed."""
    seen: list[Any] = []

    def once(self: clock.Served, model: Any, known: Timing | None = None) -> Timing:
        seen.append(model)
        return takes(model)

    monkeypatch.setattr(clock.Served, "once", once)
    return seen


# ---------------------------------------------------------------------------------------------- the clock


def test_a_slow_round_slows_all_alike() -> None:
    rng = random.Random(0)
    seconds = [0.01, 0.02, 0.05, 0.011]
    slow = [1.0, 3.0, 1.0, 1.2, 1.0, 7.0, 1.0, 1.0, 2.0]
    rounds = [[t * s * rng.uniform(0.99, 1.01) for t in seconds] for s in slow]
    rounds[3][1] *= 9  # and one model alone, once
    times, errors = median_polish(rounds)
    assert times == pytest.approx(seconds, rel=0.02)
    assert all(0 < error < 0.01 * time for error, time in zip(errors, seconds, strict=True))


def test_the_clock_runs(parent: Parent) -> None:
    watch = Stopwatch(parent, LOAD, CostsRecipe(rounds=1, decode_steps=2, seconds=1e-3))
    whole, again = watch.time([parent.blocks, parent.blocks])
    assert 0 < whole.time.decode < whole.time.prefill + whole.time.decode < 60
    assert again.time.decode == pytest.approx(whole.time.decode, rel=5)


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats of a model that disagree by more than a third mark its time as unreliable."""
    rng = random.Random(0)

    def timed(noise: float) -> clock.Measurement:
        def once(self: clock.Served, model: Any, known: Timing | None = None) -> Timing:
            return Timing(0.01 * rng.uniform(1, 1 + noise), 0.001)

        monkeypatch.setattr(clock.Served, "once", once)
        return clock.time_in_turns([None], clock.Served(LOAD, 4, "eager", 10), 9, 60.0, repeats=[3])[0]

    quiet, busy = timed(0.1), timed(20.0)
    assert not quiet.busy
    assert quiet.spread.prefill < 0.1
    assert quiet.spread.decode == 0
    assert busy.busy
    assert busy.spread.prefill > 1


def test_what_is_timed_has_the_shapes_of_the_child_and_the_memory_of_the_parent(parent: Parent, space: Survey) -> None:
    library = Library(
        parent, space.axes, space.alternatives, any_orders(space.axes),
        no_maps(parent.descriptor, parent.layers, space.alternatives), [],
    )  # fmt: skip
    storages = {t.untyped_storage().data_ptr() for t in parent.model.state_dict().values()}
    watch = Stopwatch(parent, LOAD, CostsRecipe())
    rng = random.Random(1)
    by_place: dict[Any, list[Any]] = {}
    for a in space.alternatives:
        by_place.setdefault((a.layer, a.subblock), []).append(a)
    for _ in range(3):
        chosen = [rng.choice(members) for members in by_place.values()]
        real, timed = library.compose(chosen), watch.carve(library.blocks(chosen))
        shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
        assert shapes == {name: tuple(p.shape) for name, p in timed.named_parameters()}
        assert type(real).forward is type(timed).forward
        more = [n for n, p in timed.named_parameters() if p.untyped_storage().data_ptr() not in storages]
        linear = {a.layer for a in chosen if a.kind == "linear"}
        assert all(any(f"layers.{i}." in name for i in linear) for name in more)
        with torch.no_grad():
            assert timed(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_noise_is_taken_from_what_lies_on_a_line() -> None:
    rng = random.Random(3)
    block = layersmith.BlockConfig(layersmith.AttentionConfig(), layersmith.FFNConfig())
    shapes = [
        Shape(0, "ffn", dataclasses.replace(block, ffn=layersmith.FFNConfig(intermediate_size=size)))
        for size in (64, 128, 192, 256, 320)
    ]
    removed = {shape: ("ffn_width", 384.0 - (shape.block.ffn.intermediate_size or 0)) for shape in shapes}
    true = {shape: 1e-6 * size for shape, (_, size) in removed.items()}

    def off(noise: float, said: float) -> tuple[float, float]:
        seen = {shape: Timing(saving + noise * rng.gauss(0, 1), saving) for shape, saving in true.items()}
        shrunk = shrink(seen, dict.fromkeys(shapes, Timing(said, said)), removed)
        return tuple(sum((t[s].prefill - true[s]) ** 2 for s in shapes) for t in (seen, shrunk))  # type: ignore[return-value]

    pairs = [off(5e-5, 5e-5) for _ in range(50)]
    assert sum(after for _, after in pairs) < 0.6 * sum(before for before, _ in pairs)
    before, after = off(5e-5, 1e-7)  # what is off the line is no noise
    assert after == pytest.approx(before, rel=0.01)


# ---------------------------------------------------------------------------------------------- measured


def test_sums_of_parts_are_the_whole(parent: Parent, space: Survey, steady: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    costs = cost_table(parent, space, LOAD)
    times = measure(Stopwatch(parent, LOAD, CostsRecipe(rounds=3, checks=5)), space.alternatives, costs)
    assert times.whole(a.key for a in space.alternatives if a.kind == "parent").prefill == pytest.approx(
        takes(parent.model).prefill
    )
    assert len(times.checks) == 5
    for check in times.checks:
        assert check.parts.prefill == pytest.approx(check.whole.prefill)
        assert check.parts.decode == pytest.approx(check.whole.decode)
    for curve in times.curves(space.alternatives).values():
        assert [curve(x) for x in (0.3, 0.6, 1.0)] == pytest.approx([0.3, 0.6, 1.0])
    assert Times.from_dict(times.to_dict(space.alternatives)) == times


def test_where_there_is_little_time_some_layers_are_timed(
    parent: Parent, space: Survey, steady: list[Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    costs = cost_table(parent, space, LOAD)
    whole = measure(Stopwatch(parent, LOAD, CostsRecipe(rounds=3, checks=0)), space.alternatives, costs)
    few = measure(Stopwatch(parent, LOAD, CostsRecipe(rounds=3, checks=0, seconds=1e-6)), space.alternatives, costs)
    for key, timing in whole.by_key.items():
        assert few.by_key[key].prefill == pytest.approx(timing.prefill, abs=1e-9)
    assert few.fixed.decode == pytest.approx(whole.fixed.decode)


def test_a_parent_on_the_disk_takes_what_it_takes_in_memory(
    parent: Parent, space: Survey, steady: list[Any], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    costs = cost_table(parent, space, LOAD)
    whole = measure(Stopwatch(parent, LOAD, CostsRecipe(rounds=3, checks=0)), space.alternatives, costs)
    streamed = load_parent(parent.path, parent.runtime, stream_near=tmp_path)
    assert streamed.stream is not None
    times = measure(Stopwatch(streamed, LOAD, CostsRecipe(rounds=3)), space.alternatives, costs)
    for key, timing in whole.by_key.items():
        assert times.by_key[key].prefill == pytest.approx(timing.prefill, abs=1e-9)
    assert times.parent(space.alternatives).decode == pytest.approx(takes(parent.model).decode)
    assert not times.checks


def test_a_shape_is_timed_once(
    parent: Parent, space: Survey, steady: list[Any], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path))
    costs = cost_table(parent, space, LOAD)
    recipe = CostsRecipe(rounds=3, checks=2)
    some = [a for a in space.alternatives if a.kind != "linear"]
    measure(Stopwatch(parent, LOAD, recipe), some, costs)
    steady.clear()
    first = measure(Stopwatch(parent, LOAD, recipe), some, costs)
    assert not steady
    more = measure(Stopwatch(parent, LOAD, recipe), space.alternatives, costs)
    assert 0 < len({id(model) for model in steady}) < 13
    assert {key: more.by_key[key].prefill for key in first.by_key} == pytest.approx(
        {key: timing.prefill for key, timing in first.by_key.items()}
    )
    (kept,) = (tmp_path / "times").iterdir()
    kept.write_text("{")
    assert measure(Stopwatch(parent, LOAD, recipe), some, costs).by_key.keys() == first.by_key.keys()


def test_the_solution_holds_against_a_clock_that_disagrees(
    parent: Parent, space: Survey, steady: list[Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    costs = cost_table(parent, space, LOAD)
    recipe = CostsRecipe(rounds=3, checks=0)
    times = measure(Stopwatch(parent, LOAD, recipe), space.alternatives, costs)
    whole = takes(parent.model)
    limits = Budget.parse({"time_per_token": 0.8, "batch": 2, "context": 48, "generate": 16}).limits

    def slower(self: clock.Served, model: Any, known: Timing | None = None) -> Timing:
        # The machine is half as fast now, and children save a third less than their parts do.
        timing = takes(model)
        return Timing(2 * timing.prefill, 2 * (whole.decode - (whole.decode - timing.decode) / 1.5))

    monkeypatch.setattr(clock.Served, "once", slower)
    losses = {
        a.key: costs.parent["parameters"] / 1e6 - costs.by_key[a.key]["parameters"] / 1e6 for a in space.alternatives
    }
    losses |= {a.key: 0.0 for a in space.alternatives if a.kind == "parent"}

    problem = SearchProblem(space.alternatives, losses, times.into(costs, space.alternatives), limits)
    watch = Stopwatch(parent, LOAD, recipe)
    timed = solve_within(problem, times, watch)
    assert timed.overrun <= 0.01
    seen = slower(None, watch.carve(child_blocks(parent.blocks, timed.solution.alternatives)))  # type: ignore[arg-type]
    assert seen.decode <= 0.8 * 2 * whole.decode * 1.01
    assert timed.solution.costs["decode_seconds"] == pytest.approx(seen.decode, rel=0.02)


# ---------------------------------------------------------------------------------------------- from elsewhere


def test_a_table_is_read_as_it_was_written(parent: Parent, space: Survey, tmp_path: Path) -> None:
    costs = cost_table(parent, space, LOAD)
    times = predict(
        "H100", dataclasses.replace(shape_of(parent, space), dtype=torch.bfloat16), space.alternatives, costs, LOAD
    )
    path = tmp_path / "times.csv"
    path.write_text(to_csv(times, space.alternatives))
    again = from_csv(path, space.alternatives, LOAD)
    assert {k: t.decode for k, t in again.by_key.items()} == pytest.approx(
        {k: t.decode for k, t in times.by_key.items()}, rel=1e-5
    )
    assert again.fixed.prefill == pytest.approx(times.fixed.prefill, rel=1e-5)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda text: text.replace("decode_ms", "decode"), "no column 'decode_ms'"),
        (lambda text: "\n".join(line for line in text.splitlines() if ",fixed," not in line), "subblock 'fixed'"),
        (lambda text: "\n".join(line for line in text.splitlines() if "no-op" not in line), "no time for layer 0"),
        (lambda text: text.replace("fixed,,", "fixed,,fast"), "not a number"),
        (lambda text: text.replace("fixed,,", "fixed,,-"), "not a time"),
        (lambda text: text.replace("\n0", "\nzero", 1), "layers are numbers"),
    ],
)
def test_tables_that_are_no_tables(
    harm: Callable[[str], str], says: str, parent: Parent, space: Survey, tmp_path: Path
) -> None:
    costs = cost_table(parent, space, LOAD)
    times = predict(
        "T4", dataclasses.replace(shape_of(parent, space), dtype=torch.float32), space.alternatives, costs, LOAD
    )
    path = tmp_path / "times.csv"
    path.write_text(harm(to_csv(times, space.alternatives)))
    with pytest.raises(InputError, match=says):
        from_csv(path, space.alternatives, LOAD)
    with pytest.raises(InputError, match=r"nowhere.csv: missing"):
        from_csv(tmp_path / "nowhere.csv", space.alternatives, LOAD)


def test_a_prediction_is_arithmetic_or_traffic(parent: Parent, space: Survey) -> None:
    costs = cost_table(parent, space, LOAD)
    times = predict(
        "H100", dataclasses.replace(shape_of(parent, space), dtype=torch.bfloat16), space.alternatives, costs, LOAD
    )
    ffn = next(a for a in space.alternatives if (a.layer, a.subblock, a.kind) == (0, "ffn", "parent"))
    cost, device = costs.by_key[ffn.key], DEVICES["H100"]
    tokens = LOAD.batch * LOAD.prompt
    wanted = max(2 * cost["parameters"] * tokens / device.operations, cost["weight_bytes"] / device.bandwidth)
    assert times.by_key[ffn.key].prefill == pytest.approx(wanted)
    assert times.by_key[ffn.key].decode == pytest.approx(cost["weight_bytes"] / device.bandwidth)
    assert all(times.by_key[a.key] == Timing(0, 0) for a in space.alternatives if a.kind == "no_op")
    formats = ["int8"]
    pairs, of_formats = in_formats(space.alternatives, formats), cost_table(parent, space, LOAD, formats)
    shape = dataclasses.replace(shape_of(parent, space), dtype=torch.bfloat16)
    rounded = predict("H100", shape, [*space.alternatives, *pairs], of_formats, LOAD)
    table = rounded.into(of_formats, space.alternatives)
    for a in pairs:
        whole, cost = times.by_key[a.shape.key], of_formats.by_key[a.key]
        assert rounded.by_key[a.shape.key] == whole
        assert whole.decode - rounded.by_key[a.key].decode == pytest.approx(
            (costs.by_key[a.shape.key]["weight_bytes"] - cost["weight_bytes"]) / device.bandwidth, rel=1e-6
        )
        assert rounded.by_key[a.key].prefill <= whole.prefill
        assert table.by_key[a.key] == cost | costs_of(rounded.by_key[a.key], LOAD)
    whole = times.parent(space.alternatives)
    assert costs_of(whole, LOAD)["token_seconds"] == pytest.approx((whole.prefill + 16 * whole.decode) / 32)
    with pytest.raises(UsageError, match="H100"):
        predict(
            "H1000", dataclasses.replace(shape_of(parent, space), dtype=torch.bfloat16), space.alternatives, costs, LOAD
        )


# ---------------------------------------------------------------------------------------------- budgets of time


@pytest.mark.parametrize(
    ("cost", "text", "parent_costs", "limit"),
    [
        ("prefill_seconds", "80ms", 0.2, 0.08),
        ("prefill_seconds", "0.7", 0.2, 0.14),
        ("decode_seconds", "12ms/token", 0.02, 0.012),
        ("decode_seconds", "500 us", 0.02, 0.0005),
        ("decode_seconds", "90%", 0.02, 0.018),
        ("token_seconds", "1.5x", 0.03, 0.02),
        ("token_seconds", "500 tokens/s", 0.03, 0.002),
        ("token_seconds", "200tok/s", 0.03, 0.005),
    ],
)
def test_limits_of_time(cost: str, text: str, parent_costs: float, limit: float) -> None:
    assert parse_limit(cost, text).resolve(parent_costs) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        ("prefill_seconds", "80"), ("prefill_seconds", "80GiB"), ("decode_seconds", "12ms/word"),
        ("decode_seconds", "-3ms"), ("token_seconds", "500ms"), ("token_seconds", "500"), ("token_seconds", "0"),
    ],
)  # fmt: skip
def test_nonsense_of_time(cost: str, text: str) -> None:
    with pytest.raises(UsageError, match=r"Give a|more than nothing"):
        parse_limit(cost, text)


def test_loads() -> None:
    assert (Workload(1, 4096).prompt, Workload(1, 4096).generated) == (3968, 128)
    assert (Workload(1, 64).prompt, Workload(1, 1).prompt) == (32, 1)
    assert Workload(2, 4096, 512).within(256) == Workload(2, 256)
    with pytest.raises(UsageError, match="leave no prompt"):
        Budget.parse({"ttft": 0.5, "context": 128, "generate": 128})


def test_a_child_within_limits_of_time(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    """With times that do not hang on the machine's."""
    learning = {"tokens": 256, "batch_tokens": 64, "finalists": 2, "finalist_tokens": 64}
    recipe = TINY_RECIPE | {"costs": {"device": "A100"}, "distillation": learning}
    made = layersmith.compress(
        make_parent("llama"), tmp_path / "run", data=text_folder, recipe=recipe,
        budget={"time_per_token": 0.8, "throughput": "1.2x", "context": 200, "batch": 4},
    )  # fmt: skip
    costs, whole = made.solution.costs, made.solution.parent_costs
    assert costs["decode_seconds"] <= 0.8 * whole["decode_seconds"] * (1 + 1e-9)
    assert costs["token_seconds"] <= whole["token_seconds"] / 1.2 * (1 + 1e-9)
    assert set(TIMES) <= set(costs)
    finalists = read_json(tmp_path / "run" / "distillation" / "finalists" / "finalists.json")
    assert len(finalists) == 2
    kept = read_json(tmp_path / "run" / "costs" / "times.json")
    assert (kept["source"], kept["device"], kept["context"]) == ("predicted", "A100", 200)
    assert "throughput" in made.report.read_text()
    with pytest.raises(Infeasible, match="time per token"):
        layersmith.compress(
            make_parent("llama"), tmp_path / "other", data=text_folder, recipe=recipe, budget={"time_per_token": 1e-4}
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("budget", [{"ttft": "1us"}, {"time_per_token": 0.01}, {"throughput": "9999999999tokens/s"}])
def test_what_no_child_can_reach_is_refused_before_all_is_timed(
    budget: dict[str, Any], make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, steady: list[Any],
    monkeypatch: Any,
) -> None:  # fmt: skip
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path / "cache"))
    recipe = TINY_RECIPE | {"costs": {"rounds": 3}}
    with pytest.raises(Infeasible, match="fastest child"):
        layersmith.compress(make_parent("llama"), tmp_path / "run", data=text_folder, recipe=recipe, budget=budget)
    assert len(steady) < 6
    assert not (tmp_path / "run").exists()
    # What is near to what can be reached is told by measuring.
    near = {"ttft": f"{0.9 * 1e6 * 1e-3}us"}
    with pytest.raises(Infeasible, match="fastest child"):
        layersmith.compress(make_parent("llama"), tmp_path / "run", data=text_folder, recipe=recipe, budget=near)
    assert len(steady) > 30


def test_a_run_against_the_clock(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, steady: list[Any]
) -> None:
    from layersmith.stages.reopen import SearchRequest, search_several

    recipe = TINY_RECIPE | {"costs": {"rounds": 3, "checks": 2}}
    path = make_parent("llama")
    made = layersmith.compress(
        path, tmp_path / "run", data=text_folder, recipe=recipe, budget={"ttft": "0.8", "context": 64}
    )
    child = layersmith.load(made.child)
    whole = load_parent(path, Runtime(torch.device("cpu"), torch.float32))
    assert takes(child).prefill <= 0.8 * takes(whole.model).prefill * 1.01
    report = read_json(tmp_path / "run" / "report.json")
    assert report["times"]["child"]["prefill_seconds"] == pytest.approx(takes(child).prefill)
    mine = [c for c in report["checks"]["times"] if c["what"] == "this child"]
    assert [c["phase"] for c in mine] == ["prefill", "decode"]
    assert all(c["predicted"] == pytest.approx(c["measured"], rel=0.01) for c in mine)
    budget = Budget.parse({"ttft": "0.6", "context": 64})
    search_several(SearchRequest(tmp_path / "run", budget), out=tmp_path / "smaller")
    smaller = layersmith.load(tmp_path / "smaller")
    assert takes(smaller).prefill <= 0.6 * takes(whole.model).prefill * 1.01
    times, alternatives = times_of(path, Recipe.from_dict(recipe), Workload(1, 64))
    assert times.by_key.keys() == {a.key for a in alternatives}
