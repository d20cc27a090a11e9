"""Whether two commits make the same artifacts from the same parents: the demo, a small mixture, a small hybrid.

    python -m benchmarks.same_artifacts BEFORE AFTER [--work FOLDER] [--out FILE.md] [--runs demo mixtral ...]

Each commit is checked out into a folder of its own and runs in processes of its own, with this environment's packages
and one thread. Parents and text are made once and given to both. For each run the table says whether the child's
tensors and block configs are equal, whether ``report.json`` holds the same numbers (scores, importance, solution,
evaluation; without times, versions and paths), and which files of the run folder differ in a byte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conformance.tiny import tiny_config, tiny_model
from training.train_demo_model import train_tokenizer

ROOT = Path(__file__).parents[1]
# A dense stack, a mixture of experts, and a hybrid of attention and Mamba mixers.
FAMILIES = ("qwen3", "mixtral", "granitemoehybrid")
VOCABULARY = 512
RECIPE: dict[str, Any] = {
    "data": {
        "sequence_length": 32, "calibration_sequences": 16, "scoring_sequences": 8, "evaluation_sequences": 8,
        "training_sequences": 16,
    },
    "library": {"ffn_fractions": [0.5, 0.25], "expert_fractions": [0.5], "head_fractions": [0.5]},
    "scoring": {"batch_tokens": 128},
    "costs": {"time_child": False},
    "completion_tokens": 4,
}  # fmt: skip
COMPRESS = """
import json, sys, torch, layersmith
torch.set_num_threads(1)
parent, out, data, recipe = sys.argv[1:]
layersmith.compress(parent, out, data=data, budget=0.75, recipe=json.loads(recipe))
"""
DEMO = """
import sys, torch
from layersmith.demo.job import run_demo
torch.set_num_threads(1)
run_demo(sys.argv[1])
"""
# Keys of report.json whose values are times, versions or places.
VOLATILE = {
    "versions", "seconds", "times", "timings", "stages", "path", "run", "working_directory", "source",
    "evaluation_source", "speed", "clock", "device", "recipe", "schema", "schema_version", "version", "identity",
}  # fmt: skip


def make_inputs(work: Path, families: list[str]) -> Path:
    """Random parents with a tokenizer, and a folder of text; returns the folder of text."""
    text = work / "text"
    text.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:40]}
    for name, source in sources.items():
        (text / name).write_text(source, encoding="utf-8")
    tokenizer = train_tokenizer(sources, VOCABULARY)
    for family in families:
        config = tiny_config(family)
        config.vocab_size = VOCABULARY
        tiny_model(config).save_pretrained(work / family)
        tokenizer.save_pretrained(work / family)
    return text


def run(tree: Path, program: str, *arguments: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    environment["LAYERSMITH_CACHE"] = str(tree / "cache")
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True, env=environment, cwd=tree)


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, but for volatile keys and keys that only one of them has."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() & after.keys() - VOLATILE):
            yield from differences(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif before != after and not (isinstance(before, str) and isinstance(after, str)):  # words may be reworded
        yield f"{where}: {str(before)[:60]} => {str(after)[:60]}"


def _by_name(changed: list[str]) -> Iterator[str]:
    """Differences by the last part of their path: how many there are, and the first."""
    by_name: dict[str, list[str]] = {}
    for difference in changed:
        where, _, values = difference.partition(": ")
        by_name.setdefault(re.sub(r"\[\d+\]", "", where).split(".")[-1], []).append(values)
    for name, values in by_name.items():
        yield f"{len(values)} {name} ({values[0]})"


def compare(before: Path, after: Path) -> dict[str, str]:
    """One row of the table for two run folders."""
    children = [load_file(folder / "child" / "model.safetensors") for folder in (before, after)]
    same_names = children[0].keys() == children[1].keys()
    same = same_names and all(torch.equal(tensor, children[1][name]) for name, tensor in children[0].items())
    configs = [
        json.loads((folder / "child" / "config.json").read_text())["block_configs"] for folder in (before, after)
    ]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (before, after)]
    changed = list(differences(*reports))
    files = [
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} for folder in (before, after)
    ]
    common = files[0].keys() & files[1].keys()
    differ = sorted(str(name) for name in common if files[0][name].read_bytes() != files[1][name].read_bytes())
    return {
        "child's tensors": "equal" if same else "**differ**",
        "block configs": "equal" if configs[0] == configs[1] else "**differ**",
        "report.json": "; ".join(_by_name(changed)) or "equal",
        "files": f"{len(common) - len(differ)} of {len(common)} equal, not {', '.join(differ)}; "
        f"{len(files[0]) - len(common)} only before, {len(files[1]) - len(common)} only after",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="Commit.")
    parser.add_argument("after", help="Commit.")
    parser.add_argument("--work", type=Path, help="Folder for checkouts, parents and runs; default: a temporary one.")
    parser.add_argument("--out", type=Path, help="Also write the table into this file.")
    parser.add_argument("--runs", nargs="+", default=["demo", *FAMILIES], help="demo, or model types.")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="same-artifacts-"))
    families = [name for name in args.runs if name != "demo"]
    text = make_inputs(work, families)
    trees = []
    for commit in (args.before, args.after):
        digest = subprocess.check_output(["git", "rev-parse", "--short", commit], cwd=ROOT, text=True).strip()
        trees.append(work / digest)
        if not trees[-1].exists():
            subprocess.run(["git", "worktree", "add", "--detach", str(trees[-1]), digest], cwd=ROOT, check=True)
    rows = {}
    for name in args.runs:
        outs = [tree / "runs" / name for tree in trees]
        for tree, out in zip(trees, outs, strict=True):
            if name == "demo":
                run(tree, DEMO, out)
            else:
                run(tree, COMPRESS, work / name, out, text, json.dumps(RECIPE))
        rows[name] = compare(*outs)
    columns = list(next(iter(rows.values())))
    lines = [
        f"Artifacts of {trees[0].name} and {trees[1].name}, one thread.",
        "",
        f"| run | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| {name} | {' | '.join(row.values())} |" for name, row in rows.items()),
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    for tree in trees:
        if args.work is None:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
