"""Puzzletron's folder and AnyModel's are the child; layersmith reads both back, also as parents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import layersmith
from layersmith.block_config import BlockConfig
from layersmith.errors import LayersmithError
from layersmith.export.source import CannotExport
from tests.export.children import MIXED, PRUNED_EXPERTS, attention, ffn, write_child

FAMILIES = ["gemma", "llama_tied", "mistral", "qwen2_windows", "qwen3", "qwen3_moe"]


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip(family: str, tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", family, PRUNED_EXPERTS if family == "qwen3_moe" else MIXED)
    blocks = layersmith.block_configs(layersmith.load(child).config)
    for target in ("puzzletron", "anymodel"):
        layersmith.export(child, tmp_path / target, target)
        read = layersmith.block_configs(layersmith.load(tmp_path / target).config)
        assert [b.ffn for b in read] == [b.ffn for b in blocks]
        heads = [[b.attention.num_key_value_heads for b in each] for each in (read, blocks)]
        assert heads[0] == heads[1]


def test_puzzletron_has_one_file_for_every_subblock(tmp_path: Path) -> None:
    layersmith.export(write_child(tmp_path / "child", "llama", MIXED), tmp_path / "out", "puzzletron")
    files = {file.stem for file in (tmp_path / "out" / "subblocks_safetensors").iterdir()}
    present = {f"block_{i}_{part}" for i in range(4) for part in ("attention", "ffn")}
    assert files == {"embeddings", "lm_head", *present} - {"block_0_attention", "block_1_ffn"}
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    entry = config["block_configs"][0]
    assert set(entry) == {"attention", "ffn", "parallel_blocks"}
    assert entry["ffn"]["intermediate_size"] == 40
    # Puzzletron's schema has no query heads: layer 3 got four of zeros.
    assert "num_attention_heads" not in config["block_configs"][3]["attention"]


def test_any_model_is_sparse(tmp_path: Path) -> None:
    layersmith.export(write_child(tmp_path / "child", "qwen3_moe", PRUNED_EXPERTS), tmp_path / "out", "anymodel")
    config = config_of(tmp_path / "out")
    assert (config["architectures"], config["base_architecture"]) == (["AnyModel"], "Qwen3MoeForCausalLM")
    entries = config["per_layer_config"]
    assert entries["1"].pop("skip") == ["attention"]
    assert entries["3"] == {"skip": ["mlp"]}
    assert sorted(entries["1"].values()) == [3, 8]
    assert "block_configs" not in config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"0": {"hidden_size": 8}}, "layer 0 sets hidden_size"),
        ({"0": {"skip": ["everything"]}}, "layer 0 skips everything"),
        ({"9": {}}, "layer 9 of 4"),
        ({"x": {}}, "per_layer_config"),
        ({"0": {"num_key_value_heads": "many"}}, "many"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    layersmith.export(write_child(tmp_path / "child", "llama", MIXED), tmp_path / "out", "anymodel")
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(config_of(tmp_path / "out") | {"per_layer_config": change})
    )
    with pytest.raises(LayersmithError, match=sentence):
        layersmith.load(tmp_path / "out")


def test_a_linear_map_is_refused_by_any_model(tmp_path: Path) -> None:
    blocks = (BlockConfig(attention(replace_with_linear=True), ffn(40)), BlockConfig())
    child = write_child(tmp_path / "child", "llama", blocks)
    layersmith.export(child, tmp_path / "puzzletron", "puzzletron")
    with pytest.raises(CannotExport, match="layer 0 has one linear map"):
        layersmith.export(child, tmp_path / "anymodel", "anymodel")
