import dataclasses
import json

import pytest

from layersmith import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from layersmith.errors import UsageError

BLOCKS = [
    BlockConfig(),
    BlockConfig(AttentionConfig(num_key_value_heads=2), FFNConfig(intermediate_size=512)),
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(replace_with_linear=True)),
    BlockConfig(AttentionConfig(inner_sizes={"head_dim": 8}), FFNConfig(inner_sizes={"latent_size": 4})),
    BlockConfig(
        AttentionConfig(mamba=MambaConfig(state_dim=16, num_heads=4, head_dim=8, num_groups=2)),
        FFNConfig(moe=MoEConfig(num_local_experts=8, num_experts_per_tok=2, expert_intermediate_dim=64)),
    ),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_json_both_ways(block: BlockConfig) -> None:
    assert BlockConfig.from_dict(json.loads(block.to_json())) == block
    assert BlockConfig.from_dict(json.loads(json.dumps(block.to_dict()))) == block
    assert hash(block) == hash(BlockConfig.from_dict(json.loads(block.to_json())))


@pytest.mark.parametrize("cls", [AttentionConfig, FFNConfig, MoEConfig, MambaConfig, BlockConfig])
def test_frozen(cls: type) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"intermediat_size.*Did you mean 'intermediate_size'"):
        BlockConfig.from_dict({"ffn": {"intermediat_size": 3}})
    with pytest.raises(UsageError, match="'mlp'"):
        BlockConfig.from_dict({"mlp": {}})


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (FFNConfig, {"intermediate_size": 0}),
        (FFNConfig, {"intermediate_size": "wide"}),
        (FFNConfig, {"intermediate_size": True}),
        (AttentionConfig, {"num_key_value_heads": -1}),
        (AttentionConfig, {"num_key_value_heads": 1.5}),
        (AttentionConfig, {"no_op": "yes"}),
        (AttentionConfig, {"no_op": True, "replace_with_linear": True}),
        (MoEConfig, {"num_local_experts": 2, "num_experts_per_tok": 3}),
        (MambaConfig, {"state_dim": 0, "num_heads": 1, "head_dim": 1, "num_groups": 1}),
    ],
)
def test_values_are_checked(cls: type, fields: dict) -> None:
    with pytest.raises(UsageError):
        cls(**fields)


def test_a_removed_subblock_has_no_size() -> None:
    narrow = dataclasses.replace(AttentionConfig(num_key_value_heads=4), no_op=True)
    assert narrow.num_key_value_heads is None
    assert narrow == AttentionConfig(no_op=True)


def test_reads_an_entry_of_the_peer() -> None:
    entry = {
        "attention": {
            "llama4": None, "mamba": None, "no_op": False, "num_key_value_heads": 2,
            "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16",
        },
        "ffn": {
            "intermediate_size": 192, "moe": None, "no_op": False,
            "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16",
        },
        "parallel_blocks": None,
    }  # fmt: skip
    block = BlockConfig.from_dict(entry)
    assert block.attention.num_key_value_heads == 2
    assert block.ffn.intermediate_size == 192
