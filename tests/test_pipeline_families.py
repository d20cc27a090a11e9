"""The main job on families laid out in other ways: experts, hybrids, norms on both sides, parallel branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.tiny import tiny_config, tiny_model
from conftest import SIZES, TINY_RECIPE
from transformers import PreTrainedTokenizerFast

import layersmith

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
    counted = result.choice.costs["parameters"]
    assert sum(p.numel() for p in child.parameters()) == counted
    assert counted <= 0.7 * result.choice.parent_costs["parameters"]
    assert result.report.is_file()
    if family == "mixtral":
        costs = result.choice.costs
        assert costs["active_parameters"] <= 0.8 * result.choice.parent_costs["active_parameters"]
        assert costs["active_parameters"] < costs["parameters"]
