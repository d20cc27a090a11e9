"""Checkpoints as families store them: with renamed or merged weights, in shards, or with remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import layersmith
from layersmith import BlockConfig, FFNConfig
from layersmith.block_config import AttentionConfig
from layersmith.errors import LayersmithError
from layersmith.model_descriptor.describe import read_config
from tests.conformance.tiny import tiny_config, tiny_model

TOKENS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(1))
# Families whose checkpoints have a tensor for each expert, or other names than the model.
STORED_OTHERWISE = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoehybrid", "phimoe", "olmoe", "glm4_moe", "jamba")
# Stored under the names in the model, in shards: fused experts, tied embeddings.
STORED_ALIKE = ("gpt_oss", "llama4_text", "gemma2", "gpt2")


def names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.mark.parametrize("family", STORED_OTHERWISE + STORED_ALIKE)
def test_a_parent_in_shards_and_its_child(family: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family))
    model.save_pretrained(tmp_path / "parent", max_shard_size="100KB")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 1
    if family in STORED_OTHERWISE:
        assert not names_on_disk(tmp_path / "parent") <= set(model.state_dict())
    parent = layersmith.load(tmp_path / "parent", dtype=torch.float32).eval()
    assert torch.equal(parent(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    descriptor = layersmith.describe(tmp_path / "parent")
    blocks = layersmith.block_configs(read_config(tmp_path / "parent"))
    descriptor.get_weight_groups(parent.state_dict(), len(blocks))
    changed = [
        BlockConfig(AttentionConfig(no_op=True), blocks[0].ffn),
        BlockConfig(blocks[1].attention, FFNConfig(no_op=True)),
        *blocks[2:],
    ]
    child = layersmith.build(parent.config, changed).eval()
    weights = parent.state_dict()
    child.load_state_dict({name: weights[name] for name in child.state_dict()}, strict=True)
    wanted = child(TOKENS, use_cache=False).logits
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS, use_cache=False).logits, wanted)
    child_again = AutoModelForCausalLM.from_pretrained(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(child_again(TOKENS, use_cache=False).logits, wanted)


def test_a_concrete_class_loads_a_child(tmp_path: Path) -> None:
    parent = tiny_model(tiny_config("llama"))
    first, *rest = layersmith.block_configs(parent.config)
    child = layersmith.build(parent.config, [BlockConfig(AttentionConfig(no_op=True), first.ffn), *rest]).eval()
    layersmith.save(child, tmp_path / "child")
    wanted = child(TOKENS, use_cache=False).logits
    again = LlamaForCausalLM.from_pretrained(tmp_path / "child", dtype=torch.float32, use_cache=False).eval()
    assert isinstance(again, LlamaForCausalLM)
    assert not again.config.use_cache
    assert torch.equal(again(TOKENS, use_cache=False).logits, wanted)
    parent.save_pretrained(tmp_path / "parent")
    assert type(LlamaForCausalLM.from_pretrained(tmp_path / "parent")) is LlamaForCausalLM


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class FarConfig(LlamaConfig):
    model_type = "far_away"

class FarForCausalLM(LlamaForCausalLM):
    config_class = FarConfig
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama checkpoint with a config class and a model class in its folder."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "far"
    tiny_model(tiny_config("llama")).save_pretrained(folder)
    (folder / "modeling_far.py").write_text(REMOTE, encoding="utf-8")
    path = folder / "config.json"
    data: dict[str, Any] = json.loads(path.read_text())
    data |= {"model_type": "far_away", "architectures": ["FarForCausalLM"]}
    data["auto_map"] = {"AutoConfig": "modeling_far.FarConfig", "AutoModelForCausalLM": "modeling_far.FarForCausalLM"}
    path.write_text(json.dumps(data))
    return folder


def test_remote_code_is_run_only_where_it_is_allowed(remote: Path) -> None:
    with pytest.raises(LayersmithError, match="trust_remote_code"):
        layersmith.load(remote)
    with pytest.raises(LayersmithError, match="trust_remote_code"):
        layersmith.describe(remote)


def test_a_remote_model_is_described_and_cut(remote: Path, tmp_path: Path) -> None:
    from layersmith.execution.parent import load_parent
    from layersmith.heterogeneous.checkpoint import load
    from layersmith.run.runtime import Runtime

    model = load(remote, trust_remote_code=True).eval()
    descriptor = layersmith.describe(model)
    assert layersmith.describe(remote, trust_remote_code=True) is descriptor
    assert descriptor.requires_trust_remote_code()
    parent = load_parent(remote, Runtime(torch.device("cpu"), torch.float32), trust_remote_code=True)
    changed = [BlockConfig(AttentionConfig(no_op=True), parent.blocks[0].ffn), *parent.blocks[1:]]
    child = layersmith.build(model.config, changed, descriptor=descriptor).eval()
    weights = model.state_dict()
    child.load_state_dict({name: weights[name] for name in child.state_dict()}, strict=True)
    assert child(TOKENS).logits.isfinite().all()


def test_a_child_of_a_remote_model_is_loaded_again(remote: Path, tmp_path: Path) -> None:
    from layersmith.heterogeneous.checkpoint import load

    model = load(remote, trust_remote_code=True).eval()
    blocks = layersmith.block_configs(model.config)
    child = layersmith.build(
        model.config, [BlockConfig(AttentionConfig(no_op=True), blocks[0].ffn), *blocks[1:]]
    ).eval()
    layersmith.save(child, tmp_path / "child")
    again = load(tmp_path / "child", trust_remote_code=True, dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS).logits, child(TOKENS).logits)
