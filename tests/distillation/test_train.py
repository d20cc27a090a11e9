"""Which checkpoint an interrupted training goes on from."""

import json
import logging
from pathlib import Path

import pytest

from layersmith.distillation.train import last_complete_checkpoint
from layersmith.distillation.trainer import COMPLETE, digests_of

FILES = ("states/__0_0.distcp", "states/.metadata", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "states").mkdir(parents=True)
    for name in FILES:
        (made / name).write_text(f"{name} of {step}")
    (made / COMPLETE).write_text(json.dumps(digests_of(made)))
    return made


def test_the_last_intact_checkpoint_is_used(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    last = checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == str(last)


@pytest.mark.parametrize("name", [*FILES, COMPLETE])
@pytest.mark.parametrize("content", [None, "", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    for damaged, expected in ((last, str(first)), (first, None)):
        if content is None:
            (damaged / name).unlink()
        else:
            (damaged / name).write_text(content)
        with caplog.at_level(logging.WARNING):
            assert last_complete_checkpoint(tmp_path) == expected
        assert not damaged.exists()
    # Without the file that is written last, it is what a killed process left, which is no news.
    assert bool(caplog.records) == (content is not None or name != COMPLETE)


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoint-x").is_dir()
