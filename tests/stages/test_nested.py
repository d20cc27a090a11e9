"""Nested children of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import layersmith
from layersmith.errors import InputError, UsageError
from layersmith.run.artifacts import read_json
from tests.conftest import TINY_RECIPE

RECIPE = TINY_RECIPE | {
    "local_distillation": {"coupled_tokens": 0},
    "search": {"refine_passes": 0, "frontier_points": 2},
    "completion_tokens": 0,
}


def test_one_checkpoint_for_three_sizes(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "nested"
    layersmith.compress(make_parent("llama", num_hidden_layers=2), run, data=text_folder, budget=0.8, recipe=RECIPE)
    sizes = ["0.7", "0.9", "0.8"]
    made = layersmith.search_nested(run, sizes, out=out, measure=True, progress=False)
    assert [size.name for size in made.sizes] == ["0.9", "0.8", "0.7"]
    assert made.proven_optimal
    table = read_json(out / "nested.json")["sizes"]
    tokens = torch.arange(24)[None]
    for size, row in zip(made.sizes, table, strict=True):
        child = layersmith.load(out, size=None if size.name == "0.9" else size.name)
        assert sum(p.numel() for p in child.parameters()) == size.solution.costs["parameters"] == row["parameters"]
        assert size.solution.costs["parameters"] <= size.solution.limits["parameters"]
        assert row["kl_price"] == pytest.approx(row["kl"] - row["kl_alone"])
        assert torch.isfinite(child(tokens).logits).all()
    assert "price of KL" in str(made)
    larger = layersmith.load(out).state_dict()
    refitted = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    own = 0
    for name, tensor in layersmith.load(out, size=0.7).state_dict().items():
        rows = {row.numpy().tobytes() for row in larger[name].flatten(1)} if tensor.ndim > 1 else set()
        if tensor.ndim > 1 and not {row.numpy().tobytes() for row in tensor.flatten(1)} <= rows:
            assert any(name.endswith(last) for last in refitted), name
            own += tensor.nbytes
    assert made.sizes[2].separate_bytes == own

    exported = layersmith.export(out, tmp_path / "alone", "checkpoint", size=0.7)
    assert exported.proof.difference == 0
    smallest, again = layersmith.load(out, size=0.7), layersmith.load(tmp_path / "alone")
    with torch.no_grad():
        assert torch.equal(smallest(tokens).logits, again(tokens).logits)
    with pytest.raises(InputError, match="already there"):
        layersmith.search_nested(run, sizes, out=out)
    with pytest.raises(UsageError, match="two or more different sizes"):
        layersmith.search_nested(run, ["0.8", "0.80"])
