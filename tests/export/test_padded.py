"""A padded copy is the child, in stock Transformers; what zeros cannot do is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layersmith
from layersmith.block_config import BlockConfig
from layersmith.export.grow import placed
from layersmith.export.source import CannotExport, Heads
from tests.export.children import ALIKE_EXPERTS, CONFIGS, MIXED, PRUNED_EXPERTS, attention, experts, ffn, write_child


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_padded_copy_is_the_child(family: str, tmp_path: Path) -> None:
    blocks = PRUNED_EXPERTS if family == "qwen3_moe" else MIXED
    child = write_child(tmp_path / "child", family, blocks)
    exported = layersmith.export(child, tmp_path / "out", "padded")
    assert exported.proof.difference < 1e-5
    assert "layersmith" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] * 7 % 512
    with torch.no_grad():
        wanted = layersmith.load(child, dtype=torch.float32).eval()(tokens).logits
        torch.testing.assert_close(copy(tokens).logits, wanted, rtol=0, atol=1e-4)


def test_a_child_whose_layers_are_alike_gets_no_zeros(tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", "qwen3_moe", ALIKE_EXPERTS)
    layersmith.export(child, tmp_path / "out", "padded")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert copy.num_parameters() == layersmith.load(child).num_parameters()
    assert copy.config.num_experts == 3


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ([BlockConfig(attention(replace_with_linear=True), experts(4))] * 2, r"layer 0: its attention is one linear"),
        ([BlockConfig(attention(), experts(4)), BlockConfig(attention(), experts(3))], r"layer 1 has 3 experts"),
        ([BlockConfig(ffn=experts(4)), BlockConfig(ffn=experts(4, 16, 1))], r"layer 1 has 4 experts, 1 per token"),
    ],
)
def test_what_zeros_cannot_do_is_refused(blocks: list[BlockConfig], sentence: str, tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", "qwen3_moe", tuple(blocks))
    with pytest.raises(CannotExport, match=sentence):
        layersmith.export(child, tmp_path / "out", "padded")
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


def test_every_query_head_keeps_its_kv_head() -> None:
    for child in (Heads(8, 1), Heads(8, 2), Heads(4, 2), Heads(6, 2), Heads(2, 2), Heads(1, 1)):
        for copy in (Heads(8, 4), Heads(8, 8), Heads(8, 2), Heads(9, 3)):
            if -(-child.group // copy.group) * child.kv > copy.kv:
                with pytest.raises(ValueError, match="do not fit"):
                    placed(child, copy)
                continue
            queries, kv = placed(child, copy)
            assert (len(queries), len(kv)) == (copy.queries, copy.kv)
            assert sorted(q for q in queries if q >= 0) == list(range(child.queries))
            assert all(kv[at // copy.group] == q // child.group for at, q in enumerate(queries) if q >= 0)


def test_a_width_that_grows_gets_zeros(tmp_path: Path) -> None:
    child = write_child(tmp_path / "child", "llama", (BlockConfig(ffn=ffn(24)), BlockConfig(ffn=ffn(40))))
    layersmith.export(child, tmp_path / "out", "padded")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert copy.config.intermediate_size == 40
    assert not copy.model.layers[0].mlp.gate_proj.weight[24:].any()
