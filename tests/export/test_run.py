"""An export is proved, whole or not there, and runs no code of the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import layersmith
from layersmith.errors import InputError, LayersmithError, UsageError
from layersmith.export import padded
from layersmith.export.run import RECORD
from layersmith.export.source import CannotExport, Source
from layersmith.export.target import TARGETS
from tests.export.children import MIXED, write_child


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_child(tmp_path_factory.mktemp("llama") / "child", "llama", MIXED)


def test_the_public_name_is_a_function() -> None:
    assert layersmith.export.__name__ == "export"


def test_the_proof_is_kept_beside_the_weights(child: Path, tmp_path: Path) -> None:
    exported = layersmith.export(child, tmp_path / "out", to="padded")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["proof"] == exported.proof.to_dict()
    assert "same 12 greedy tokens" in str(exported)


def test_a_loaded_model_is_exported(child: Path, tmp_path: Path) -> None:
    layersmith.export(layersmith.load(child), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()


def test_an_export_that_is_another_model_does_not_appear(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Source.tensor

    def wrong(self: Source, name: str) -> torch.Tensor:
        return whole(self, name) * (0.5 if "layers.2.mlp.down" in name else 1)

    monkeypatch.setattr(padded.Source, "tensor", wrong)
    with pytest.raises(CannotExport, match="differ by"):
        layersmith.export(child, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'padded'"):
        layersmith.export(child, tmp_path / "out", to="paded")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        layersmith.export(child, tmp_path / "full")
    monkeypatch.setitem(TARGETS, "padded", dataclasses.replace(TARGETS["padded"], extra=("no_such_package", "x")))
    with pytest.raises(InputError, match=r"pip install 'layersmith\[x\]'"):
        layersmith.export(child, tmp_path / "out")


def test_no_code_of_the_checkpoint_runs(child: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for file in child.iterdir():
        (trap / file.name).write_bytes(file.read_bytes())
    (trap / "modeling_layersmith.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    layersmith.export(trap, tmp_path / "out")  # from the plan, by layersmith's own code
    config = json.loads((trap / "config.json").read_text())
    (trap / "config.json").write_text(json.dumps(config | {"model_type": "trap", "auto_map": {"AutoConfig": "trap.C"}}))
    with pytest.raises(LayersmithError, match="--trust-remote-code"):
        layersmith.export(trap, tmp_path / "other")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "other").exists()
