"""Global distillation with the weights of parent and child sharded over several processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import layersmith
from layersmith.distillation.arguments import why_not_sharded
from layersmith.distillation.train import Trained
from layersmith.errors import UsageError
from layersmith.execution.parent import load_parent
from layersmith.recipe import DistillationRecipe
from layersmith.run.artifacts import read_json
from layersmith.run.header import read_header, write_header
from layersmith.run.runtime import Runtime
from layersmith.stages.training_rows import check_tensor_parallel
from tests.conformance.tiny import tiny_config, tiny_model
from tests.conftest import FAMILIES, NO_ATTENTION, TINY_RECIPE, block, child_model, stock_model, torchrun
from tests.distillation.sharded import learn
from tests.distillation.test_global import as_parent

CPU = Runtime(torch.device("cpu"), torch.float32)
SCRIPT = Path(__file__).with_name("sharded.py")


def launched(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = torchrun(processes, SCRIPT, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def compressed(family: str, text_folder: Path, tokenizer: Any, folder: Path) -> Path:
    """A run of a tiny parent of a family, which is written too."""
    config = tiny_config(family)
    config.vocab_size = 512
    tiny_model(config).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    return layersmith.compress(folder / "parent", folder / "one", data=text_folder, budget=0.8, recipe=TINY_RECIPE).run


def assert_same_quality(run: Path, other: Path, points: int) -> None:
    """Equal but for rounding, which grows: Adam divides small gradients by their size."""
    curves = [read_json(folder / "distillation" / "global" / "log.json") for folder in (run, other)]
    assert len(curves[0]["points"]) == points
    for one, two in zip(curves[0]["points"], curves[1]["points"], strict=True):
        assert two == pytest.approx(one, rel=1e-2)
    rows = [
        read_json(folder / "distillation" / "evaluation" / "evaluation.json")["after"]["rows"]
        for folder in (run, other)
    ]
    for one, two in zip(*rows, strict=True):
        if one["metric"] in ("loss", "kl_divergence"):
            assert two["child"] == pytest.approx(one["child"], rel=1e-2)


QUICK: dict[str, Any] = {"device_tokens": 64, "learning_rate": 0.003, "log_every": 1, "save_seconds": 0.0}


def distilled(run: Path, processes: int, settings: dict[str, Any], ends: int | None = None) -> Path:
    """The child that a number of processes distil; or they are killed once the checkpoint of a step is there."""
    recipe = run / "given.yaml"
    recipe.write_text(yaml.safe_dump({"distillation": QUICK | settings}))
    process = subprocess.Popen(
        torchrun(processes, "-m", "layersmith", "distill", run, "--recipe", recipe), text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    saved = run / "distillation" / "global" / "checkpoints"
    while ends is not None and process.poll() is None:
        if any(int(path.parent.name.partition("-")[2]) >= ends for path in saved.glob("checkpoint-*/whole")):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (process.pid, *map(int, workers)):  # those of torchrun outlive it
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == (0 if ends is None else -signal.SIGKILL), said
    assert ends is None or processes == 1 or "are sharded over" in said
    return run / "distilled"


def streamed(run: Path, folder: Path) -> Path:
    """A copy of a run whose parent stays on the disk."""
    other = Path(shutil.copytree(run, folder))
    header = read_header(other)
    header["recipe"]["stream"] = "always"
    write_header(other, header)
    return other


def models(folder: Path, family: str) -> tuple[Path, Path]:
    """A parent, and a child that lost an attention, a whole layer, and part of an FFN."""
    config = FAMILIES[family]()
    stock_model(config).save_pretrained(folder / "parent")
    removed = block(NO_ATTENTION, {"no_op": True})
    layersmith.save(
        child_model(config, [block(ffn={"intermediate_size": 32}), block(NO_ATTENTION), removed, block()]),
        folder / "child",
    )
    return folder / "parent", folder / "child"


def alone(parent: Path, child: Path, out: Path) -> tuple[Trained, dict[str, Any]]:
    """The same training by this process alone, which goes on from what is in ``out``."""
    student = load_parent(child, CPU)
    trained = learn(load_parent(parent, CPU), student, out)
    return trained, student.model.state_dict()


def assert_close(curve: Any, weights: Any, expected_curve: Any, expected_weights: Any) -> None:
    assert len(curve["points"]) == len(expected_curve["points"]) == 11
    for kind in ("points", "validation"):
        for made, expected in zip(curve[kind], expected_curve[kind], strict=True):
            assert made == pytest.approx(expected, rel=1e-3)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():  # Muon makes matrices orthogonal in bfloat16
        torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("together", [1, 2])
def test_two_processes_with_half_of_the_weights_train_the_child_of_one(together: int, tmp_path: Path) -> None:
    """Tied embeddings; a removed attention and a removed layer; killed, and gone on with by one.

    Each of two processes has rows of its own, or both compute the same rows together (tensor parallelism).
    """
    parent, child = models(tmp_path, "llama_tied")
    trained, weights = alone(parent, child, tmp_path / "one")
    two = tmp_path / "two"
    two.mkdir()
    ended = launched(2, parent, child, two, 5, together)
    assert "exitcode  : 7" in ended.stderr, ended.stderr[:3000]
    assert list(two.glob("checkpoints/checkpoint-*/whole"))
    for name in ("parent", "child"):
        held = [read_json(two / f"held-{rank}.json")[name] for rank in range(2)]
        whole = sum(p.numel() * 4 for p in load_parent(parent if name == "parent" else child, CPU).model.parameters())
        assert max(held) <= 0.51 * whole
    resumed, weights_of_two = alone(parent, child, two)
    assert_close(resumed.curve, weights_of_two, trained.curve, weights)


def test_what_does_not_go_with_tensor_parallelism_is_refused() -> None:
    def why_not(processes: int, dtype: str = "float32", has_formats: bool = False, **more: Any) -> str | None:
        recipe = DistillationRecipe(tokens=1000, tensor_parallel=2, **more)
        return why_not_sharded(recipe, processes, dtype, has_formats)

    assert why_not(2) is None
    assert why_not(4, optimizer="adamw") is None
    words = {
        "there is one process": why_not(1),
        "3 processes are not a multiple of distillation.tensor_parallel, 2": why_not(3),
        "distillation.trainer sets fsdp or deepspeed": why_not(2, trainer={"fsdp": "full_shard"}),
        "another optimizer": why_not(2, trainer={"optim": "adafactor"}),
        "number formats": why_not(2, has_formats=True),
        "adapters are trained whole": why_not(2, lora_rank=4),
        "finalists are trained whole": why_not(2, finalists=2),
        "float16": why_not(2, "torch.float16"),
        "distillation.sharded is never": why_not(2, sharded="never"),
    }
    for word, why in words.items():
        assert why is not None
        assert word in why

    def check(family: str, why: str | None) -> None:
        recipe = DistillationRecipe(tokens=1000, tensor_parallel=2)
        parent = as_parent(stock_model(tiny_config(family)))
        check_tensor_parallel(recipe, parent, why)

    check("llama", None)
    with pytest.raises(UsageError, match=r"distillation.tensor_parallel: .* because there is one process"):
        check("llama", "there is one process")
    with pytest.raises(UsageError, match=r"has no plan for the layers of GPT2LMHeadModel"):
        check("gpt2", None)


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
@pytest.mark.parametrize(("family", "together"), [("qwen3", 2), ("qwen3", 4), ("mixtral", 2)])
def test_four_processes_of_which_some_compute_the_same_rows(
    family: str, together: int, text_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Norms of heads, or experts; killed with four processes, gone on with by two, and ended by one."""
    run = compressed(family, text_folder, tokenizer, tmp_path)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    settings: dict[str, Any] = {"tokens": 9600, "batch_tokens": 192, "learning_rate": 3e-4}
    distilled(other, 4, settings | {"tensor_parallel": together}, ends=1)
    distilled(other, 2, settings | {"tensor_parallel": 2}, ends=2)
    children = [distilled(run, 1, settings), distilled(other, 1, settings)]
    assert_same_quality(run, other, points=50)
    assert (children[0] / "config.json").read_text() == (children[1] / "config.json").read_text()


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
def test_two_processes_end_together_what_one_began(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """With AdamW, autocast to bfloat16 and activations computed again; a parent on the disk."""
    parent = make_parent("qwen3")
    run = layersmith.compress(parent, tmp_path / "one", data=text_folder, budget=0.6, recipe=TINY_RECIPE).run
    other = Path(shutil.copytree(run, tmp_path / "other"))
    settings = {"tokens": 9600, "batch_tokens": 192, "learning_rate": 3e-4, "lm": 0.2}
    settings |= {"optimizer": "adamw", "precision": "bfloat16", "gradient_checkpointing": True}
    distilled(other, 1, settings, ends=1)
    distilled(streamed(other, tmp_path / "streamed"), 2, settings | {"tensor_parallel": 2})
    distilled(run, 1, settings)
    assert_same_quality(run, tmp_path / "streamed", points=50)


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
@pytest.mark.parametrize("family", ["llama_tied", "qwen3"])
def test_a_run_goes_on_with_other_numbers_of_processes(
    family: str, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """Killed with two processes whose parent stays on the disk, then with three, and ended by one."""
    parent = make_parent(family)
    run = layersmith.compress(parent, tmp_path / "one", data=text_folder, budget=0.6, recipe=TINY_RECIPE).run
    settings: dict[str, Any] = {"tokens": 19200, "batch_tokens": 192}
    other = streamed(run, tmp_path / "other")
    distilled(other, 2, settings, ends=5)
    write_header(other, read_header(run))
    distilled(other, 3, settings | {"sharded": "always"}, ends=30)
    children = [distilled(run, 1, settings), distilled(other, 1, settings)]
    assert_same_quality(run, other, points=100)
    assert (children[0] / "config.json").read_text() == (children[1] / "config.json").read_text()


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
def test_two_processes_end_what_one_began_and_write_the_same_child(
    text_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A mixture of experts, whose files have other names; the parent stays on the disk. Long rows follow."""
    run = compressed("mixtral", text_folder, tokenizer, tmp_path)
    other, settings = streamed(run, tmp_path / "other"), {"tokens": 5120, "batch_tokens": 128, "learning_rate": 3e-4}
    settings |= {"long_tokens": 1024, "long_sequence_length": 64}
    children = [distilled(folder, 2, settings) for folder in (run, other)]
    assert (children[0] / "config.json").read_text() == (children[1] / "config.json").read_text()
    assert_same_quality(run, other, points=40)
    one, two = (read_json(folder / "distillation" / "long" / "log.json")["points"] for folder in (run, other))
    assert len(one) == len(two) == 8
    assert two[-1] == pytest.approx(one[-1], rel=1e-2)


@pytest.mark.skipif("LAYERSMITH_DIVIDED" not in os.environ, reason="make divided: takes minutes")
@pytest.mark.parametrize("family", ["gemma2", "bamba", "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """A soft cap after the head, which runs without layers then; mixers with states; experts."""
    config = tiny_config(family)
    config.vocab_size = 512
    for name, seed in (("parent", 0), ("child", 1)):
        tiny_model(config, seed=seed).float().save_pretrained(tmp_path / name)
    trained, _ = alone(tmp_path / "parent", tmp_path / "child", tmp_path / "one")
    (tmp_path / "two").mkdir()
    done = launched(2, tmp_path / "parent", tmp_path / "child", tmp_path / "two", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "two" / "validation.json") == pytest.approx(trained.validation, rel=1e-2)
