"""Which parts of a model Transformers' plans divide; that divided models train as whole ones is in test_sharded.py."""

from __future__ import annotations

from typing import Any

import pytest

import layersmith
from layersmith.execution.tensor_parallel import plan_of, whole_parts, why_not_divided
from layersmith.model_descriptor.describe import describe
from tests.conformance.tiny import tiny_config
from tests.conftest import FAMILIES, NO_ATTENTION, block


def on_meta(config: Any, blocks: Any = None) -> Any:
    return layersmith.build(config, blocks or layersmith.block_configs(config), device="meta")


def test_heads_and_channels_that_cannot_be_shared_equally_stay_whole() -> None:
    config = FAMILIES["llama_tied"](vocab_size=511)
    blocks = [
        block({"num_key_value_heads": 1}),
        block(ffn={"intermediate_size": 33}),
        block(NO_ATTENTION, {"replace_with_linear": True}),
        block({"num_key_value_heads": 2}),
    ]
    child, descriptor = on_meta(config, blocks), describe(config)
    head = ["lm_head", "model.embed_tokens"]
    left = [*head, "model.layers.0.self_attn", "model.layers.1.mlp"]
    assert sorted(whole_parts(child, descriptor, 2)) == left
    assert sorted(whole_parts(child, descriptor, 4)) == [*left, "model.layers.3.self_attn"]
    assert whole_parts(child, descriptor, 1) == []
    parts = plan_of(child, descriptor)
    assert set(parts) == {
        *head,
        *left,
        *(f"model.layers.{i}.{part}" for i in (0, 1, 3) for part in ("self_attn", "mlp")),
    }
    assert parts["model.layers.3.mlp"]["model.layers.3.mlp.down_proj.weight"] == "rowwise"


@pytest.mark.parametrize(("number", "is_whole"), [(2, False), (32, False), (36, True), (64, True)])
def test_experts_are_divided_by_channels(number: int, is_whole: bool) -> None:
    config = tiny_config("mixtral")  # experts of 96 channels
    whole = whole_parts(on_meta(config), describe(config), number)
    assert [part for part in whole if "mlp" in part] == [f"model.layers.{i}.mlp" for i in range(4) if is_whole]


def test_a_fused_projection_whose_output_is_gathered_divides_any_number_of_heads() -> None:
    config = tiny_config("phi3")
    config.num_attention_heads, config.num_key_value_heads = 3, 3
    config.hidden_size, config.vocab_size = 48, 100
    assert whole_parts(on_meta(config), describe(config), 2) == []


@pytest.mark.parametrize(
    ("family", "has_plan"), [("qwen3", True), ("mixtral", True), ("gpt2", False), ("bamba", False)]
)
def test_models_without_a_plan_are_known(family: str, has_plan: bool) -> None:
    config = tiny_config(family)
    why = why_not_divided(on_meta(config), describe(config), 2)
    assert (why is None) == has_plan
    assert has_plan or "has no plan for the layers of" in str(why)
    assert not has_plan or "5 processes can share" in str(why_not_divided(on_meta(config), describe(config), 5))
