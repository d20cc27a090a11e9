"""``inspect --verify`` reports for each axis whether it works for a model, and otherwise the reason."""

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
    verification = verify(saved(causal_lm_config(tiny_config(family)), folder))
    assert set(verification.whole.values()) == {OK}
    assert not verification.failed
    return [verdicts for _, verdicts in verification.layers]


def test_a_dense_model(tmp_path: Path) -> None:
    verification = verify(saved(FAMILIES["qwen3"](), tmp_path))
    ((layers, verdicts),) = verification.layers
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
        "key head size",
        "value head size",
        "rank",
        "latent width",
    }
    assert verdicts["head size"] == OK
    assert verdicts["experts"] == "its FFN has no experts"


def test_dense_and_expert_layers_are_distinguished(tmp_path: Path) -> None:
    dense, experts = verdicts_of("deepseek_v3", tmp_path)
    assert dense["FFN width"] == experts["experts"] == experts["expert width"] == OK
    assert experts["FFN width"] == "its FFN consists of experts"
    assert dense["KV heads"] == "its cache holds one latent vector per token, which all heads share"
    assert dense["query heads"] == OK


def test_mixers(tmp_path: Path) -> None:
    mamba, attention = verdicts_of("granitemoehybrid", tmp_path)
    assert mamba["mixer heads"] == mamba["state sizes"] == OK
    assert mamba["query heads"] == "it has a mixer that keeps a state instead of keys and values"
    assert attention["mixer heads"] == attention["state sizes"] == "it keeps no state of fixed size in the cache"
    assert attention["query heads"] == OK


def test_a_parent_that_needs_positions_gets_them(tmp_path: Path) -> None:
    """Its first layer has no keys to show the length of the cache, so ``generate`` passes positions."""
    verdicts_of("bamba", tmp_path)


def test_windows(tmp_path: Path) -> None:
    windows = {verdicts["window"] for verdicts in verdicts_of("gemma2", tmp_path)}
    assert windows == {OK, "it does not see everything as it is"}


def test_a_proof_that_fails_turns_its_axis_off_with_the_reason(tmp_path: Path) -> None:
    """A norm without a scale depends on all numbers of the state, so none of them can be dead."""
    ((_, verdicts),) = verify(saved(causal_lm_config(tiny_config("falcon_mamba")), tmp_path)).layers
    assert re.match(r"removing dead numbers of the state changes the layer's output by \d", verdicts["state sizes"])
    assert verdicts["attention no-op"] == OK


def test_the_question_that_refuted_a_no_op_is_printed(tmp_path: Path) -> None:
    """The model of rwkv reads weights of its attentions, which zeros do not have."""
    folder = saved(causal_lm_config(tiny_config("rwkv")), tmp_path)
    verification = verify(folder)
    question = verification.refuted[0]
    assert question.startswith("Does a fresh model run without attention and feed_forward of rwkv.blocks.0? no: the")
    printed = CliRunner().invoke(app, ["inspect", str(folder), "--verify"]).output
    assert " ".join(question.split()) in " ".join(printed.split())


def test_a_wrong_descriptor_is_detected(tmp_path: Path) -> None:
    inferred = layersmith.describe(FAMILIES["llama"]())

    class Wrong(inferred):  # type: ignore[misc, valid-type]
        """Its attention no-op removes the FFN's norm too, and no group has the final norm."""

        @staticmethod
        def attn_no_op_post_init(decoder_layer: nn.Module) -> None:
            decoder_layer.self_attn = return_tuple_of_size(MatchingZeros, size=2)()
            decoder_layer.post_attention_layernorm = nn.Identity()

        @staticmethod
        def layer_name_predicates(num_layers: int) -> dict[str, re.Pattern[str]]:
            predicates = inferred.layer_name_predicates(num_layers)
            return predicates | {"lm_head": re.compile(r"^lm_head\..+$")}

        @classmethod
        def for_config(cls, config: Any) -> Any:
            return cls

    verification = verify(saved(FAMILIES["llama"](), tmp_path), Wrong)
    assert verification.failed
    assert verification.whole["every weight in one group"] == "model.norm.weight is in 0 groups"
    verdicts = verification.layers[0][1]
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
    """Models of hundreds of billions of parameters are described without allocating any."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    blocks = layersmith.block_configs(config)
    assert len(blocks) == config.num_hidden_layers
    changed = [BlockConfig(blocks[0].attention, blocks[1].ffn), *blocks[1:]] if family == "gpt_oss" else blocks
    model = layersmith.build(config, changed, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) > 2e10
