"""Unfinished work is read back as it was kept, but never for other inputs."""

from pathlib import Path

import torch

from layersmith.run.digests import read_sealed, write_sealed
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
    with Journal(path, "x") as journal:
        assert journal.known["a", 2] == {"kl": 0.125}
    assert path.read_bytes().startswith(whole)
    with Journal(path, "y") as journal:
        assert not journal.known
    assert len(path.read_bytes().splitlines()) == 1


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


def test_damaged_lines_and_what_follows_them_are_not_used(tmp_path: Path) -> None:
    """Whichever byte of a journal is changed, what is read was written."""
    path, written = tmp_path / "journal", {("a", row): {"loss": row + 0.5} for row in range(4)}
    with Journal(path, "x") as journal:
        journal.write("a", range(4), list(written.values()))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with Journal(path, "x") as journal:
            assert journal.known.items() <= written.items()


def test_damaged_checkpoints_and_sealed_files_are_not_used(tmp_path: Path) -> None:
    path, tensors = tmp_path / "checkpoint", {"a": torch.arange(6.0)}
    Checkpoint(path, "x", 0.0).save(tensors, {"step": 3})
    assert Checkpoint(path, "x", 0.0).load() is not None
    assert Checkpoint(path, "y", 0.0).load() is None
    file, seal = tmp_path / "file", tmp_path / "seal"
    file.write_text("contents")
    write_sealed(seal, {"step": 3}, [file])
    assert read_sealed(seal, dict) == {"step": 3}
    for damaged, read in (
        (path, lambda: Checkpoint(path, "x", 0.0).load()), (file, lambda: read_sealed(seal, dict)),
        (seal, lambda: read_sealed(seal, dict)),
    ):  # fmt: skip
        whole = damaged.read_bytes()
        for place in range(len(whole)):
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            found = read()
            assert found is None or found == {"step": 3} or torch.equal(found[0]["a"], tensors["a"])
        for shorter in (b"", whole[: len(whole) // 2]):
            damaged.write_bytes(shorter)
            assert read() is None
        damaged.write_bytes(whole)
