"""Joint distillation whose rows are divided among several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layersmith.library.stored_weights import Kept
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model, torchrun
from tests.distillation.jointly import jointly
from tests.distillation.test_local import chosen_of, open_library


def launched(processes: int, *arguments: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = torchrun(processes, "-m", "tests.distillation.jointly", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes half a minute")
def test_several_processes_train_what_one_trains_and_fail_together(tmp_path: Path) -> None:
    """A step has two rows, so the third process waits; the last step has one. Two fail in layer 2, and three go on."""
    parent = tmp_path / "parent"
    torch.manual_seed(0)
    stock_model(tiny_config("llama")).save_pretrained(parent)
    said = sorted(launched(2, parent, tmp_path / "several", "fails").splitlines())
    fault = "a fault of the second process"
    assert said == [f"0: RuntimeError: process 1 of 2 failed: ValueError: {fault}", f"1: ValueError: {fault}"]
    assert launched(3, parent, tmp_path / "several", "not") == ""
    one, several = jointly(parent, tmp_path / "one"), jointly(parent, tmp_path / "several")
    pairs: list[Kept] = [library.pairs for library in (one, several)]
    assert len(pairs[0].records) == len(pairs[1].records) == 4
    for alone, together in zip(pairs[0].records, pairs[1].records, strict=True):
        assert alone["tokens"] == together["tokens"] > 0
        assert together["of"] == alone["of"]
        for name in ("pruned", "before", "after"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4)
    chosen = chosen_of(one)
    weights = [library.compose(chosen).state_dict() for library in (one, several)]
    unchanged = open_library(parent).compose(chosen).state_dict()
    moved = 0
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)
        moved += not torch.equal(tensor, unchanged[name])
    assert moved > 5
