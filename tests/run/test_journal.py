"""Unfinished work is read back as it was kept, but never for other inputs."""

from pathlib import Path

import torch

from layersmith.run.journal import Checkpoint, Journal, work_folder


def test_a_journal_resumes_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "scores.partial"
    with Journal(path, "x") as journal:
        journal.write("a", [0, 1], [{"kl": 0.5}, {"kl": 0.25}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"of": "a", "row": 2, "val')
    with Journal(path, "x") as journal:
        assert journal.known == {("a", 0): {"kl": 0.5}, ("a", 1): {"kl": 0.25}}
        assert journal.has("a", [0, 1])
        assert not journal.has("a", [2])
        journal.write("a", [1, 2], [{"kl": 9.0}, {"kl": 0.125}])
    assert path.read_bytes() == whole + b'{"of": "a", "row": 2, "values": {"kl": 0.125}}\n'
    with Journal(path, "y") as journal:
        assert not journal.known
    assert path.read_bytes() == b'{"inputs": "y"}\n'


def test_a_journal_without_a_file_keeps_results_in_memory() -> None:
    with Journal(None, "") as journal:
        journal.write("a", [0], [{"kl": 0.5}])
        assert journal.has("a", [0])


def test_a_checkpoint_is_of_its_inputs(tmp_path: Path) -> None:
    tensors = {"sum": torch.arange(3.0, dtype=torch.float64)}
    checkpoint = Checkpoint(tmp_path / "statistics.partial", "x", every_seconds=1000.0)
    assert checkpoint.load() is None
    assert not checkpoint.is_due
    checkpoint.save(tensors, {"done": 7})
    loaded, state = Checkpoint(tmp_path / "statistics.partial", "x", 0.0).load() or ({}, None)
    assert torch.equal(loaded["sum"], tensors["sum"])
    assert state == {"done": 7}
    assert Checkpoint(tmp_path / "statistics.partial", "y", 0.0).load() is None
    assert not Checkpoint(None, "x", -1.0).is_due


def test_a_work_folder_of_other_inputs_is_emptied(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "work", "x")
    (folder / "file").write_text("kept")
    assert (work_folder(tmp_path / "work", "x") / "file").is_file()
    assert not (work_folder(tmp_path / "work", "y") / "file").exists()
