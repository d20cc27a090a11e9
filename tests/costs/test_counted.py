"""Counted costs equal what a realized model holds."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PretrainedConfig

import layersmith
from layersmith import BlockConfig
from layersmith.costs import table as library_costs
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape, context_note, subblock_costs, total
from layersmith.costs.table import count_costs
from layersmith.library.axes.find import find_axes
from layersmith.library.axes.layers import meta_layers
from layersmith.library.survey import survey_of
from layersmith.recipe import LibraryRecipe
from tests.conformance.tiny import tiny_config
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model

VARIANTS = {
    "parent": [block()] * 4,
    "mixed": [
        block({"num_key_value_heads": 2}, {"intermediate_size": 16}),
        block(NO_ATTENTION),
        block({"replace_with_linear": True}, {"no_op": True}),
        block(None, {"replace_with_linear": True}),
    ],
    "nothing": [block(NO_ATTENTION, {"no_op": True})] * 4,
}


def costs_of(config: PretrainedConfig, blocks: list[BlockConfig], workload: Workload, dtype: torch.dtype) -> Any:
    descriptor = layersmith.describe(config)
    axes = find_axes(descriptor, config, layersmith.block_configs(config))
    layers, fixed = subblock_costs(ModelShape(descriptor, config, blocks, axes, dtype), workload)
    return layers, fixed, total([*(part for layer in layers for part in layer.values()), fixed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_bytes(family: str, variant: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]()
    model = child_model(config, VARIANTS[variant]).to(dtype)
    _, _, costs = costs_of(config, VARIANTS[variant], Workload(), dtype)
    assert costs["parameters"] == costs["active_parameters"] == sum(p.numel() for p in model.parameters())
    assert costs["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert costs["memory_bytes"] == costs["weight_bytes"] + costs["kv_cache_bytes"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_cache(family: str, variant: str) -> None:
    """Equal to the tensors in the cache after a forward of that many tokens."""
    config = FAMILIES[family]()
    model = child_model(config, VARIANTS[variant])
    window = getattr(config, "sliding_window", None)
    # A dynamic cache keeps one token less than the window, since the next one is on its way.
    batch, context = 3, 21 if window is None else window - 1
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(batch, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(
        t.numel() * t.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for t in (layer.keys, layer.values)
    )
    _, _, costs = costs_of(config, VARIANTS[variant], Workload(batch, context), torch.float32)
    assert costs["kv_cache_bytes"] == held


def test_windows_bound_the_cache() -> None:
    config = FAMILIES["qwen2_windows"]()  # layers 2 and 3 see 8 tokens
    _, _, costs = costs_of(config, [block()] * 4, Workload(1, 100), torch.float32)
    assert costs["kv_cache_bytes"] == 2 * 4 * 4 * 4 * (100 + 100 + 8 + 8)


def test_tied_weights_count_once() -> None:
    tied, untied = FAMILIES["llama_tied"](), FAMILIES["llama_tied"](tie_word_embeddings=False)
    difference = (
        costs_of(untied, [block()] * 4, Workload(), torch.float32)[1]["parameters"]
        - costs_of(tied, [block()] * 4, Workload(), torch.float32)[1]["parameters"]
    )
    assert difference == 512 * 32


def test_a_removed_subblock_costs_nothing() -> None:
    layers, _, _ = costs_of(FAMILIES["qwen3"](), VARIANTS["mixed"], Workload(), torch.float32)
    assert set(layers[1]["attention"].values()) == {0}
    assert set(layers[2]["ffn"].values()) == {0}
    assert layers[2]["attention"]["parameters"] == 32 * 32 + 32  # the map, and the norm before it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model_type",
    [
        "deepseek_v3",  # what all heads are made of
        "deepseek_v32",  # beside it the keys of an indexer
        "glm5_next",  # and what weighs them; values are made of the keys
        "longcat_flash",  # two attentions a layer
        "qwen4_exp_text",  # positions in whole numbers, which one layer keeps for all indexers
    ],
)
def test_what_is_kept_of_every_token(model_type: str, dtype: torch.dtype) -> None:
    config = tiny_config(model_type)
    blocks = layersmith.block_configs(config)
    model = layersmith.build(config, blocks, dtype=torch.float32).eval().to(dtype)
    for length in (7, 9):
        with torch.no_grad():
            output = model(torch.arange(3, 3 + length).repeat(2, 1), use_cache=True)
        _, _, costs = costs_of(config, blocks, Workload(2, length), dtype)
        assert costs["kv_cache_bytes"] == _bytes_in(output.past_key_values)


def test_a_cache_that_is_not_understood_is_called_an_estimate() -> None:
    """Keys and values are one tensor there, and of several tokens together one entry is kept."""
    for model_type, estimated in (("deepseek_v4", True), ("deepseek_v32", False)):
        config = tiny_config(model_type)
        descriptor, blocks = layersmith.describe(config), layersmith.block_configs(config)
        axes = find_axes(descriptor, config, blocks)
        space = survey_of(descriptor, blocks, axes, meta_layers(descriptor, config, blocks), LibraryRecipe())
        assert any("size of the KV cache is estimated in any layer" in note for note in space.notes) == estimated


def test_what_is_kept_of_every_token_at_full_size() -> None:
    """Read off a small model with the same kinds of layers: an indexer's keys, their weights and whether they count."""
    config = tiny_config("glm5_next")
    small, large = (copy.deepcopy(config) for _ in range(2))
    language = large.get_text_config()
    language.index_head_dim, language.index_n_heads, language.vocab_size = 128, 64, 500_000
    of_tokens = [layersmith.describe(config).token_bytes(1, torch.float32, True) for config in (small, large)]
    assert of_tokens == [4 * (2 * 16 + 1), 4 * (2 * 128 + 1)]


@pytest.mark.parametrize("model_type", ["bamba", "qwen3_next", "falcon_h1", "minimax", "gemma3n_text", "jetmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_shared_keys_are_counted_as_the_cache_holds_them(model_type: str, dtype: torch.dtype) -> None:
    """Beside keys and values, or in their place; of mixers with fewer or smaller heads, too."""
    config = tiny_config(model_type)
    descriptor, blocks = layersmith.describe(config), layersmith.block_configs(config)
    axes = find_axes(descriptor, config, blocks)
    space = survey_of(descriptor, blocks, axes, meta_layers(descriptor, config, blocks), LibraryRecipe())
    by_kind = {a.kind: a for a in space.alternatives if a.subblock == "attention" and a.kind != "window"}
    assert len(by_kind) > 2
    for alternatives in by_kind.values():
        changed = [alternatives.block_config(b) if i == alternatives.layer else b for i, b in enumerate(blocks)]
        model = layersmith.build(config, changed, dtype=torch.float32).eval().to(dtype)
        with torch.no_grad():
            output = model(input_ids=torch.arange(3, 12).repeat(3, 1), use_cache=True)
        _, _, costs = costs_of(config, changed, Workload(3, 9), dtype)
        assert costs["kv_cache_bytes"] == _bytes_in(output.past_key_values), alternatives.key


def _bytes_in(value: Any) -> int:
    """Of all tensors in a cache, but for counters."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.ndim > 1 else 0
    if isinstance(value, dict | list | tuple):
        return sum(_bytes_in(part) for part in (value.values() if isinstance(value, dict) else value))
    is_part = type(value).__module__ == "transformers.cache_utils" or hasattr(value, "layers")
    return _bytes_in(vars(value)) if is_part and not isinstance(value, type) else 0


@pytest.mark.parametrize("model_type", ["gemma3_text", "granitemoehybrid"])
def test_every_alternative_costs_what_it_costs_alone(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though equal layers are counted once, and several alternatives in one model."""
    config = tiny_config(model_type)
    descriptor, blocks = layersmith.describe(config), layersmith.block_configs(config)
    axes = find_axes(descriptor, config, blocks)
    space = survey_of(descriptor, blocks, axes, meta_layers(descriptor, config, blocks), LibraryRecipe())
    built = []
    workload = Workload(2, 100)

    def counting(*args: Any) -> Any:
        built.append(args)
        return subblock_costs(*args)

    monkeypatch.setattr(library_costs, "subblock_costs", counting)
    costs = count_costs(ModelShape(descriptor, config, blocks, axes, torch.float32), space.alternatives, workload)
    assert list(costs.by_key) == [a.key for a in space.alternatives]
    assert len(built) < len({(a.kind, a.size) for a in space.alternatives})
    for a in space.alternatives:
        changed = [a.block_config(b) if i == a.layer else b for i, b in enumerate(blocks)]
        layers, fixed = subblock_costs(ModelShape(descriptor, config, changed, axes, torch.float32), workload)
        assert costs.by_key[a.key] == layers[a.layer][a.subblock], a.key
        assert costs.fixed == fixed


def test_a_context_is_capped_at_the_models_positions() -> None:
    """Memory is not counted for tokens that the model cannot have, and a note says so."""
    config = FAMILIES["llama"]()
    descriptor, blocks = layersmith.describe(config), layersmith.block_configs(config)
    axes = find_axes(descriptor, config, blocks)
    space = survey_of(descriptor, blocks, axes, meta_layers(descriptor, config, blocks), LibraryRecipe())

    def count(workload: Workload) -> library_costs.CostTable:
        return count_costs(ModelShape(descriptor, config, blocks, axes, torch.float32), space.alternatives, workload)

    longest = config.max_position_embeddings
    capped, allowed = count(Workload(1, 4096)), count(Workload(1, longest))
    assert capped == allowed
    assert capped.workload == Workload(1, longest)
    assert Workload(generate=300).within(longest).context == longest
    (note,) = context_note(4096, capped.workload)
    assert note == "the model has 256 positions, so costs are for a context of 256 tokens instead of 4,096."
    assert context_note(longest, capped.workload) == []
