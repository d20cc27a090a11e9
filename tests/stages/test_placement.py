"""Plans for several processes: what they hold, what fits, and devices that are not here."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from layersmith.costs.budget import Workload
from layersmith.errors import UsageError
from layersmith.execution.layerwise import NoAlternatives, split_layers, tokens_at_once
from layersmith.execution.parent import load_parent
from layersmith.recipe import Recipe
from layersmith.run.runtime import Runtime
from layersmith.stages.arithmetic import ORDER, stage_flops, stage_seconds
from layersmith.stages.holding import held_in
from layersmith.stages.inspect import Outline, outline
from layersmith.stages.placement import Asked, Machine, place

CPU = Runtime(torch.device("cpu"), torch.float32)
GPU = Runtime(torch.device("cuda"), torch.bfloat16)
SMALL: dict[str, Any] = {"data": {"sequence_length": 32}}


@pytest.fixture(scope="module")
def space(make_parent: Callable[..., Path]) -> Outline:
    return outline(make_parent("llama"), Recipe().library, Workload(1, 64))


def placed(space: Outline, machine: Machine, recipe: Recipe) -> Any:
    flops = stage_flops(space, recipe)
    return place(space, recipe, machine, flops, stage_seconds(flops, space, recipe, 1e9))


@pytest.mark.parametrize("stream", ["never", "always"])
def test_weights_and_batches_are_those_of_a_loaded_parent(
    space: Outline, make_parent: Callable[..., Path], tmp_path: Path, stream: str
) -> None:
    recipe = Recipe.from_dict({"data": {"sequence_length": 32, "scoring_sequences": 500}, "stream": stream})
    parent = load_parent(make_parent("llama"), CPU, stream_near=tmp_path if stream == "always" else None)
    sizes = Machine(1, 1e9, None, CPU).sizes(space, recipe)
    by_layer = [sum(p.numel() * 4 for p in layer.parameters()) for layer in parent.layers]
    assert sizes.layers == by_layer
    assert sizes.whole == sum(p.numel() * 4 for p in parent.model.parameters())
    two_units = 2 * max(*by_layer, parent.head.weight.numel() * 4)  # one runs, the next is read
    assert sizes.weights == (sizes.whole if stream == "never" else two_units)
    assert Machine(1, 3 * two_units, None, CPU).sizes(space, recipe).weights in (sizes.whole, two_units / 2)
    layerwise = split_layers(parent, NoAlternatives())
    rows = tokens_at_once(parent, layerwise, recipe.scoring.batch_tokens) // 32
    assert sizes.scored_at_once == 32 * rows


def test_more_processes_hold_fewer_layers_and_take_less_time(space: Outline) -> None:
    recipe = Recipe.from_dict(SMALL | {"stream": "always"})
    plans = [placed(space, Machine(n, 1e9, None, CPU), recipe) for n in (1, 2, 3, 4, 64)]
    assert [plan.layers for plan in plans] == [4, 2, 2, 1, 1]
    assert [plan.is_held for plan in plans] == [False, True, True, True, True]
    assert set(plans[0].stages) <= set(ORDER)
    for few, many in pairwise(plans[1:]):
        for stage in ("statistics", "library", "scores", "refine"):
            assert many.stages[stage].device["weights"] <= few.stages[stage].device["weights"]
            assert many.stages[stage].operations <= few.stages[stage].operations
    assert plans[0].stages["scores"].sent == 0 < plans[1].stages["scores"].sent
    assert [(plan.groups, plan.without_layers) for plan in plans] == [(1, 0), (1, 0), (1, 0), (1, 0), (16, 0)]
    assert "in 16 groups that have all layers each" in plans[-1].arrangement


def test_what_does_not_fit_is_refused_with_what_would(space: Outline) -> None:
    recipe = Recipe.from_dict(SMALL | {"stream": "never"})
    sizes = Machine(1, 1e9, None, GPU).sizes(space, recipe)
    memory = max(held_in(stage, sizes).on_device for stage in ORDER if stage != "distilled") - 1
    with pytest.raises(UsageError, match=r"needs .* in one of 1 processes.*--set stream=always") as refused:
        placed(space, Machine(1, memory, None, GPU), recipe)
    assert "--world-size" not in str(refused.value)  # each would have the whole parent
    fits = placed(space, Machine(1, memory, None, GPU), dataclasses.replace(recipe, stream="always"))
    assert max(share.on_device for share in fits.stages.values()) <= memory
    with pytest.raises(UsageError, match="Neither another number of processes nor settings"):
        placed(space, Machine(2, 1e3, None, GPU), recipe)


def test_one_process_trains_adapters_with_weights_on_the_disk(space: Outline) -> None:
    recipe = Recipe.from_dict(SMALL | {"stream": "always", "distillation": {"tokens": 65536, "lora_rank": 4}})
    plan = placed(space, Machine(1, 1e9, None, CPU), recipe).stages["distilled"]
    whole = placed(space, Machine(1, 1e9, None, CPU), dataclasses.replace(recipe, stream="never")).stages["distilled"]
    assert plan.device["weights"] < whole.device["weights"]
    assert plan.device["optimizer"] < whole.device["optimizer"]
    sizes = Machine(1, 1e9, None, CPU).sizes(space, recipe)
    assert plan.read == 3 * sizes.whole * 65536 / 4096
    assert whole.read == 0


def test_a_parent_on_the_disk_is_distilled_globally_by_several_processes_that_shard_it(space: Outline) -> None:
    settings = SMALL | {"stream": "always", "distillation": {"tokens": 1000}}
    recipe = Recipe.from_dict(settings)
    with pytest.raises(UsageError, match="cannot be distilled"):
        placed(space, Machine(1, 1e9, None, CPU), recipe)
    never = Recipe.from_dict(settings | {"distillation": {"tokens": 1000, "sharded": "never"}})
    with pytest.raises(UsageError, match="cannot be distilled"):
        placed(space, Machine(2, 1e9, None, CPU), never)
    two, four = (placed(space, Machine(n, 1e9, None, CPU), recipe).stages["distilled"] for n in (2, 4))
    for what in ("weights", "optimizer"):
        assert four.device[what] < two.device[what]
    whole = placed(space, Machine(2, 1e9, None, CPU), dataclasses.replace(recipe, stream="never")).stages["distilled"]
    assert two.device["optimizer"] < whole.device["optimizer"]


def test_processes_that_compute_the_same_rows_hold_a_part_of_the_layer_that_runs(space: Outline) -> None:
    settings = SMALL | {"distillation": {"tokens": 1000, "sharded": "always"}}
    together = SMALL | {"distillation": {"tokens": 1000, "tensor_parallel": 2}}
    sharded, divided = (
        placed(space, Machine(4, 1e9, None, CPU), Recipe.from_dict(s)).stages["distilled"] for s in (settings, together)
    )
    for what in ("weights", "optimizer", "activations"):
        assert 0.25 < divided.device[what] / sharded.device[what] < 1
    assert divided.sent > 0
    eight = SMALL | {"distillation": {"tokens": 1000, "tensor_parallel": 8}}
    of_two, of_eight = (
        Machine(8, 1e9, None, CPU).sizes(space, Recipe.from_dict(s)).of_group for s in (together, eight)
    )
    assert of_two == pytest.approx(0.5, abs=0.01)
    assert 0.2 < of_eight < 1  # four KV heads are not divided by eight
    with pytest.raises(UsageError, match="3 processes are not a multiple"):
        placed(space, Machine(3, 1e9, None, CPU), Recipe.from_dict(together))
    adapters = {"distillation": together["distillation"] | {"lora_rank": 4}}
    with pytest.raises(UsageError, match="adapters are trained whole"):
        placed(space, Machine(4, 1e9, None, CPU), Recipe.from_dict(together | adapters))


def test_devices_that_are_not_here() -> None:
    machine = Asked(8, None, "h100").machine(Recipe())
    assert (machine.processes, machine.memory, machine.is_gpu) == (8, 80e9, True)
    assert machine.runtime.dtype == torch.bfloat16
    assert machine.rate is not None
    assert 2e14 < machine.rate < 5e14
    assert Asked(8, "64GiB", "400TFLOP/s").machine(Recipe()).rate == 400e12
    here = Asked(2, "1GiB", "90GFLOP/s").machine(Recipe.from_dict({"device": "cpu"}))
    assert (here.rate, here.is_gpu, here.runtime.dtype) == (90e9, False, torch.float32)
    assert not Asked().is_any


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(0), "at least 1"),
        (Asked(2, "80 parsecs"), "--device-memory"),
        (Asked(2, "80"), "--device-memory"),
        (Asked(2, "0.5"), "--device-memory"),
        (Asked(2, "80GiB", "H1000"), "H100"),
        (Asked(2, "80GiB", "0TFLOP/s"), "not a rate"),
        (Asked(2, None, "400TFLOP/s"), "give --device-memory"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: Asked, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked.machine(Recipe())


def test_what_the_first_process_works_alone_is_divided_only_where_layers_are(space: Outline) -> None:
    def statistics(stream: str) -> float:
        recipe = Recipe.from_dict(SMALL | {"stream": stream})
        flops, machine = stage_flops(space, recipe), Machine(2, 2.0**34, None, CPU)
        share = place(space, recipe, machine, flops, {"statistics": 10.0}, 8.0).stages["statistics"]
        return share.seconds - share.waiting

    assert statistics("always") < 8.0 <= statistics("never")
