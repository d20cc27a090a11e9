"""Times under a server's load from AIConfigurator. They need the extra ``serving`` and are skipped without it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

import layersmith
from layersmith.costs.aiconfigurator import ask, ask_whole, predict_served
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape
from layersmith.costs.times import Times
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.library.alternative import Alternative, child_blocks
from layersmith.library.formats import in_formats
from layersmith.recipe import LibraryRecipe
from layersmith.report.optional import read_clock
from layersmith.stages.inspect import Outline, outline
from tests.conftest import TINY_RECIPE

pytest.importorskip("aiconfigurator")

LOAD = Workload(batch=64, context=2048 + 256, generate=256)
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


def times_of(config: Any, tmp_path: Any, server: str = "vllm") -> tuple[Outline, Times]:
    config.save_pretrained(tmp_path)
    recipe = LibraryRecipe(ffn_fractions=(0.5,), head_fractions=(0.5,))
    space = outline(tmp_path, recipe, LOAD)
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    return space, predict_served("h100_sxm", server, shape, space.alternatives, LOAD)


def decilm(blocks: list[tuple[int | None, int | None]]) -> dict[str, Any]:
    """The published layout of children whose layers differ: KV heads and FFN width of each layer, None for none."""
    entries = [
        {
            "attention": {"n_heads_in_group": kv and 32 // kv, "no_op": kv is None, "replace_with_linear": False},
            "ffn": {"ffn_mult": width and 1.5 * width / 4096, "no_op": width is None, "replace_with_linear": False},
        }
        for kv, width in blocks
    ]
    config = LLAMA | {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "block_configs": entries}
    return config | {"num_key_value_heads": None, "intermediate_size": None}


def test_sums_are_what_whole_models_take(tmp_path: Any) -> None:
    """A child with other KV heads, another width and without an FFN, asked as a whole in another layout."""
    space, times = times_of(LlamaConfig(**LLAMA), tmp_path)
    parent = times.parent(space.alternatives)
    whole = ask("h100_sxm", "vllm", LLAMA, LOAD)
    assert parent.prefill == pytest.approx(whole.ttft, rel=0.01)
    assert parent.decode == pytest.approx(
        whole.mixed_share * sum(whole.mixed.values()) + (1 - whole.mixed_share) * sum(whole.decode.values()), rel=1e-6
    )
    chosen = {(a.layer, a.subblock): a for a in space.alternatives if a.is_parent}
    wanted = {(1, "attention"): "num_key_value_heads", (2, "ffn"): "no_op", (3, "ffn"): "intermediate_size"}
    for place, what in wanted.items():
        chosen[place] = next(
            a
            for a in space.alternatives
            if (a.layer, a.subblock) == place
            and not a.is_parent
            and (a.is_no_op if what == "no_op" else _changes_only(a, space, what))
        )
    kv = chosen[1, "attention"].block_config(space.blocks[1]).attention.num_key_value_heads
    width = chosen[3, "ffn"].block_config(space.blocks[3]).ffn.intermediate_size
    child = ask("h100_sxm", "vllm", decilm([(8, 14336), (kv, 14336), (8, None), (8, width)]), LOAD)
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    blocks = child_blocks(space.blocks, list(chosen.values()))
    assert ask_whole("h100_sxm", "vllm", shape, blocks, LOAD) == child.whole
    predicted = times.whole(a.key for a in chosen.values())
    assert predicted.prefill == pytest.approx(child.ttft, rel=0.02)
    asked = child.mixed_share * sum(child.mixed.values()) + (1 - child.mixed_share) * sum(child.decode.values())
    assert predicted.decode == pytest.approx(asked, rel=0.01)


def _changes_only(a: Any, space: Outline, key: str) -> bool:
    before, after = (
        getattr(block, a.subblock).to_dict() for block in (space.blocks[a.layer], a.block_config(space.blocks[a.layer]))
    )
    return {name for name in after if after[name] != before.get(name)} == {key}


def test_fewer_experts_and_other_servers(tmp_path: Any) -> None:
    config = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_hidden_layers=2, vocab_size=151936, decoder_sparse_step=1,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    space, times = times_of(config, tmp_path, "sglang")
    whole = {(a.layer, a.subblock): times.by_key[a.key] for a in space.alternatives if a.is_parent}
    for a in space.alternatives:
        assert times.by_key[a.key].decode <= whole[a.layer, a.subblock].decode * 1.001
    fewer = [a for a in space.alternatives if a.kind == "experts"]
    assert fewer
    assert all(times.by_key[a.key].decode < 0.95 * whole[a.layer, "ffn"].decode for a in fewer)


def test_formats_take_other_times(tmp_path: Any) -> None:
    """Weights of 4 bits are read faster in a decode step with few requests; a prompt gains little."""
    config = LlamaConfig(**LLAMA)
    config.save_pretrained(tmp_path)
    space, load = outline(tmp_path, LibraryRecipe(ffn_fractions=(), linear=()), LOAD), Workload(1, 2048 + 256, 256)
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    pairs = in_formats([a for a in space.alternatives if a.is_parent], ["int8", "int4-g128"])
    times = predict_served("h100_sxm", "vllm", shape, [*space.alternatives, *pairs], load)
    alone = predict_served("h100_sxm", "vllm", shape, space.alternatives, load).parent(space.alternatives)
    with_formats = times.parent(space.alternatives)
    assert (with_formats.prefill, with_formats.decode) == pytest.approx((alone.prefill, alone.decode), rel=1e-3)
    for subblock in ("attention", "ffn"):
        whole = Alternative(0, subblock, "parent")
        bf16, int8, int4 = (times.by_key[whole.in_format(name).key] for name in ("", "int8", "int4-g128"))
        assert int4.decode < int8.decode < bf16.decode
        asked = ask("h100_sxm", "vllm", LLAMA, load, "int4_wo")
        assert int4.decode == pytest.approx(asked.of(subblock)[1] / 4)
    with pytest.raises(UsageError, match="no times for them"):
        predict_served("h100_sxm", "vllm", shape, [Alternative(0, "ffn", "parent", format="nvfp4")], load)


def test_what_is_not_known_is_refused(tmp_path: Any) -> None:
    config = LlamaConfig(**LLAMA)
    config.save_pretrained(tmp_path)
    space = outline(tmp_path, LibraryRecipe(), LOAD)
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    with pytest.raises(UsageError, match="h200_sxm"):
        predict_served("h2000", "vllm", shape, space.alternatives, LOAD)
    with pytest.raises(UsageError, match="tensorrt-llm"):
        predict_served("h200_sxm", "ollama", shape, space.alternatives, LOAD)
    with pytest.raises(UnsupportedModel, match="AIConfigurator has no times for this model"):
        ask("h200_sxm", "vllm", LLAMA | {"architectures": ["Nobody"]}, LOAD)


def test_the_final_child_is_asked_as_a_whole(make_parent: Any, text_folder: Any, tmp_path: Any) -> None:
    """The report has the sum over its parts and the answer for the whole child."""
    quick = TINY_RECIPE | {
        "local_distillation": {"tokens": 0, "coupled_tokens": 0},
        "library": {"ffn_fractions": [0.5], "linear": [], "query_heads": False},
        "costs": {"device": "h100_sxm", "server": "vllm"},
    }
    parent = make_parent("llama", num_hidden_layers=2)
    budget = {"throughput": "1.2x", "batch": 8, "context": 64, "generate": 16}
    result = layersmith.compress(parent, tmp_path / "run", data=text_folder, budget=budget, recipe=quick)
    clock = read_clock(result.run)
    assert clock is not None
    assert clock.predicted
    assert clock.child["token_seconds"] < clock.parent["token_seconds"]
    report = json.loads((result.run / "report.json").read_text())
    times = [c for c in report["checks"]["times"] if c["what"] == "this child"]
    assert {c["phase"] for c in times} == {"prefill", "decode"}
    assert all(c["predicted"] == pytest.approx(c["measured"], rel=0.15) for c in times)  # a model of microseconds
    assert "predicted for h100_sxm, vllm" in (result.run / "report.html").read_text()
