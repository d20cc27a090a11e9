"""Files and folders that are written whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
