"""The main job on families laid out in other ways: experts, hybrids, norms on both sides, parallel branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import layersmith
from tests.conformance.tiny import tiny_config, tiny_model
from tests.conftest import SIZES, TINY_RECIPE

FAMILIES = ("mixtral", "deepseek_v3", "granitemoehybrid", "gemma2", "gptj", "gpt2", "olmo2")
BUDGETS: dict[str, Any] = {"mixtral": {"params": 0.7, "active_params": 0.8}}


@pytest.mark.parametrize("family", FAMILIES)
def test_compress(family: str, text_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.vocab_size = SIZES["vocab_size"]
    tiny_model(config).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    recipe = TINY_RECIPE | {"library": {"ffn_fractions": [0.5], "expert_fractions": [0.5], "head_fractions": [0.5]}}
    result = layersmith.compress(
        tmp_path / "parent", tmp_path / "run", data=text_folder, budget=BUDGETS.get(family, 0.7), recipe=recipe
    )
    child = layersmith.load(result.child, dtype=torch.float32)
    counted = result.solution.costs["parameters"]
    assert sum(p.numel() for p in child.parameters()) == counted
    assert counted <= 0.7 * result.solution.parent_costs["parameters"]
    assert result.report.is_file()
    if family == "mixtral":
        costs = result.solution.costs
        assert costs["active_parameters"] <= 0.8 * result.solution.parent_costs["active_parameters"]
        assert costs["active_parameters"] < costs["parameters"]


def test_mixers_alone_can_meet_a_budget(text_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Layers of the child have fewer heads or a smaller state; it is counted, saved and loaded so."""
    config = tiny_config("nemotron_h")
    config.vocab_size = SIZES["vocab_size"]
    tiny_model(config).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    off: dict[str, Any] = {"linear": [], "no_op": [], "kv_heads": [], "query_heads": False, "windows": False}
    off |= {"ffn_sizes": [], "expert_fractions": []}
    recipe = TINY_RECIPE | {"library": off}
    result = layersmith.compress(
        tmp_path / "parent", tmp_path / "run", data=text_folder, budget={"params": 0.95}, recipe=recipe
    )
    child = layersmith.load(result.child, dtype=torch.float32)
    assert sum(p.numel() for p in child.parameters()) == result.solution.costs["parameters"]
    parents, of_child = (layersmith.block_configs(c)[0].attention.mamba for c in (config, child.config))
    assert parents is not None
    assert of_child is not None
    assert of_child != parents
    assert (of_child.num_heads, of_child.state_dim) <= (parents.num_heads, parents.state_dim)
    prompt = torch.arange(5, 17)[None]
    text = child.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(text[:, 12:], child(text, use_cache=False).logits.argmax(-1)[:, 11:-1])
