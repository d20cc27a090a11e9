"""No-ops of layers whose attention selects the tokens that later layers attend to."""

from __future__ import annotations

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import layersmith
from layersmith import BlockConfig
from layersmith.block_config import AttentionConfig
from layersmith.model_descriptor.infer import shrink
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.stock import stock_model
from tests.conftest import randomize

LAYERS = 7
CHOOSES, PASSES = "full", "shared"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> PretrainedConfig:
    """A config that is shrunk for the experiments; its heads together are wider than the hidden states."""
    monkeypatch.setattr(shrink, "_WHOLE", 0)
    return CONFIG_MAPPING["glm_moe_dsa"](
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=48,
        v_head_dim=64,
        index_topk=16,
        index_head_dim=32,
        index_n_heads=8,
        indexer_types=[CHOOSES, CHOOSES, PASSES, PASSES, PASSES, CHOOSES, PASSES],
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def test_a_layer_without_attention_still_passes_the_selected_tokens(config: PretrainedConfig) -> None:
    parent = stock_model(config, "cpu", torch.float32).eval()
    randomize(parent)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in parent.named_parameters():
            if "norm" in name:  # a norm that is left out has to show in what is chosen
                weight.mul_(torch.rand(weight.shape, generator=generator) * 4)
    ids = torch.arange(40)[None] * 11 + 3
    blocks = layersmith.block_configs(config)
    for gone in ([1], [2], [1, 3, 6]):
        without = [
            BlockConfig(AttentionConfig(no_op=True), block.ffn) if i in gone else block
            for i, block in enumerate(blocks)
        ]
        child = layersmith.build(config, without, dtype=torch.float32).eval()
        names = set(child.state_dict())
        child.load_state_dict({name: weight for name, weight in parent.state_dict().items() if name in names})
        left = {int(name.split(".")[2]) for name in names if ".self_attn." in name}
        assert left.isdisjoint(i for i in gone if config.indexer_types[i] == PASSES)
        silenced = {f"model.layers.{i}.self_attn": None for i in gone}
        with torch.no_grad():
            with Specimen.silenced_in(parent, silenced):
                wanted = parent(input_ids=ids, use_cache=False).logits
            assert torch.equal(child(input_ids=ids, use_cache=False).logits, wanted)
