"""What cannot be described is refused, and what cannot be taken out is not offered, for a reason that is true."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

import layersmith
from layersmith import BlockConfig
from layersmith.block_config import AttentionConfig
from layersmith.errors import UnsupportedModel
from layersmith.heterogeneous.build import child_config
from layersmith.model_descriptor.infer.descriptor import InferredDescriptor
from layersmith.model_descriptor.stock import causal_lm_config
from tests.conformance.tiny import tiny_config


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("florence2", "decoder.layers do not read the text"),
        ("mllama", "on text alone 1 of the 4 layers in model.layers do not run"),
        ("xlm", "in no layer in transformer.ffns does one token"),
        ("hrm_text", "run more than once"),
        ("zamba2", "modules that several layers share"),
    ],
)
def test_the_reason_of_a_refusal(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        layersmith.describe(causal_lm_config(tiny_config(model_type)))


def test_a_no_op_that_only_a_fresh_model_misses_is_not_offered() -> None:
    """In its first run this model scales a weight inside its attention; a module in its place has none."""
    descriptor = layersmith.describe(tiny_config("rwkv"))
    assert issubclass(descriptor, InferredDescriptor)
    assert not descriptor.attn_no_op_supported()
    assert "no attribute 'output'" in descriptor.findings.notes[0]


def test_a_state_that_the_model_collects_stays() -> None:
    descriptor = layersmith.describe(tiny_config("xlstm"))
    assert issubclass(descriptor, InferredDescriptor)
    assert descriptor.attn_no_op_supported()
    assert descriptor.layer_facts(0).attention_stays


def test_all_of_an_attention_moves_to_another_slot_of_the_cache() -> None:
    """Of the second layer's attention a no-op would take the last part only, since the third uses the rest."""
    if "hy_v4" not in CONFIG_MAPPING:
        pytest.skip("this version of Transformers does not know hy_v4")
    config = tiny_config("hy_v4")
    blocks = layersmith.block_configs(config)
    child = child_config(config, [BlockConfig(AttentionConfig(no_op=True), blocks[0].ffn), *blocks[1:]])
    record = child.layersmith["layers"][1]
    assert record["cache_slot"] == 0
    assert "self_attn" in record["cached"]
