"""The DeciLM layout, as vLLM, SGLang and TensorRT-LLM read it, is the child; layersmith reads it back as a parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import layersmith
from layersmith.block_config import BlockConfig
from layersmith.errors import InputError, LayersmithError
from layersmith.export.source import CannotExport
from layersmith.model_descriptor.deci import multiple_of, width_of
from layersmith.model_descriptor.describe import read_config
from layersmith.stages.evaluate_model import evaluate
from tests.conftest import TINY_RECIPE
from tests.export.children import ALIKE_EXPERTS, MIXED, PRUNED_EXPERTS, attention, experts, ffn, write_child


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_widths_and_multiples_agree() -> None:
    for hidden in (576, 896, 2048, 4096, 8192, 16384):
        for width in range(256, 40960, 256):
            multiple = multiple_of(width, hidden)
            assert multiple is not None
            assert width_of(multiple, hidden) == width
    assert multiple_of(1000, 4096) is None
    assert width_of(5.25, 8192) == 28672  # as published


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "mistral_plain"])
def test_what_each_server_reads(family: str, tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", family, MIXED)
    for target in ("vllm", "sglang", "tensorrt-llm"):
        has_bias = family in ("llama_tied", "qwen2")
        if target == "tensorrt-llm" and has_bias:
            with pytest.raises(CannotExport, match="reads no such bias"):
                layersmith.export(child, tmp_path / target, target)
            continue
        exported = layersmith.export(child, tmp_path / target, target)
        assert exported.layout == "DeciLMForCausalLM"
        config = config_of(tmp_path / target)
        assert config["model_type"] == "nemotron-nas"
        blocks = config["block_configs"]
        # vLLM and SGLang cannot start without an attention, so layer 0 has one of zeros.
        assert blocks[0]["attention"]["no_op"] == (target == "tensorrt-llm")
        assert [b["attention"]["n_heads_in_group"] for b in blocks[1:]] == [4, 8, 2]
        assert [b["ffn"]["no_op"] for b in blocks] == [False, True, False, False]
        assert all(("ffn_mult" in b["ffn"]) == (target != "vllm") for b in blocks if not b["ffn"]["no_op"])
        assert config.get("qkv_bias", False) == (family == "qwen2" and target == "vllm")
    assert layersmith.load(tmp_path / "sglang").config.model_type == "llama"


def test_the_config_class_of_the_folder_has_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layersmith.export(write_child(tmp_path / "child", "llama", MIXED), tmp_path / "out", "vllm")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[2].ffn.intermediate_size == 24
    assert not hasattr(config.block_configs[2].ffn, "ffn_mult")
    assert config.block_configs[1].ffn.no_op is True
    assert json.loads(config.to_json_string())["block_configs"][0]["attention"]["n_heads_in_group"] == 8


def test_linear_maps_go_to_tensorrt_llm_and_come_back(tmp_path: Path) -> None:
    blocks = (BlockConfig(attention(replace_with_linear=True), ffn(40)), BlockConfig(ffn=ffn(replace_with_linear=True)))
    child = write_child(tmp_path / "child", "llama", blocks)
    layersmith.export(child, tmp_path / "out", "tensorrt-llm")
    assert "model.layers.0.self_attn.linear_attn.weight" in load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(CannotExport, match="layer 0: its attention is one linear map, which SGLang"):
        layersmith.export(child, tmp_path / "sglang", "sglang")
    with pytest.raises(CannotExport, match="layer 0: its attention is one linear map, and vLLM's"):
        layersmith.export(child, tmp_path / "vllm", "vllm")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3", "no model.layers.0.self_attn.[qk]_norm"),
        ("gemma", "logits differ|config"),
        ("mistral", "layer 1 attends to the last 12 tokens"),
        ("qwen2_windows", "layer 2 attends to the last 8 tokens"),
    ],
)
def test_other_families_take_the_transformers_backend(family: str, reason: str, tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", family, MIXED)
    assert layersmith.export(child, tmp_path / "vllm", "vllm").layout == "TransformersForCausalLM"
    config = config_of(tmp_path / "vllm")
    blocks = config["block_configs"]
    # An attention of zeros in layer 0, and heads of zeros in layer 3, for vLLM reads one number of query heads.
    assert [b["attention"]["num_key_value_heads"] for b in blocks] == [1, 2, 1, 4]
    assert not any(b["attention"]["no_op"] for b in blocks)
    kv = config["num_key_value_heads"]
    assert config["per_layer_config"] == {
        str(i): {"num_key_value_heads": n} for i, n in enumerate([1, 2, 1, 4]) if n != kv
    }
    with pytest.raises(CannotExport, match=reason):
        layersmith.export(child, tmp_path / "sglang", "sglang")


def test_experts_in_the_transformers_backend(tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", "qwen3_moe", PRUNED_EXPERTS)
    assert layersmith.export(child, tmp_path / "vllm", "vllm").layout == "TransformersMoEForCausalLM"
    widths = [b["ffn"]["moe"]["expert_intermediate_dim"] for b in config_of(tmp_path / "vllm")["block_configs"][:3]]
    assert widths == [16, 16, 16]
    fewer = (PRUNED_EXPERTS[0], BlockConfig(ffn=experts(3, per_token=1)), *PRUNED_EXPERTS[2:])
    with pytest.raises(CannotExport, match="layer 1 uses 1 experts per token and layer 0 2"):
        layersmith.export(write_child(tmp_path / "fewer", "qwen3_moe", fewer), tmp_path / "out", "vllm")


def test_a_child_whose_layers_are_alike_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", "qwen3_moe", ALIKE_EXPERTS)
    assert layersmith.export(child, tmp_path / "vllm", "vllm").layout == "Qwen3MoeForCausalLM"
    assert "block_configs" not in config_of(tmp_path / "vllm")


# ---------------------------------------------------------------------------------------------- read back

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"},
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": None,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "nemotron-nas",
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 128,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
"""As NVIDIA publishes them, in small."""


def entry(group: int | None, multiple: float | None, **linear: bool) -> dict[str, Any]:
    own = {"no_op": False, "num_sink_tokens": None, "sparsify": None, "unshifted_sink": False, "window_length": None}
    both = {"n_heads_in_group": group, "replace_with_linear": linear.get("attention", False)}
    of_ffn = {"ffn_mult": multiple, "no_op": multiple is None and not linear.get("ffn"), "sparsify": None}
    no_op = group is None and not linear.get("attention")
    return {
        "attention": own | both | {"no_op": no_op},
        "ffn": of_ffn | {"replace_with_linear": linear.get("ffn", False)},
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    blocks = [entry(4, 5.25), entry(None, 10.5), entry(None, None, attention=True)]
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {"block_configs": blocks}))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    ordinary = read_config(folder)
    model = layersmith.build(ordinary, ordinary.block_configs, dtype=torch.bfloat16)
    tensors = {n.replace("attn.linear.", "attn.linear_attn."): t for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_published_checkpoint_is_read_without_its_code(published: Path, tmp_path: Path) -> None:
    model = layersmith.load(published)
    blocks = layersmith.block_configs(model.config)
    assert [b.attention.num_key_value_heads for b in blocks] == [2, None, None]
    assert [b.ffn.intermediate_size for b in blocks] == [256, 512, None]
    assert blocks[2].attention.replace_with_linear
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert layersmith.describe(published).input_embedding_name() == "model.embed_tokens"
    layersmith.export(published, tmp_path / "out", "tensorrt-llm")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("attention", {"window_length": 64}, "layer 0 has window_length 64"),
        ("attention", {"n_heads_in_group": 3}, "layer 0 has 3 query heads"),
        ("attention", {"n_heads_in_group": "many"}, "n_heads_in_group"),
        ("ffn", {"ffn_mult": None}, "layer 0 has neither"),
        ("ffn", {"ffn_mult": -1.0}, "ffn_mult"),
    ],
)
def test_what_is_not_read_is_refused(part: str, change: dict[str, Any], sentence: str, published: Path) -> None:
    data = config_of(published)
    data["block_configs"][0][part] |= change
    (published / "config.json").write_text(json.dumps(data))
    with pytest.raises(LayersmithError, match=sentence):
        layersmith.load(published)


def test_a_missing_entry_is_refused(published: Path) -> None:
    (published / "config.json").write_text(json.dumps(config_of(published) | {"block_configs": None}))
    with pytest.raises(InputError, match="block_configs"):
        layersmith.load(published)


def test_a_checkpoint_of_the_layout_is_a_parent(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "deci"
    layersmith.export(make_parent("llama", num_hidden_layers=2), parent, "sglang")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in parent.iterdir()}
    assert evaluate(parent, text_folder, sequences=2, sequence_length=16, progress=False).rows
    quick = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}}
    result = layersmith.compress(parent, tmp_path / "run", data=text_folder, budget=0.9, recipe=quick)
    assert layersmith.export(result.child, tmp_path / "child", "vllm").layout == "DeciLMForCausalLM"
