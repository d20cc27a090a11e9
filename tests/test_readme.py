"""Commands, options, make targets and links in README exist."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("layersmith ")]
IN_TABLE = re.findall(r"^\| `(layersmith [^`]+)` \|", README, re.MULTILINE)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from layersmith.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, timeout=300)


def test_readme_has_commands() -> None:
    assert len(COMMANDS) >= 2
    assert len(IN_TABLE) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_on_a_small_model(
    command: str, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """Each command as written, as a dry run, with a small local model and local data."""
    words = shlex.split(command)[1:]
    words[1], words[2] = str(make_parent("qwen3")), str(tmp_path / "run")
    words[words.index("--data") + 1] = str(text_folder)
    if "--memory" in words:
        words[words.index("--memory") + 1] = "0.8"
    done = run(*words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "can be reached" in done.stdout


@pytest.mark.parametrize("command", IN_TABLE)
def test_options_exist(command: str) -> None:
    words = shlex.split(command.replace("[", "").replace("]", ""))[1:]
    known = run(words[0], "--help")
    assert known.returncode == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in known.stdout, option


def test_make_targets_and_links_exist() -> None:
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


# Functions with many parameters, and why. Options of the command line and of the main Python calls are keywords.
MANY_PARAMETERS = {
    "cli": "options", "compress": "options", "stages": "those of compress", "distill": "options", "plan": "options",
    "job_of_run": "options", "evaluate": "options", "search": "options", "search_several": "those of search",
    "search_nested": "options", "load": "options", "load_sharded": "those of load",
    "parse_budget": "one for each limit",
    "make_plan": "the parts of a child", "head_losses": "the operands of a fused operation",
    "_of_kind": "what experiments found of a kind of layer",
}  # fmt: skip


def test_functions_are_short_and_have_few_parameters() -> None:
    """At most 60 lines and 6 parameters; the commands of the command line declare an option on every line."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or path.stem == "cli":
                continue
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
            names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            assert len(names - {"self", "cls"}) <= 6 or node.name in MANY_PARAMETERS, f"{path}: {node.name}"


def test_classes_have_at_most_200_lines() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 200, f"{path}: {node.name}"


def test_modules_have_at_most_600_lines() -> None:
    """Unless a module says why; the file that is copied into checkpoints has to be one file."""
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600 or "It is longer than a module should be because" in text, path
