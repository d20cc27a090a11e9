"""The table of the kinds of alternatives."""

from typing import get_args

import pytest

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from layersmith.library.alternative import KINDS, Alternative
from layersmith.recipe import Trainable

DENSE = BlockConfig(
    AttentionConfig(num_key_value_heads=4, num_attention_heads=8, layer_type="full_attention"),
    FFNConfig(intermediate_size=96),
)
MIXED = BlockConfig(
    AttentionConfig(mamba=MambaConfig(num_heads=8, num_groups=4, head_dim=16, state_dim=16)),
    FFNConfig(
        moe=MoEConfig(
            num_local_experts=8, num_experts_per_tok=1, expert_intermediate_dim=32, shared_expert_intermediate_dim=16
        )
    ),
)


def test_a_recipe_can_name_every_kind_that_has_weights() -> None:
    assert set(get_args(Trainable)) == {name for name, kind in KINDS.items() if kind.has_weights}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sets_its_size_and_nothing_else(kind: str) -> None:
    of_both = kind in ("parent", "no_op", "linear")
    subblocks = (
        ("attention", "ffn") if of_both else ("attention",) if KINDS[kind].label.startswith("attention") else ("ffn",)
    )
    parent = MIXED if any("." in path for path in KINDS[kind].sizes) else DENSE
    for subblock in subblocks:
        a = Alternative(0, subblock, kind, "sliding_attention" if kind == "window" else "", size=2, query_heads=4)
        before, after = vars(parent.subblock(subblock)), vars(a.subblock_config(parent))
        assert all(after[name] == value for name, value in KINDS[kind].sets.items())
        if not KINDS[kind].sets:  # a removed subblock has no sizes either
            changed = {name for name in before if before[name] != after[name]}
            assert changed == {path.split(".")[0] for path in KINDS[kind].sizes}
        assert a.name
        other = "ffn" if subblock == "attention" else "attention"
        assert a.block_config(parent).subblock(other) == parent.subblock(other)
