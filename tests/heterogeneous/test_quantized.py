"""A child with a format for every weight: stock Transformers and layersmith compute what was rounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import UsageError
from layersmith.heterogeneous.quantized import read_gguf_blocks, write_quantized
from layersmith.heterogeneous.weight_files import stored_shapes
from layersmith.quantization.formats import FORMATS, Format
from layersmith.quantization.packing import gguf_blocks
from layersmith.quantization.rounding import Quantized, quantize
from layersmith.run.artifacts import read_tensors

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 96, "tie_word_embeddings": True}
BLOCKS = [
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(intermediate_size=128)),
    BlockConfig(AttentionConfig(num_key_value_heads=2), FFNConfig(no_op=True)),
    BlockConfig(AttentionConfig(num_key_value_heads=1), FFNConfig(intermediate_size=192)),
]
IDS = torch.arange(24)[None] * 5 % 96


def child(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=256, num_hidden_layers=3, num_key_value_heads=4)
    model = layersmith.build(config, BLOCKS, dtype=torch.bfloat16)
    layersmith.save(model, folder)
    return model


def rounded_child(folder: Path, storage: str) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    """A child in a folder, one format after another in its layers, and the same child in memory."""
    model = child(folder)
    table = [row for row in FORMATS.values() if row.storage == storage and "".join(row.servers) != "vllm"]
    rounded: dict[str, Quantized] = {}
    for name in sorted(name for name in stored_shapes([folder / "model.safetensors"]) if "_proj" in name):
        weight = model.get_parameter(name).data
        fitting = [row for row in table if row.refusal(weight.shape) is None]
        rounded[name] = quantize(weight, fitting[len(rounded) % len(fitting)])
        model.get_parameter(name).data = rounded[name].values().bfloat16()
    write_quantized(folder, {name: q.format for name, q in rounded.items()}, rounded.__getitem__)
    return model, rounded


def test_the_files_have_the_counted_bytes(tmp_path: Path) -> None:
    _, rounded = rounded_child(tmp_path / "child", "compressed-tensors")
    stored = read_tensors(tmp_path / "child" / "model.safetensors")
    for name, quantized in rounded.items():
        mine = [t for other, t in stored.items() if other.startswith(name.removesuffix("weight"))]
        assert sum(t.numel() * t.element_size() for t in mine) == quantized.format.bytes_of(quantized.levels.shape)


def test_every_module_is_named_once(tmp_path: Path) -> None:
    _, rounded = rounded_child(tmp_path / "child", "compressed-tensors")
    settings = json.loads((tmp_path / "child" / "config.json").read_text())["quantization_config"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(name.removesuffix(".weight") for name in rounded)
    assert settings["ignore"] == ["lm_head", "model.embed_tokens"]
    assert settings["format"] == "mixed-precision"


# Another process, which knows nothing of layersmith but the file in the folder.
_STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "layersmith" not in sys.modules
torch.save(model(torch.arange(24)[None] * 5 % 96).logits, sys.argv[2])
"""


def test_stock_transformers_computes_the_rounded_child(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, _ = rounded_child(tmp_path / "child", "compressed-tensors")
    logits = tmp_path / "logits"
    subprocess.run([sys.executable, "-c", _STOCK, tmp_path / "child", logits], check=True, capture_output=True)
    assert torch.equal(torch.load(logits), model(IDS).logits)


def test_layersmith_loads_the_rounded_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path / "cache"))
    model, _ = rounded_child(tmp_path / "child", "compressed-tensors")
    assert torch.equal(layersmith.load(tmp_path / "child")(IDS).logits, model(IDS).logits)


def test_blocks_of_gguf_are_kept_beside_the_rounded_weights(tmp_path: Path) -> None:
    model, rounded = rounded_child(tmp_path / "child", "gguf")
    kept = read_gguf_blocks(tmp_path / "child")
    assert {name: form for name, (form, _) in kept.items()} == {name: q.format for name, q in rounded.items()}
    assert all(torch.equal(blocks, gguf_blocks(rounded[name])) for name, (_, blocks) in kept.items())
    assert torch.equal(layersmith.load(tmp_path / "child")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": "int8"}, "no weights model.layers.9"),
        (
            {"model.layers.0.mlp.up_proj.weight": "int8", "model.layers.2.mlp.up_proj.weight": "q8_0"},
            "both int8 and q8_0",
        ),
    ],
)
def test_refusals(tmp_path: Path, formats: dict[str, str], message: str) -> None:
    child(tmp_path / "child")
    named: dict[str, Format] = {name: FORMATS[form] for name, form in formats.items()}
    with pytest.raises(UsageError, match=message):
        write_quantized(tmp_path / "child", named, {}.__getitem__)
