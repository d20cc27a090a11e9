"""Files and folders that are written whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layersmith.errors import InputError
from layersmith.recipe import Recipe
from layersmith.run.artifacts import TEMPORARY, remove_leftovers, temporary_folder, whole_folder
from layersmith.run.folder import Run
from layersmith.run.journal import Journal
from tests.run.test_folder import HEADER

WRITE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from layersmith.run.artifacts import whole_folder, write_text
out = Path(sys.argv[1])
write_text(out / "file", "text")
with whole_folder(out / "folder") as folder:
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
"""


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], check=True, umask=umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = 0o666 & ~umask
    assert modes == {"file": files, "folder": 0o777 & ~umask, "a.safetensors": files}


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}child.abc").mkdir()
    (tmp_path / f"{TEMPORARY}times.csv.abc").write_text("half")
    with temporary_folder(tmp_path, "child") as living:
        with whole_folder(tmp_path / "child"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {"child", living.name, f"{TEMPORARY}times.csv.abc"}
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"child", living.name}
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


@pytest.mark.parametrize("name", [".lock", "log.jsonl", "scores.partial"])
def test_links_are_not_followed(name: str, tmp_path: Path) -> None:
    """A file that someone laid a link to is neither emptied nor added to."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = Run(tmp_path / "run")
    with run.open(HEADER, Recipe()):
        pass
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(victim)

    def work() -> None:
        with run.locked(), Journal(run.partial("scores"), "a"):
            run.log.add("scores", "begun")

    with pytest.raises(InputError, match=f"{name}: is a link"):
        work()
    assert victim.read_text() == "precious"


def test_entries_of_the_cache_and_lines_of_the_log_that_are_damaged_do_no_harm(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for line in (b"\xff\xfe", b"[]", b'{"stage": 3}', json.dumps({"event": "done"}).encode()):
        with open(tmp_path / "log.jsonl", "ab") as file:
            file.write(line + os.linesep.encode())
    assert run.log.times() == []
    assert run.log.made() == {}
