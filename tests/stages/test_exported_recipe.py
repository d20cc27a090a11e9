"""The recipe for NeMo AutoModel says what the run's recipe says, and AutoModel's own loader reads it.

``make test-recipes`` runs the second part: it needs AutoModel and what it imports.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import layersmith
from layersmith.cli import main
from layersmith.errors import InputError, UsageError
from layersmith.export.source import CannotExport
from layersmith.stages.exported_recipe import AUTOMODEL, export_recipe
from tests.conftest import TINY_RECIPE

needs_automodel = pytest.mark.skipif("LAYERSMITH_RECIPES" not in os.environ, reason="make test-recipes runs it")

SETTINGS = {"kl": 3.0, "lm": 1.0, "hidden": 0.5, "temperature": 2.0, "learning_rate": 0.003, "batch_tokens": 512}


@pytest.fixture(scope="module")
def parent(make_parent: Callable[..., Path]) -> Path:
    return make_parent("llama_tied")


@pytest.fixture(scope="module")
def run(parent: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "run"
    recipe = TINY_RECIPE | {"distillation": SETTINGS}
    layersmith.compress(parent, out, data=text_folder, budget=0.7, recipe=recipe)
    return out


def test_the_recipe_has_the_settings_of_the_run(run: Path, parent: Path, tmp_path: Path) -> None:
    exported = export_recipe(run, tmp_path / "out", tokens=51_200)
    settings = yaml.safe_load(exported.recipe.read_text())
    assert settings["model"]["pretrained_model_name_or_path"] == str(run / "child")
    assert settings["model"]["trust_remote_code"] is True
    assert Path(settings["teacher_model"]["pretrained_model_name_or_path"]).samefile(parent)
    assert settings["kd_ratio"] == 0.75
    assert settings["kd_loss_fn"]["temperature"] == 2.0
    assert settings["optimizer"]["lr"] == 0.003
    assert settings["dataset"]["seq_len"] == 32
    steps = settings["step_scheduler"]
    assert (steps["global_batch_size"], steps["max_steps"]) == (16, 100)
    assert steps["global_batch_size"] % steps["local_batch_size"] == 0
    assert settings["lr_scheduler"]["lr_warmup_steps"] == 5
    readme = (exported.folder / "README.md").read_text()
    assert "51,200 tokens" in readme
    assert all(note in readme for note in exported.left_out)
    assert [note.split(":")[0] for note in exported.left_out] == ["distillation.hidden", "distillation.optimizer muon"]


def test_the_command_writes_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        "layersmith",
        "export",
        str(run),
        str(tmp_path / "out"),
        "--to",
        "automodel",
        "--tokens",
        "51200",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    result = json.loads(capfd.readouterr().out)["result"]
    assert Path(result["recipe"]).is_file()


def test_what_cannot_be_said_is_refused(
    run: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Give --tokens"):
        export_recipe(run, tmp_path / "out")
    with pytest.raises(UsageError, match="not a run folder"):
        export_recipe(parent, tmp_path / "out", 1000)
    header = json.loads((run / "run.json").read_text())
    for setting, value in (("kl", 0.0), ("schedule", "polynomial")):
        changed = header | {"recipe": header["recipe"] | {"distillation": SETTINGS | {setting: value}}}
        with monkeypatch.context() as patch:
            patch.setattr("layersmith.stages.exported_recipe.Run.header", lambda _, changed=changed: changed)
            with pytest.raises(CannotExport, match=f"distillation.{setting}"):
                export_recipe(run, tmp_path / "out", 1000)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        export_recipe(run, tmp_path / "out", 1000)


# -------------------------------------------------------------------------------------------- AutoModel's reader


@needs_automodel
def test_automodel_reads_the_recipe(run: Path, tmp_path: Path) -> None:
    assert importlib.import_module("importlib.metadata").version("nemo-automodel") == AUTOMODEL
    loader = importlib.import_module("nemo_automodel.components.config.loader")
    typed = importlib.import_module("nemo_automodel.recipes._typed_config")
    distributed = importlib.import_module("nemo_automodel.recipes._dist_utils")
    path = export_recipe(run, tmp_path / "out", tokens=51_200).recipe
    settings = yaml.safe_load(path.read_text())
    for name, arguments in targets(settings):
        target = loader._resolve_target(name)
        inspect.signature(target).bind_partial(**arguments)
        if takes_anything := [p for p in inspect.signature(target).parameters.values() if p.kind is p.VAR_KEYWORD]:
            assert name.endswith("from_pretrained"), takes_anything
    assert loader._resolve_target(settings["dataloader"]["collate_fn"])

    config = typed.RecipeConfig(loader.load_yaml_config(str(path)))
    assert config.step_scheduler.max_steps == 100
    assert config.lr_scheduler.lr_warmup_steps == 5
    assert config.dataloader is not None
    assert config.optimizer is not None
    assert config.loss_fn is not None
    assert config.checkpoint.enabled
    assert config.get("kd_loss_fn").instantiate().temperature == 2.0
    assert distributed.parse_distributed_section(settings["distributed"])["tp_size"] == 1


@needs_automodel
def test_automodel_has_the_recipe(run: Path, tmp_path: Path) -> None:
    kd = importlib.import_module("nemo_automodel.recipes.llm.kd")
    settings = yaml.safe_load(export_recipe(run, tmp_path / "out", tokens=51_200).recipe.read_text())
    assert hasattr(kd, settings["recipe"])


def targets(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every ``_target_`` with its arguments."""
    for value in settings.values():
        if isinstance(value, dict):
            if "_target_" in value:
                yield value["_target_"], {k: v for k, v in value.items() if k != "_target_"}
            yield from targets(value)
