"""Several processes that divide a parent between them make what one process makes; see :mod:`.divided`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.execution.divided", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_two_processes_make_what_one_makes_and_fail_together(tmp_path: Path) -> None:
    said = run(tmp_path, "quick")
    assert "quick: 2 processes, on the disk: equal" in said
    assert "quick: 2 processes, in memory: equal" in said
    assert "all failed with one error" in said


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
def test_several_processes_make_what_one_makes(tmp_path: Path) -> None:
    said = run(tmp_path)
    compared = [line for line in said if "processes" in line]
    assert len(compared) == 11
    assert all(line.endswith(": equal") for line in compared), compared
