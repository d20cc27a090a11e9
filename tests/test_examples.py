"""The scripts in examples/. ``make examples`` runs those in examples/after, with the packages that they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig
from layersmith.demo.job import MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"
after_compression = pytest.mark.skipif(
    os.environ.get("LAYERSMITH_EXAMPLES") != "all", reason="make examples runs it, with the packages that it needs"
)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without one attention and one FFN."""
    parent = layersmith.load(MODEL)
    blocks = layersmith.block_configs(parent.config)
    blocks[2] = BlockConfig(AttentionConfig(no_op=True), blocks[2].ffn)
    blocks[4] = BlockConfig(blocks[4].attention, FFNConfig(no_op=True))
    made = layersmith.build(parent.config, blocks)
    weights = parent.state_dict()
    made.load_state_dict({name: weights[name] for name in made.state_dict()})
    folder = tmp_path_factory.mktemp("child") / "child"
    layersmith.save(made, folder, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script as a process that does not import layersmith, as users of a child do; returns what it prints."""

    def run(script: str, *arguments: object) -> str:
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "after" / script), *map(str, arguments)],
            capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"$ python {script}", done.stdout, sep="\n")
        return done.stdout

    return run


@after_compression
def test_the_child_drafts_for_its_parent(child: Path, run: Run) -> None:
    rate = re.search(r"acceptance rate: (\d+)%", run("speculative.py", MODEL, child))
    assert rate is not None
    assert 5 < int(rate[1]) < 100


@after_compression
def test_lora(child: Path, run: Run, tmp_path: Path) -> None:
    printed = run("lora.py", child, tmp_path / "merged")
    first, last = map(float, re.findall(r"(\d+\.\d+), (\d+\.\d+)", printed)[0])
    assert last < first
    assert layersmith.block_configs(layersmith.load(tmp_path / "merged").config)[2].attention.no_op


@after_compression
def test_supervised_fine_tuning(child: Path, run: Run, tmp_path: Path) -> None:
    assert "with the same weights: True" in run("sft.py", child, tmp_path / "tuned")


@after_compression
def test_torchao(child: Path, run: Run) -> None:
    int8, int4 = map(float, re.findall(r"KL to the child (\d+\.\d+)", run("torchao_int8.py", child)))
    assert int8 < int4 < 0.5


@after_compression
def test_gptq(child: Path, run: Run, tmp_path: Path) -> None:
    in_memory, loaded = map(float, re.findall(r": (\d+\.\d+) nats", run("gptq.py", child, tmp_path / "gptq")))
    assert 0 < in_memory < 0.5
    assert loaded == pytest.approx(in_memory, abs=1e-3)


@after_compression
def test_onnxruntime(child: Path, run: Run, tmp_path: Path) -> None:
    layersmith.export(child, tmp_path / "onnx", "onnx")
    model, tokenizer = layersmith.load(child).eval(), AutoTokenizer.from_pretrained(child)
    ids = tokenizer("def read_file(path):\n    with open(path", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0])
    assert run("onnxruntime_text.py", tmp_path / "onnx").strip() == text.strip()


@after_compression
def test_lm_eval(child: Path, run: Run) -> None:
    accuracy = re.search(r"accuracy: (\d\.\d+)", run("lm_eval_harness.py", child, EXAMPLES / "after" / "items.jsonl"))
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.75


@pytest.mark.parametrize("script", sorted((EXAMPLES / "cluster").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_for_clusters_are_valid_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
