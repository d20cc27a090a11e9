"""The hidden size as a choice: narrow parents, one search for each size, the best of them, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layersmith
from layersmith.costs.budget import parse_budget
from layersmith.errors import UsageError
from layersmith.pipeline import Result, stages
from layersmith.recipe import HiddenSizeRecipe, Recipe
from layersmith.run.artifacts import read_json
from layersmith.stages.hidden_size import sizes_of
from tests.conftest import TINY_RECIPE

SETTINGS = TINY_RECIPE | {
    "library": {"ffn_fractions": [0.5], "linear": []},
    "local_distillation": {"tokens": 0, "coupled_tokens": 0},
    "search": {"refine_passes": 0, "frontier_points": 3},
}
DEAD = slice(0, 8)  # of 32 channels


@pytest.fixture
def parent_with_dead_channels(make_parent: Callable[..., Path], tmp_path: Path) -> Path:
    """A parent whose first channels are zero in everything that writes the residual stream."""
    original, folder = make_parent("llama", num_hidden_layers=2), tmp_path / "parent"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, DEAD] = 0
        if "o_proj" in name or "down_proj" in name:
            tensor[DEAD] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_sizes_are_fractions_of_the_parent_in_multiples() -> None:
    assert sizes_of(HiddenSizeRecipe(fractions=(0.5, 0.9)), 100, lambda size: True) == [88, 48]
    assert sizes_of(HiddenSizeRecipe(fractions=(0.5, 0.9)), 100, lambda size: size % 5 == 0) == [80, 40]
    assert sizes_of(HiddenSizeRecipe(sizes=(10, 100, 70)), 100, lambda size: False) == [70, 10]
    assert sizes_of(HiddenSizeRecipe(), 100, lambda size: True) == []


def test_the_search_takes_the_size_without_dead_channels_and_is_resumed(
    parent_with_dead_channels: Path, text_folder: Path, tmp_path: Path
) -> None:
    parent, run = parent_with_dead_channels, tmp_path / "run"
    settings = SETTINGS | {"hidden_size": {"sizes": [24, 16]}}
    reached = []
    for step in stages(parent, run, text_folder, 0.7, settings):
        reached.append(step)
        if step == "hidden-sizes/24/library":
            break
    (result,) = [r for r in stages(parent, run, text_folder, 0.7, settings) if isinstance(r, Result)]
    assert "hidden-sizes/parents/narrowed" in reached
    assert "hidden-sizes/32/search" in reached

    by_size = {choice["size"]: choice for choice in read_json(run / "hidden_size" / "hidden_size.json")}
    assert list(by_size) == [32, 24, 16]
    assert by_size[24]["taken"], by_size
    assert by_size[16]["total"] is None
    assert "its narrow parent alone loses more" in by_size[16]["problem"]
    assert by_size[24]["narrowing"] < 1e-5 < by_size[16]["narrowing"]
    assert by_size[24]["total"] < min(by_size[32]["total"], by_size[16]["narrowing"])
    assert by_size[24]["scores"] > 0
    report = read_json(run / "report.json")
    assert [(row["size"], row["taken"]) for row in report["hidden_sizes"]] == [(32, False), (24, True), (16, False)]
    child, original = layersmith.load(result.child), layersmith.load(parent)
    assert child.config.hidden_size == 24
    sizes = [sum(p.numel() for p in model.parameters()) for model in (original, child)]
    assert result.solution.parent_costs["parameters"] == sizes[0]
    assert sizes[1] == result.solution.costs["parameters"] <= 0.7 * sizes[0]
    narrow = layersmith.load(run / "hidden-sizes" / "parents" / "narrowed" / "24")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(original(ids).logits, narrow(ids).logits, atol=1e-4)
    again = layersmith.compress(parent, run, data=text_folder, budget=0.7, recipe=settings)
    assert again.child == result.child
    log = (run / "log.jsonl").read_text(encoding="utf-8")
    assert log.count('"begun"') == len({line for line in log.splitlines() if '"begun"' in line})


def test_settings_that_do_not_go_with_other_hidden_sizes_are_refused(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    parent, sizes = make_parent("llama", num_hidden_layers=2), {"hidden_size": {"sizes": [20]}}
    for recipe, budget in (
        ({"effort": {"within": "1min"}}, {"params": "0.5"}),
        ({"scoring": {"objective": "hidden_distance"}}, {"params": "0.5"}),
        ({}, {"ttft": "0.5"}),
    ):
        with pytest.raises(UsageError, match="hidden_size"):
            layersmith.compress(
                parent, tmp_path / "run", data=text_folder, budget=parse_budget(**budget),
                recipe=Recipe.from_dict(SETTINGS | sizes | recipe),
            )  # fmt: skip
    assert not (tmp_path / "run").exists()
