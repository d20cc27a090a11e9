"""``inspect --verify``: what holds of a model is said axis by axis, and what does not, with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import layersmith
from layersmith.block_config import BlockConfig
from layersmith.cli import app
from layersmith.heterogeneous.no_op import MatchingZeros, return_tuple_of_size
from layersmith.model_descriptor.stock import causal_lm_config
from layersmith.stages.verify import OK, verify
from tests.conformance.tiny import tiny_config
from tests.conftest import FAMILIES


def saved(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def verdicts_of(family: str, folder: Path) -> list[dict[str, str]]:
    found = verify(saved(causal_lm_config(tiny_config(family)), folder))
    assert set(found.whole.values()) == {OK}
    assert not found.failed
    return [verdicts for _, verdicts in found.layers]


def test_a_dense_model(tmp_path: Path) -> None:
    found = verify(saved(FAMILIES["qwen3"](), tmp_path))
    ((layers, verdicts),) = found.layers
    assert layers == "0, 1, 2, 3"
    wrong = {what for what, verdict in verdicts.items() if verdict != OK}
    assert wrong == {
        "experts",
        "expert width",
        "experts per token",
        "shared width",
        "mixer heads",
        "mixer head size",
        "state sizes",
        "window",
    }
    assert verdicts["experts"] == "its FFN has no experts"


def test_dense_and_expert_layers_are_told_apart(tmp_path: Path) -> None:
    dense, experts = verdicts_of("deepseek_v3", tmp_path)
    assert dense["FFN width"] == experts["experts"] == experts["expert width"] == OK
    assert experts["FFN width"] == "its FFN consists of experts"
    assert dense["KV heads"] == "its cache holds for every token what all heads share"
    assert dense["query heads"] == OK


def test_mixers(tmp_path: Path) -> None:
    mamba, attention = verdicts_of("granitemoehybrid", tmp_path)
    assert mamba["mixer heads"] == mamba["state sizes"] == OK
    assert mamba["query heads"] == "it has a mixer that keeps a state instead of keys and values"
    assert attention["mixer heads"] == attention["state sizes"] == "it keeps no state of fixed size in the cache"
    assert attention["query heads"] == OK


def test_a_parent_that_has_to_be_told_positions_is(tmp_path: Path) -> None:
    """Its first layer has no keys, and is asked how many tokens there are; ``generate`` tells it."""
    verdicts_of("bamba", tmp_path)


def test_windows(tmp_path: Path) -> None:
    windows = {verdicts["window"] for verdicts in verdicts_of("gemma2", tmp_path)}
    assert windows == {OK, "it does not see everything as it is"}


def test_a_proof_that_fails_turns_its_axis_off_with_the_reason(tmp_path: Path) -> None:
    """A norm without a scale sees all that is written to the state, so that nothing of it can be dead."""
    ((_, verdicts),) = verify(saved(causal_lm_config(tiny_config("falcon_mamba")), tmp_path)).layers
    assert re.match(r"removing dead numbers of the state changes the layer's output by \d", verdicts["state sizes"])
    assert verdicts["attention no-op"] == OK


def test_a_wrong_descriptor_is_found_out(tmp_path: Path) -> None:
    own = layersmith.describe(FAMILIES["llama"]())

    class Wrong(own):  # type: ignore[misc, valid-type]
        """Its attention no-op takes the FFN's norm away as well, and its groups leave out a norm."""

        @staticmethod
        def attn_no_op_post_init(decoder_layer: nn.Module) -> None:
            decoder_layer.self_attn = return_tuple_of_size(MatchingZeros, size=2)()
            decoder_layer.post_attention_layernorm = nn.Identity()

        @staticmethod
        def layer_name_predicates(num_layers: int) -> dict[str, re.Pattern[str]]:
            predicates = own.layer_name_predicates(num_layers)
            return predicates | {"lm_head": re.compile(r"^lm_head\..+$")}

        @classmethod
        def for_config(cls, config: Any) -> Any:
            return cls

    found = verify(saved(FAMILIES["llama"](), tmp_path), Wrong)
    assert found.failed
    assert found.whole["every weight in one group"] == "model.norm.weight is in 0 of them"
    verdicts = found.layers[0][1]
    assert verdicts["attention no-op"] != OK
    assert verdicts["FFN no-op"] == OK


def test_the_command(tmp_path: Path) -> None:
    folder = saved(causal_lm_config(tiny_config("mixtral")), tmp_path)
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert done.exit_code == 0, done.output
    assert re.search(r"experts per token\s+│\s+ok", done.output)
    assert "MixtralForCausalLM" in done.output


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_full_size_models_are_described_on_the_meta_device(family: str) -> None:
    """Hundreds of billions of parameters, of which none are made."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    blocks = layersmith.block_configs(config)
    assert len(blocks) == config.num_hidden_layers
    changed = [BlockConfig(blocks[0].attention, blocks[1].ffn), *blocks[1:]] if family == "gpt_oss" else blocks
    model = layersmith.build(config, changed, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) > 2e10
