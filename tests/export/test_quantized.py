"""A child with formats of compressed-tensors keeps them where vLLM serves it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3Config

import layersmith
from layersmith import BlockConfig
from layersmith.export.source import CannotExport
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.quantized import dense_tensors, read_grids, write_quantized
from layersmith.heterogeneous.weight_files import stored_shapes
from layersmith.quantization.formats import FORMATS
from layersmith.quantization.rounding import quantize
from tests.conftest import child_model
from tests.export.children import attention, ffn

pytest.importorskip("compressed_tensors")
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 16, "vocab_size": 96}
# An attention of zeros is put into layer 0, and heads of zeros into layer 2.
MIXED = (
    BlockConfig(attention(no_op=True), ffn(96)),
    BlockConfig(attention(num_key_value_heads=4), ffn(no_op=True)),
    BlockConfig(attention(num_key_value_heads=2, num_attention_heads=4), ffn(64)),
)
ALIKE = (BlockConfig(attention(num_key_value_heads=2), ffn(64)),) * 3
UNEQUAL_GROUPS = (*MIXED[:2], BlockConfig(attention(num_key_value_heads=2, num_attention_heads=6), ffn(64)))


def write_child(folder: Path, cls: Any, blocks: tuple[BlockConfig, ...], names: list[str]) -> Path:
    """A child with one format after another in its matrices; those of a layer's queries, keys and values are alike."""
    config = cls(**SIZES, intermediate_size=128, num_hidden_layers=3, num_key_value_heads=4, tie_word_embeddings=True)
    model = child_model(config, list(blocks)).bfloat16()
    layersmith.save(model, folder)
    weights = sorted(name for name in stored_shapes([folder / "model.safetensors"]) if "_proj" in name)
    formats = {name: FORMATS[form] for name, form in zip(weights, itertools.cycle(names), strict=False)}
    write_quantized(folder, formats, lambda name: quantize(model.get_parameter(name).data, formats[name]))
    return folder


# In layer 2 of MIXED, which gets heads of zeros, keys are in nvfp4, the output in int4-g32-asym, queries in fp8-tensor.
ALL = ["mxfp4", "int8", "int4-g32", "nvfp4", "int4-g32-asym", "fp8-tensor", "fp8-channel"]


@pytest.mark.parametrize(
    ("cls", "blocks", "layout"),
    [
        (LlamaConfig, MIXED, "DeciLMForCausalLM"),
        (LlamaConfig, ALIKE, "LlamaForCausalLM"),
        (Qwen3Config, MIXED, "TransformersForCausalLM"),
    ],
)
def test_vllm_gets_the_formats(cls: Any, blocks: tuple[BlockConfig, ...], layout: str, tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", cls, blocks, ALL)
    exported = layersmith.export(child, tmp_path / "out", "vllm")
    assert (exported.layout, exported.proof.difference) == (layout, 0)
    layersmith.export(ordinary_checkpoint(child), tmp_path / "dense", "vllm")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    unpacked, dense = dense_tensors(tmp_path / "out", settings), load_file(tmp_path / "dense" / "model.safetensors")
    assert unpacked.keys() == dense.keys()
    for name, tensor in dense.items():
        assert unpacked[name].equal(tensor), name
    of_child, of_export = read_grids(child), read_grids(tmp_path / "out")
    assert {name: grid.format for name, grid in of_export.items()} == {n: g.format for n, g in of_child.items()}
    assert len(of_child) > 10


def test_other_targets_get_unpacked_weights(tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", LlamaConfig, MIXED, ["int8"])
    layersmith.export(child, tmp_path / "out", "padded")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("blocks", "form", "reason"),
    [
        (MIXED, "int3-g32", r"layer 0: model.layers.0.mlp.down_proj.weight has the format int3-g32, which vLLM does"),
        (UNEQUAL_GROUPS, "int4-g32", r"layer 2: .*o_proj.weight has the format int4-g32, and the layout has zeros"),
    ],
)
def test_what_vllm_does_not_read_is_refused(
    blocks: tuple[BlockConfig, ...], form: str, reason: str, tmp_path: Path
) -> None:
    child = write_child(tmp_path / "child", LlamaConfig, blocks, [form])
    with pytest.raises(CannotExport, match=reason):
        layersmith.export(child, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
