"""Launchers start several processes on one run, and a run goes on after a process was killed.

``make launchers`` runs it: it needs the packages of the launchers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_RECIPE, torchrun

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
BIN = Path(sys.executable).parent
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
    "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
RAY = [sys.executable, CLUSTER / "ray_job.py", "--processes", 2, "--cpus", 1]
pytestmark = pytest.mark.skipif("LAYERSMITH_LAUNCHERS" not in os.environ, reason="make launchers runs it")


@pytest.fixture(scope="module")
def arguments(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], list[str]]:
    """The arguments of layersmith for a run."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY_RECIPE))
    parent = make_parent("llama_tied", num_hidden_layers=2)

    def of(run: Path) -> list[str]:
        return list(map(str, ["compress", parent, run, "--data", text_folder, "--params", "0.8", "--recipe", recipe]))

    return of


@pytest.fixture(scope="module")
def expected(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the child that one process makes."""
    run = tmp_path_factory.mktemp("one") / "run"
    subprocess.run([sys.executable, "-m", "layersmith", *arguments(run)], check=True, capture_output=True)
    return (run / "child" / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of this machine alone, which a test starts and stops."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    "launcher",
    [torchrun(2, "-m", "layersmith"), [*ACCELERATE, "--module", "layersmith"], RAY],
    ids=["torchrun", "accelerate", "ray"],
)
def test_a_launcher_makes_the_child_of_one_process(
    launcher: list[object], arguments: Callable[[Path], list[str]], expected: bytes, tmp_path: Path
) -> None:
    command = [*map(str, launcher), *arguments(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report:") == 1  # two processes worked on one run, and the first alone says so
    assert (tmp_path / "run" / "child" / "model.safetensors").read_bytes() == expected


def test_ray_job_submit(arguments: Callable[[Path], list[str]], expected: bytes, tmp_path: Path) -> None:
    start = [str(BIN / "ray"), "start", "--head", "--num-cpus", "2", "--port", "0", "--dashboard-port", "8266"]
    subprocess.run(start, check=True, capture_output=True, timeout=300)
    try:
        submit = [str(BIN / "ray"), "job", "submit", "--address", "http://127.0.0.1:8266", "--", *map(str, RAY)]
        done = subprocess.run([*submit, *arguments(tmp_path / "run")], capture_output=True, text=True, timeout=900)
    finally:
        subprocess.run([str(BIN / "ray"), "stop"], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert (tmp_path / "run" / "child" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_run_whose_process_was_killed(
    rank: int, arguments: Callable[[Path], list[str]], expected: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = torchrun(2, "--max-restarts", 1, "-m", "layersmith", *arguments(run))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 300
    while not (run / "statistics").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(worker(process.pid, rank), signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "restart" in said.lower()
    assert (run / "child" / "model.safetensors").read_bytes() == expected


def worker(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process {rank} of {launcher}")
