"""Axes of families that are laid out in other ways: proved on their weights, and children made along them.

The models are tiny and random; each family is here for something that none of the others has.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import layersmith
from layersmith import BlockConfig, FFNConfig
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape, subblock_costs
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import Survey, survey
from layersmith.model_descriptor.stock import causal_lm_config
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime
from tests.conformance.tiny import tiny_config, tiny_model

TOKENS = torch.randint(5, 90, (4, 24), generator=torch.Generator().manual_seed(3))

# Family to the kinds of alternatives that it must have beside no-ops.
KINDS = {
    "gpt2": {"ffn_width"},  # Conv1D, a width that its config leaves out
    "phi3": {"kv_heads", "head_groups", "query_heads", "ffn_width"},  # fused queries, keys, values; fused gate and up
    "olmo2": {"kv_heads", "ffn_width"},  # a norm over all keys, norms after
    "mixtral": {"kv_heads", "experts", "expert_width", "experts_per_token"},
    "gpt_oss": {"kv_heads", "query_heads", "experts", "expert_width"},  # sinks, biases, gate and up interleaved
    "deepseek_v3": {"head_groups", "experts", "expert_width"},  # latent attention, a bias for choosing, shared experts
    "qwen2_moe": {"experts", "shared_width"},  # shared experts with a width of their own
    # Linear attention in some layers, its parts fused group by group; gates beside queries.
    "qwen3_next": {"kv_heads", "experts", "mixer_heads", "mixer_groups", "mixer_head_size", "state_size"},
    "granitemoehybrid": {"kv_heads", "experts", "mixer_heads", "mixer_head_size", "state_size"},  # Mamba in some layers
    "nemotron_h": {
        "kv_heads",
        "ffn_width",
        "mixer_heads",
        "mixer_groups",
        "mixer_head_size",
        "state_size",
    },  # one subblock a layer
    "bamba": {
        "kv_heads",
        "mixer_heads",
        "mixer_head_size",
        "state_size",
    },  # the width of all heads is said as a multiple
    "jamba": {"kv_heads", "experts", "state_size"},  # Mamba without heads, norms of what writes to the state
    "doge": {"query_heads"},  # query heads in groups, and a number of KV heads that cannot differ alone
    # Two attentions a layer, and experts that do nothing beside the others.
    "longcat_flash": {"head_groups", "experts", "expert_width", "experts_per_token", "shared_width"},
    "dbrx": {"kv_heads", "experts", "expert_width", "experts_per_token"},  # experts flat, one after another
    # Experts in the attention too, of the same number: heads end in a stack of projections.
    "jetmoe": {"head_groups", "experts", "expert_width", "experts_per_token"},
    "diffllama": {"kv_heads", "head_groups", "query_heads", "ffn_width"},  # a head of either half of all is one head
    # Stacks of shared experts beside those of the others; heads counted by other attributes where there is a window.
    "inkling_text": {"kv_heads", "query_heads", "experts", "expert_width", "experts_per_token"},
    "minimax": {"kv_heads", "query_heads", "experts", "expert_width"},  # heads in layers of two kinds by one attribute
}


def parent_of(family: str) -> Parent:
    return parent_of_config(causal_lm_config(tiny_config(family)), family)


def parent_of_config(config: PretrainedConfig, family: str) -> Parent:
    model = tiny_model(config).requires_grad_(False)
    blocks = tuple(layersmith.block_configs(config))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    return Parent("", model, torch.float32, layersmith.describe(config), blocks, family, runtime)


@pytest.fixture(scope="module", params=sorted(KINDS))
def library(request: pytest.FixtureRequest) -> Library:
    parent, recipe = parent_of(request.param), LibraryRecipe(linear=())
    return build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 2))


def test_every_axis_is_offered(library: Library) -> None:
    kinds = {a.kind for a in library.alternatives}
    assert kinds >= KINDS[library.parent.identity] | {"no_op"}, library.notes


def test_every_alternative_runs_and_changes_something(library: Library) -> None:
    """In its place it gives finite logits that are not the parent's, and what it shares with the parent is shared."""
    parent = library.parent
    before = forward(parent, TOKENS)[0]
    tried = {}
    for alternative in library.alternatives:
        if alternative.kind not in ("parent", "no_op"):
            tried.setdefault((alternative.layer, alternative.kind, alternative.method), alternative)
    for alternative in tried.values():
        with exchanged(parent, library.layers([alternative])):
            after = forward(parent, TOKENS)[0]
        assert bool(after.isfinite().all()), alternative.key
        assert not torch.equal(after, before), alternative.key


@torch.no_grad()
def test_a_child_along_every_axis_is_what_was_scored(library: Library, tmp_path: Path) -> None:
    parent = library.parent
    chosen: dict[tuple[int, str], Alternative] = {}
    used: dict[str, int] = {}
    for alternative in library.alternatives:
        place = (alternative.layer, alternative.subblock)
        if alternative.kind not in ("parent", "no_op"):
            now = chosen.get(place)
            if now is None or used.get(alternative.kind, 0) < used.get(now.kind, 0):
                if now is not None:
                    used[now.kind] -= 1
                chosen[place] = alternative
                used[alternative.kind] = used.get(alternative.kind, 0) + 1
    with exchanged(parent, library.layers(list(chosen.values()))):
        scored = forward(parent, TOKENS)[0]
    child = library.compose(list(chosen.values()))
    assert torch.equal(child(TOKENS, use_cache=False).logits, scored)
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS, use_cache=False).logits, scored)


def test_experts_that_add_most_stay() -> None:
    """An expert whose output is made ten times as large is the last to go; channels that nothing reads go first."""
    parent = parent_of("mixtral")
    down = parent.layers[1].get_parameter("mlp.experts.down_proj")
    with torch.no_grad():
        down[2] *= 10
        down[1][:, ::2] = 0
    recipe = LibraryRecipe(linear=())
    library = build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 2))
    assert int(library.orders["1.experts"][0]) == 2
    order = library.orders["1.ffn.0"]
    width = order.shape[1]
    assert set(order[1, width // 2 :].tolist()) == set(range(0, width, 2))
    assert order.shape[0] == 4


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "olmo3"])
def test_a_window_is_the_familys_own(family: str, tmp_path: Path) -> None:
    """As scored, as composed, as loaded again, and as the stock model whose config says so from the start."""
    config = causal_lm_config(tiny_config(family))
    full = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    config.sliding_window = 6
    parent = parent_of_config(config, family)
    recipe = LibraryRecipe(linear=(), query_heads=False)
    library = Library(parent, (space := survey(parent, recipe)).axes, space.alternatives, {}, {}, space.notes)
    (chosen,) = (a for a in space.alternatives if a.kind == "window" and a.layer == full[0])
    with exchanged(parent, library.layers([chosen])):
        scored = forward(parent, TOKENS)[0]
    assert parent.config.layer_types == config.layer_types
    assert not torch.equal(scored, forward(parent, TOKENS)[0])
    child = library.compose([chosen])
    assert torch.equal(child(TOKENS, use_cache=False).logits, scored)
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS, use_cache=False).logits, scored)
    windowed = copy.deepcopy(config)
    windowed.layer_types = [
        "sliding_attention" if i == full[0] else layer_type for i, layer_type in enumerate(config.layer_types)
    ]
    stock = tiny_model(windowed)
    stock.load_state_dict(parent.model.state_dict())
    assert torch.equal(stock(TOKENS, use_cache=False).logits, scored)


def test_several_attentions_and_experts_that_do_nothing() -> None:
    """Two attentions and two dense FFNs a layer, and identities beside the experts, with rows in a stack."""
    parent = parent_of("longcat_flash")
    space = survey(parent, LibraryRecipe())
    axes = space.axes[0]
    assert axes.shared is not None
    assert axes.kv is not None
    assert [b.reader for b in axes.shared.bundles] == ["mlps.0.down_proj.weight", "mlps.1.down_proj.weight"]
    assert [a.reader for a in axes.kv.attentions] == ["self_attn.0.o_proj.weight", "self_attn.1.o_proj.weight"]
    library = build_library(parent, LibraryRecipe(), space, Calibration(TOKENS, 2))
    weights = parent.layers[0].state_dict()
    (fewer,) = (a for a in library.alternatives if (a.layer, a.kind, a.size) == (0, "head_groups", 2))
    cut = library.weights(fewer)
    for number, name in enumerate(("0.attention", "0.attention.1")):
        reader = f"self_attn.{number}.o_proj.weight"
        heads = library.orders[name][:2].sort().values
        assert torch.equal(cut[reader], weights[reader].unflatten(1, (4, -1))[:, heads].flatten(1))
    (fewer,) = (a for a in library.alternatives if (a.layer, a.kind, a.size) == (0, "experts", 4))
    stack, left = weights["mlp.experts.gate_up_proj"], library.orders["0.experts"][:4].sort().values
    assert torch.equal(library.weights(fewer)["mlp.experts.gate_up_proj"], torch.cat([stack[left], stack[8:]]))
    # A token uses its experts' rows and none of those that do nothing.
    _, parts = costs_of(parent, space)
    assert parts[0]["ffn"]["parameters"] - parts[0]["ffn"]["active_parameters"] == (
        stack.numel() + weights["mlp.experts.down_proj"].numel()
        - 4 * (stack[0].numel() + weights["mlp.experts.down_proj"][0].numel())
    )  # fmt: skip


def test_heads_that_end_in_blocks() -> None:
    """Equally many of each block stay, each block its own; what a block reads of the others' places it never did."""
    parent = parent_of("deepseek_v4")
    space = survey(parent, LibraryRecipe())
    assert {a.size for a in space.alternatives if a.kind == "query_heads"} == {2}
    library = build_library(parent, LibraryRecipe(), space, Calibration(TOKENS, 2))
    (fewer,) = (a for a in library.alternatives if (a.layer, a.kind) == (0, "query_heads"))
    weight, order = parent.layers[0].state_dict()["self_attn.o_a_proj.weight"], library.orders["0.queries"]
    assert order.sort(-1).values.tolist() == [[0, 1], [2, 3]]
    rows, size = len(weight) // 2, weight.shape[1] // 2  # of a block, of a head
    places = [int(order[block, 0]) - 2 * block for block in range(2)]
    expected = [weight[b * rows : (b + 1) * rows, at * size : (at + 1) * size] for b, at in enumerate(places)]
    assert torch.equal(library.weights(fewer)["self_attn.o_a_proj.weight"], torch.cat(expected))


def test_heads_in_pairs() -> None:
    """A pair takes one head of either half of all queries, keys and values; it ends in neighbouring places."""
    parent = parent_of("diffllama")
    space = survey(parent, LibraryRecipe())
    kv = space.axes[0].kv
    assert kv is not None
    assert (kv.size, kv.num_heads, kv.together) == (2, 4, 2)  # 4 KV heads and 8 query heads
    library = build_library(parent, LibraryRecipe(), space, Calibration(TOKENS, 2))
    (fewer,) = (a for a in library.alternatives if (a.layer, a.kind) == (0, "head_groups"))
    assert (fewer.size, fewer.query_heads) == (2, 4)
    weights, cut = parent.layers[0].state_dict(), library.weights(fewer)
    (kept,) = library.orders["0.attention"][:1].tolist()
    for name in ("k_proj", "v_proj"):
        rows = weights[f"self_attn.{name}.weight"].unflatten(0, (2, 2, -1))[:, kept].flatten(0, 1)
        assert torch.equal(cut[f"self_attn.{name}.weight"], rows)
    rows = weights["self_attn.q_proj.weight"].unflatten(0, (2, 2, 2, -1))[:, kept].flatten(0, 2)
    assert torch.equal(cut["self_attn.q_proj.weight"], rows)
    columns = weights["self_attn.o_proj.weight"].unflatten(1, (2, -1))[:, kept]
    assert torch.equal(cut["self_attn.o_proj.weight"], columns)


def test_keys_head_after_head_that_are_cached_for_each_query() -> None:
    """Falcon's newer layers: one projection has each head's queries, key and value; the cache has a key a query."""
    config = causal_lm_config(tiny_config("falcon"))
    config.new_decoder_architecture, config.num_kv_heads = True, 2
    parent = parent_of_config(config, "falcon")
    recipe = LibraryRecipe(linear=(), no_op=())
    library = build_library(parent, recipe, space := survey(parent, recipe), Calibration(TOKENS, 2))
    fewer = next(a for a in library.alternatives if (a.layer, a.kind) == (0, "kv_heads") and a.method != "pool")
    with exchanged(parent, library.layers([fewer])):
        scored = forward(parent, TOKENS)[0]
    child = library.compose([fewer])
    assert torch.equal(child(TOKENS, use_cache=False).logits, scored)
    keys = child(TOKENS, use_cache=True).past_key_values.layers[0].keys
    _, parts = costs_of(parent, space)
    blocks = [fewer.block_config(parent.blocks[0]), *parent.blocks[1:]]
    cut, _ = subblock_costs(ModelShape(parent.descriptor, parent.config, blocks, space.axes, torch.float32), Workload())
    assert cut[0]["attention"]["kv_cache_bytes"] == parts[0]["attention"]["kv_cache_bytes"]
    assert parts[0]["attention"]["kv_cache_bytes"] == Workload().context * 2 * keys.shape[1] * keys.shape[-1] * 4


def test_numbers_that_the_attention_and_the_ffn_share_differ_in_the_ffn_alone(tmp_path: Path) -> None:
    parent = parent_of("jetmoe")
    space = survey(parent, LibraryRecipe())
    axes, moe = space.axes[0], parent.blocks[0].ffn.moe
    assert axes.experts is not None
    assert moe is not None
    assert (moe.num_local_experts, moe.num_experts_per_tok) == (4, 2)
    fewer = FFNConfig(moe=replace(moe, num_local_experts=3, num_experts_per_tok=1, expert_intermediate_dim=16))
    blocks = [BlockConfig(parent.blocks[0].attention, fewer), *parent.blocks[1:]]
    child = layersmith.build(parent.config, blocks, dtype=torch.float32).eval()
    layer = child.get_submodule("model.layers.0")
    assert layer.self_attention.experts.input_linear.weight.shape[0] == 4
    assert layer.mlp.input_linear.weight.shape == (3, 32, 64)
    assert (layer.mlp.router.num_experts, layer.mlp.router.top_k, layer.self_attention.top_k) == (3, 1, 2)
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS).logits, child(TOKENS).logits)
    _, parts = costs_of(parent, space)
    stacks = sum(p.numel() for n, p in parent.layers[0].mlp.named_parameters() if p.ndim == 3)
    assert parts[0]["ffn"]["parameters"] - parts[0]["ffn"]["active_parameters"] == stacks // 2


def costs_of(parent: Parent, space: Survey) -> tuple[dict[str, int], list[dict[str, dict[str, int]]]]:
    shape = ModelShape(parent.descriptor, parent.config, parent.blocks, space.axes, torch.float32)
    layers, fixed = subblock_costs(shape, Workload())
    return fixed, layers


@torch.no_grad()
def test_layers_that_use_each_others_keys() -> None:
    """What stands in an attention's place is asked for what the attention was; what others need of it stays."""
    parent = parent_of("gemma3n_text")  # layers 2 and 3 use the keys and values of layers 0 and 1
    space = survey(parent, LibraryRecipe())
    library = build_library(parent, LibraryRecipe(), space, Calibration(TOKENS, 2))
    kinds = {(a.layer, a.kind) for a in library.alternatives if a.subblock == "attention" and a.kind != "parent"}
    heads_and_no_op = {(i, kind) for i in range(4) for kind in ("query_heads", "no_op")}
    # Layer 3 looks for the keys of layer 1 under the name of what that is.
    assert kinds == heads_and_no_op | {(2, "linear"), (3, "linear"), (3, "window")}
    assert space.axes[1].reasons["window"] == "it does not run with a window ('full_attention')"
    assert all(axes.kv is not None and axes.kv.size == 2 for axes in space.axes)
    assert "The attention is not replaced by a linear map in layers 0, 1: other layers use" in "\n".join(space.notes)
    chosen = [a for a in library.alternatives if (a.layer, a.kind) in {(2, "linear"), (1, "query_heads")}]
    with exchanged(parent, library.layers(chosen)):
        scored = forward(parent, TOKENS)[0]
    assert torch.equal(library.compose(chosen)(TOKENS, use_cache=False).logits, scored)


def test_a_linear_map_replaces_all_of_a_subblock_or_nothing() -> None:
    parent = parent_of("biogpt")  # the two matrices of its FFN lie in the layer itself
    space = survey(parent, LibraryRecipe())
    assert {a.subblock for a in space.alternatives if a.kind == "linear"} == {"attention"}
    assert any("the ffn also consists of fc1.weight, next to fc2" in note for note in space.notes)


def test_what_does_not_run_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the axis holds with another size."""
    config = causal_lm_config(tiny_config("llama"))
    config.num_key_value_heads = 1
    parent = parent_of_config(config, "llama")
    original = LlamaAttention.forward

    def forward_of_even_heads(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        if self.q_proj.out_features == 3 * self.head_dim:
            raise ValueError("three are odd")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward_of_even_heads)
    space = survey(parent, LibraryRecipe())
    assert {a.size for a in space.alternatives if a.kind == "query_heads"} == {2, 1}
    note = (
        "attention 3 query heads (contribution) is not offered in any layer: it does not run with it (three are odd)."
    )
    assert note in space.notes


@torch.no_grad()
def test_heads_whose_keys_come_from_one_cache_go_whatever_the_config_says() -> None:
    """A number of KV heads that is read for nothing but how often keys are repeated goes along with the queries."""
    config = causal_lm_config(tiny_config("deepseek_v3"))
    config.update({"num_attention_heads": 6, "num_key_value_heads": 4})
    parent = parent_of_config(config, "deepseek_v3")
    space = survey(parent, LibraryRecipe(linear=()))
    kv = space.axes[0].kv
    assert kv is not None
    assert (kv.num_heads, kv.fewer_groups) == (6, True)
    library = build_library(parent, LibraryRecipe(linear=()), space, Calibration(TOKENS, 2))
    chosen = [next(a for a in library.alternatives if (a.layer, a.kind, a.size) == (0, "head_groups", 3))]
    child = library.compose(chosen)
    wanted = child(TOKENS, use_cache=False).logits
    child.set_attn_implementation("eager")  # where keys are repeated
    torch.testing.assert_close(child(TOKENS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)


def test_queries_of_which_the_keys_have_the_mean() -> None:
    """Three to each key: those that go are made copies of the one of the same key that stays."""
    config = causal_lm_config(tiny_config("zaya"))
    config.update({"num_attention_heads": 6, "num_key_value_heads": 2})
    axes = survey(parent_of_config(config, "zaya"), LibraryRecipe()).axes
    assert all(
        layer_axes.kv is not None and (layer_axes.kv.size, layer_axes.kv.fewer_queries) == (2, True)
        for layer_axes in axes
    )


def test_experts_that_tokens_have_by_a_table_stay() -> None:
    parent = parent_of("deepseek_v4")
    axes = survey(parent, LibraryRecipe()).axes
    tables = [i for i, layer in enumerate(parent.layers) if any("tid2eid" in name for name in layer.state_dict())]
    assert tables == [0, 3]
    why = "no score chooses among its experts: mlp.gate.tid2eid assigns them to tokens"
    assert {
        i: layer_axes.reasons["experts"] for i, layer_axes in enumerate(axes) if "experts" in layer_axes.reasons
    } == {0: why, 3: why}
