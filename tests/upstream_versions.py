"""``make upstream``: tests of everything that leans on Transformers, under its lowest and its newest supported version.

    python tests/upstream_versions.py 5.15.0 5.24.0

Each version gets an environment of its own, ``.venv-transformers-VERSION``, with the packages that do not depend on
it as constraints.txt pins them. Tests run in two processes, or in as many as the variable ``PROCESSES`` says. The
result is written to docs/upstream.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Packages whose version follows from that of Transformers.
FOLLOWERS = ("transformers", "tokenizers", "huggingface_hub", "datasets", "accelerate", "hf-xet", "fsspec")
PROCESSES = os.environ.get("PROCESSES", "2")
TESTS = ("tests/test_upstream.py", "tests/heterogeneous", "tests/model_descriptor")


def environment(version: str) -> Path:
    """The Python of an environment with this version of Transformers."""
    folder = ROOT / f".venv-transformers-{version}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        pins = [pin for pin in pins if pin.split("==")[0] not in FOLLOWERS]
        (folder / "constraints.txt").write_text("\n".join([*pins, f"transformers=={version}"]) + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["-c", folder / "constraints.txt"]
        subprocess.run([*install, "torch"], check=True, cwd=ROOT)
        subprocess.run([*install, "-e", ".[dev]"], check=True, cwd=ROOT)
        (folder / ".ready").touch()
    return python


def run(version: str) -> str:
    """One row of the table: what pytest's last line says, and the failed tests."""
    command = [str(environment(version)), "-m", "pytest", "-n", PROCESSES, "--dist", "worksteal", "-rf", *TESTS]
    started = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    last = done.stdout.strip().splitlines()[-1]
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|xfailed|xpassed|errors?)", last)) or last
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    minutes = (time.monotonic() - started) / 60
    return f"| {version} | {counts} | {minutes:.0f} min | {', '.join(f'`{name}`' for name in failed) or 'none'} |"


def main() -> None:
    rows = [run(version) for version in sys.argv[1:]]
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    torch_pin = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    text = f"""# Versions of Transformers

The last run of `make upstream`: {", ".join(f"`{name}`" for name in TESTS)}, torch {torch_pin and torch_pin[1]},
Python {sys.version.split()[0]}, commit {commit}.

| Transformers | tests | time | failed |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    (ROOT / "docs" / "upstream.md").write_text(text)
    print(text)
    sys.exit(any(not row.endswith("| none |") for row in rows))


if __name__ == "__main__":
    main()
