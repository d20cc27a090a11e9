"""Recipes refuse what makes no sense, by the full path of the field, and are changed by settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from layersmith.errors import UsageError
from layersmith.recipe import DataRecipe, DistillationRecipe, LibraryRecipe, Recipe, ScoringRecipe, SearchRecipe
from tests.recipe_reference import DOCS, reference_text, schema_text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scorng": {}}, "scorng: unknown field 'scorng'. Did you mean 'scoring'?"),
        ({"scoring": {"sampels": 1}}, "scoring.sampels: unknown field 'sampels'. Did you mean 'samples'?"),
        ({"search": {"alike": 0}}, "search.alike: unknown field 'alike'. It is now called 'uniform_groups'."),
        ({"scoring": {"samples": "3"}}, "scoring.samples: must be a whole number, got '3'."),
        ({"scoring": {"samples": True}}, "scoring.samples: must be a whole number, got True."),
        ({"scoring": {"samples": 1.0}}, "scoring.samples: must be a whole number, got 1.0."),
        ({"scoring": {"samples": 0}}, "scoring.samples: must be greater than 0, got 0."),
        ({"scoring": None}, "scoring: must be a mapping, got None."),
        ({"library": {"kv_heads": [2, "one"]}}, "library.kv_heads[1]: must be a whole number, got 'one'."),
        ({"search": {"uniform_groups": "all"}}, "search.uniform_groups: must be a whole number or a list, got 'all'."),
        (
            {"search": {"limits": [{"costs": {"weights": "1"}, "at_most": 1}]}},
            "search.limits[0].costs.weights: must be",
        ),
        ({"search": {"limits": [{"costs": {"weights": 1}}]}}, "search.limits[0].at_most: is missing."),
        ({"distillation": {"cache_top": 8}}, "distillation: cache_top keeps no hidden states"),
        ({"scoring": {"mode": "guess"}}, "scoring.mode: 'guess' is not one of 'auto', 'exact' or 'second_order'."),
        ([], "must be a mapping, got []."),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(data: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Recipe.from_dict(data, "my.yaml")
    assert str(error.value).startswith(f"my.yaml: {message}")


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(UsageError) as error:
        Recipe.from_dict({"seed": "one", "scoring": {"samples": 0}})
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == ["scoring.samples", "seed"]


def test_changed_copies_are_checked_too() -> None:
    assert dataclasses.replace(SearchRecipe(), tensor_parallel=2).tensor_parallel == 2
    with pytest.raises(UsageError, match=r"recipe: search\.tensor_parallel: must be greater than 0"):
        dataclasses.replace(SearchRecipe(), tensor_parallel=0)


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"search": {"uniform_groups": [[0, 1]]}, "distillation": {"trainer": {"fsdp": "auto"}}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    (tmp_path / "recipe.yaml").write_text("distillation: {learning_rate: 1e-4}")
    assert Recipe.read(tmp_path / "recipe.yaml").distillation.learning_rate == 1e-4


def test_settings_are_yaml_at_a_path() -> None:
    recipe = Recipe().with_settings(
        [
            "scoring.samples=2", "library.ffn_fractions=[0.5, 0.25]", "distillation.learning_rate=1e-4",
            "distillation.trainer.max_grad_norm=0.5", "data.evaluation_source=a=b", "seed=3",
        ]
    )  # fmt: skip
    assert recipe == Recipe(
        seed=3,
        scoring=ScoringRecipe(samples=2),
        library=LibraryRecipe(ffn_fractions=(0.5, 0.25)),
        distillation=DistillationRecipe(learning_rate=1e-4, trainer={"max_grad_norm": 0.5}),
        data=DataRecipe(evaluation_source="a=b"),
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scoring.sampels=2", r"--set: scoring\.sampels: .* Did you mean 'samples'"),
        ("scorng.samples=2", "Did you mean 'scoring'"),
        ("scoring.samples=two", r"scoring\.samples: must be a whole number"),
        ("seed.first=1", r"seed\.first"),
        ("scoring.samples", "expected section.key=value"),
        ("scoring.samples=[", "not YAML"),
    ],
)
def test_settings_that_make_no_sense(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe().with_settings([setting])


def test_the_reference_and_the_schema_are_up_to_date() -> None:
    remedy = "run python -m tests.recipe_reference"
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == reference_text(), remedy
    assert (DOCS / "recipe.schema.json").read_text(encoding="utf-8") == schema_text(), remedy
