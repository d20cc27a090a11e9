"""Several processes of a launcher work on one run: the result equals that of one, and no failure leaves any waiting."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import layersmith
from layersmith.run.artifacts import read_json
from layersmith.stages.distill_finished import distill
from tests.conftest import TINY_RECIPE, torchrun

RECIPE = TINY_RECIPE | {
    "local_distillation": {"tokens": 128, "coupled_tokens": 128, "batch_tokens": 64},
    "distillation": {"batch_tokens": 128, "device_tokens": 64, "learning_rate": 0.003, "log_every": 2, "tokens": 1024},
}


def on_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    command, environment = torchrun(2, "-m", "layersmith", *arguments), os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_compress_and_distil_give_what_one_process_does(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    parent = make_parent("llama_tied", num_hidden_layers=2)
    done = on_two("compress", parent, tmp_path / "two", "--data", text_folder, "--params", "0.8", "--recipe", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report:") == 1  # the first alone says what came of it
    result = layersmith.compress(parent, tmp_path / "one", data=text_folder, budget=0.8, recipe=RECIPE)
    assert result.child == tmp_path / "one" / "distilled"
    rows = read_json(tmp_path / "one" / "report.json")["evaluation"]["rows"]
    assert rows == [{"parent_standard_error": None, "task": None} | row for row in result.evaluation["rows"]]
    as_cut = read_json(tmp_path / "one" / "evaluation" / "evaluation.json")["rows"]
    kl = next(row["child"] for row in as_cut if row["metric"] == "kl_divergence")
    assert result.metric("kl_divergence")["child"] < kl
    made = [
        {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for place in ("data", "library", "scores", "frontier", "refine", "solution", "pairs", "child", "evaluation")
            for file in sorted((folder / place).rglob("*"))
            if file.is_file()
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert made[0].keys() == made[1].keys()
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []
    assert any(record["tokens"] for record in read_json(tmp_path / "two" / "library" / "distilled.json"))
    curves = [read_json(tmp_path / run / "distillation" / "global" / "log.json")["points"] for run in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 4
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    weights = [layersmith.load(tmp_path / run / "distilled").state_dict() for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=1e-3)
    assert not list((tmp_path / "two").glob("*.work"))


def test_finalists_on_two_and_gone_on_with_one(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """A run that was interrupted in global distillation on two processes gives the same losses when one finishes it."""
    settings = RECIPE["distillation"] | {"save_seconds": 0.0, "log_every": 1}
    recipe = RECIPE | {"distillation": settings | {"tokens": 0, "finalist_distance": 1, "finalist_tokens": 256}}
    parent = make_parent("llama_tied", num_hidden_layers=2)
    run = layersmith.compress(parent, tmp_path / "one", data=text_folder, budget=0.8, recipe=recipe).run
    other = shutil.copytree(run, tmp_path / "two")
    command = ("--tokens", 2560, "--finalists", 2)
    process = subprocess.Popen(
        torchrun(2, "-m", "layersmith", "distill", other, *command),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    saved = other / "distillation" / "global" / "checkpoints"
    while process.poll() is None and not list(saved.glob("checkpoint-*/whole")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(read_json(other / "distillation" / "finalists" / "finalists.json")) == 2
    for folder in (run, other):
        distill(folder, tokens=2560, finalists=2)
    curves = [read_json(folder / "distillation" / "global" / "log.json")["points"] for folder in (run, other)]
    assert len(curves[0]) == len(curves[1]) == 20
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    weights = [layersmith.load(folder / "distilled").state_dict() for folder in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=3e-4, rtol=3e-3)


SCRIPT = """
import os
from contextlib import contextmanager
from layersmith.run import ranks
from layersmith.errors import InputError
from layersmith.run.runtime import Runtime

rank = Runtime.detect("cpu").rank
ranks.start(Runtime.detect("cpu"))
assert ranks.from_first(lambda: rank + 5) == 5

@contextmanager
def opened():
    raise InputError("no such text")
    yield

def entered():
    with ranks.first(opened):
        print("went in")

def within():
    ranks.together(lambda: ranks.together(lambda: 1 // (1 - rank)))

for work in (entered, within, lambda: ranks.on_first(lambda: os._exit(9))):
    try:
        work()
        print("went on")
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def test_what_fails_in_one_process_ends_all() -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=os.environ | group | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    bug = "ZeroDivisionError: integer division or modulo by zero"
    assert said[0] == ["InputError: no such text", f"RuntimeError: process 1 of 2 failed: {bug}"]
    assert said[1][:2] == ["InputError: no such text", bug]
    assert said[1][2].startswith("LayersmithError: another process of this run ended")
