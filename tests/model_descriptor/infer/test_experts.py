"""Experts that lie flat, one after another, in matrices."""

from __future__ import annotations

from transformers import DbrxConfig

import layersmith
from layersmith.block_config import MoEConfig
from layersmith.model_descriptor.infer.experts import experts_used, lie_flat
from layersmith.model_descriptor.infer.specimen import Specimen
from tests.conformance.tiny import tiny_config

NAMES = [f"ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")]
PREFIX = "transformer.blocks.0."


def test_rows_that_a_token_uses_tell_the_number_of_experts() -> None:
    specimen = Specimen(tiny_config("dbrx"))
    assert lie_flat(specimen, PREFIX, NAMES, 4)
    # In 3 or 16 blocks no token would use whole ones; in 2, and with a weight of all tokens, some tokens use both.
    assert not lie_flat(specimen, PREFIX, NAMES, 2)
    assert not lie_flat(specimen, PREFIX, [*NAMES, "norm_attn_norm.attn.Wqkv.weight"], 4)
    assert experts_used(specimen, PREFIX, NAMES, NAMES, 4) == 2


def test_a_small_specimen_in_which_a_token_uses_all_experts() -> None:
    config = DbrxConfig(
        d_model=256,
        n_heads=4,
        n_layers=8,
        vocab_size=997,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": 256, "ffn_hidden_size": 512, "moe_num_experts": 16, "moe_top_k": 4},
    )
    assert {block.ffn.moe for block in layersmith.block_configs(config)} == {MoEConfig(16, 4, 512, None)}
