"""A child with formats of llama.cpp: the file holds the same blocks, and computes what was rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig
from layersmith.export.gguf import FILE
from layersmith.export.gguf_reader import GGUFModel
from layersmith.export.run import export
from layersmith.export.source import CannotExport
from layersmith.heterogeneous.quantized import write_quantized
from layersmith.heterogeneous.weight_files import stored_shapes
from layersmith.quantization.formats import FORMATS
from layersmith.quantization.rounding import Quantized, quantize
from tests.conftest import FAMILIES, SIZES, block, child_model

pytest.importorskip("gguf")

BLOCKS = [
    BlockConfig(AttentionConfig(no_op=True), FFNConfig(intermediate_size=256)),
    BlockConfig(AttentionConfig(num_key_value_heads=2), FFNConfig(no_op=True)),
    BlockConfig(AttentionConfig(num_key_value_heads=1), FFNConfig(intermediate_size=512)),
]
TABLE = [row for row in FORMATS.values() if row.storage == "gguf"]


def test_every_format_in_one_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
    model = layersmith.build(LlamaConfig(**sizes | {"num_hidden_layers": 3}), BLOCKS, dtype=torch.bfloat16)
    layersmith.save(model, tmp_path / "child", tokenizer=tokenizer)
    rounded: dict[str, Quantized] = {}
    for name, shape in sorted(stored_shapes([tmp_path / "child" / "model.safetensors"]).items()):
        if len(shape) == 2:  # the embeddings, too
            rounded[name] = quantize(model.get_parameter(name).data, TABLE[len(rounded) % len(TABLE)])
    assert len(rounded) >= len(TABLE)
    write_quantized(tmp_path / "child", {name: q.format for name, q in rounded.items()}, rounded.__getitem__)
    exported = export(tmp_path / "child", tmp_path / "out", "gguf")
    assert exported.proof.difference < 1e-4
    exact = model.float()
    for name, quantized in rounded.items():
        exact.get_parameter(name).data = quantized.values()
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = GGUFModel(tmp_path / "out" / FILE).logits(tokens)
        torch.testing.assert_close(logits, exact(tokens).logits, rtol=1e-4, atol=1e-4)


def test_parts_of_one_tensor_of_the_file_have_one_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = FAMILIES["qwen3"](tie_word_embeddings=True)  # whose layers differ, so queries, keys and values are one
    model = child_model(config, [block({"num_key_value_heads": 1}), *[block()] * 3])
    layersmith.save(model, tmp_path / "child", tokenizer=tokenizer)
    name = "model.layers.1.self_attn.q_proj.weight"
    rounded = quantize(model.get_parameter(name).data, FORMATS["q8_0"])
    write_quantized(tmp_path / "child", {name: rounded.format}, lambda _: rounded)
    with pytest.raises(CannotExport, match="Give them one format"):
        export(tmp_path / "child", tmp_path / "out", "gguf")
