"""The second part of global distillation, on longer rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import layersmith
from layersmith.distillation import trainer
from layersmith.errors import UsageError
from layersmith.run.artifacts import read_json, read_tensors
from layersmith.run.progress import Progress
from layersmith.stages.distill_finished import distill
from tests.conftest import TINY_RECIPE

SETTINGS: dict[str, Any] = {
    "tokens": 1024, "long_tokens": 2048, "long_sequence_length": 128, "batch_tokens": 256, "device_tokens": 128,
    "learning_rate": 0.003, "log_every": 1, "save_seconds": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    layersmith.compress(make_parent("llama_tied"), out, data=text_folder, budget=0.6, recipe=TINY_RECIPE)
    return out


class Interrupted(Exception):
    pass


class Watching(Progress):
    """Notes what was trained on, and stops in the middle of it if asked."""

    def __init__(self, end: float = float("inf")):
        self.end, self.steps = end, list[float]()

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        def advance(tokens: float, *more: Any) -> None:
            if name == "distilled":
                self.steps.append(tokens)
                if sum(self.steps) >= self.end:
                    raise Interrupted

        yield advance


def test_it_follows_on_longer_rows_and_is_resumed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("whole", "other"))
    length = read_tensors(run / "data" / "tokens.safetensors")["evaluation"].shape[1]
    made = distill(whole, recipe={"distillation": SETTINGS})
    first, second = (
        read_tensors(whole / "distillation" / name / "tokens.safetensors")["training"] for name in ("data", "long_data")
    )
    assert (first.shape[1], second.shape) == (length, (16, 128))
    assert not torch.isin(second.view(-1, length)[:, :8].sum(1), first[:, :8].sum(1)).all()  # text of its own
    curves = [read_json(whole / "distillation" / name / "log.json")["points"] for name in ("global", "long")]
    assert [points[-1]["tokens"] for points in curves] == [1024, 2048]
    before, after = ({r["metric"]: r["child"] for r in e["rows"]} for e in (made.before, made.after))
    assert after["kl_divergence_of_long_rows"] < before["kl_divergence_of_long_rows"]
    assert "rows of 128 tokens" in made.after["rows"][-1]["label"]
    assert "3,072" in (made.child / "README.md").read_text()

    monkeypatch.setattr(trainer, "_SAVING_SHARE", float("inf"))  # a checkpoint after every step
    with pytest.raises(Interrupted):
        distill(other, recipe={"distillation": SETTINGS}, progress=Watching(1024 + 4 * 256))
    watching = Watching()
    distill(other, recipe={"distillation": SETTINGS}, progress=watching)
    assert watching.steps[0] == 1024  # the first part is not repeated
    assert watching.steps[1] >= 2 * 256
    for file in ("distilled/model.safetensors", "distillation/long/log.json", "distillation/global/log.json"):
        assert (other / file).read_bytes() == (whole / file).read_bytes(), file
    assert not list(other.rglob("checkpoints"))


def test_text_of_its_own(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    text = tmp_path / "long.txt"
    text.write_text("".join(f"line {i} of a long text\n" for i in range(3000)))
    distill(copy, recipe={"distillation": SETTINGS | {"long_data": str(text)}})
    description = read_json(copy / "distillation" / "long_data" / "data.json")
    assert (description["source"], description["sequence_length"]) == (str(text), 128)


def test_it_needs_a_first_part(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"follow distillation\.tokens"):
        layersmith.compress(
            "nowhere", tmp_path / "run", data="x", recipe={"distillation": {"long_tokens": 9}}, budget=0.8
        )


@pytest.mark.parametrize(
    ("length", "words"),
    [(100, "larger multiple"), (32, "larger multiple"), (1 << 20, "context of"), (256, "data.evaluation_sequences")],
)
def test_lengths_that_cannot_be_are_refused_before_work_starts(run: Path, length: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        distill(run, recipe={"distillation": SETTINGS | {"long_sequence_length": length}})
    assert "distillation.long_sequence_length" in str(refused.value)
    assert not (run / "distillation").exists()
