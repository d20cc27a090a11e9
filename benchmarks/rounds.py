"""Compression in one round and in several, with equal training tokens in all.

    python -m benchmarks.rounds PARENT --data TEXT --sizes 0.625 0.5 --tokens 300000 --work W --out F.json

PARENT is a model's folder, or ``demo``. Each child is made by ``layersmith compress`` with default steps between
rounds. They share ``--tokens`` equally; with ``--early`` those before the last get this share together. Children are
judged on the run's evaluation rows before and after the training of the last round, and compared in pairs. A row that
is in the output file already is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

import layersmith
from benchmarks.quality import commit, write_rows
from benchmarks.rivals.judge import Judge, Tasks, difference, mean, over_seeds
from layersmith.demo.job import MODEL, split_library
from layersmith.demo.job import recipe as demo_recipe
from layersmith.execution.parent import load_parent
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_tensors
from layersmith.run.runtime import Runtime
from layersmith.scoring.score import standard_error


def made(args: argparse.Namespace, size: float, rounds: int, seed: int) -> dict[str, Any]:
    """One child: its KL by row, before and after the last training."""
    share = 1 / rounds if args.early is None else args.early / max(1, rounds - 1)
    early = [int(share * args.tokens)] * (rounds - 1)
    settings = [*args.set, f"rounds.count={rounds}", f"distillation.tokens={args.tokens - sum(early)}", f"seed={seed}"]
    settings += [f"rounds.tokens={early}"] * bool(early)
    folder = args.work / f"{size:g}-{args.tokens}-{rounds}-{args.early or ''}-{seed}"
    if args.parent == "demo":
        data, held_out = split_library(args.work / "text")
        parent, base = str(MODEL), dataclasses.replace(demo_recipe(held_out), completion_tokens=0)
    else:
        parent, data, base = args.parent, args.data, Recipe(completion_tokens=0)
    started = time.process_time()
    layersmith.compress(parent, folder, data=data, budget=f"{size}", recipe=base.with_settings(settings))
    seconds = time.process_time() - started
    loaded = load_parent(parent, Runtime.detect("cpu"))
    rows = read_tensors(folder / "data" / "tokens.safetensors")["evaluation"][: args.rows]
    judge = Judge(loaded, None, {"unseen": rows}, Tasks([], 1), args.work)
    kl = {
        when: judge.on_text(layersmith.load(folder / name, dtype=torch.float32).eval())["unseen"]["kl"]
        for when, name in (("before", "child"), ("after", "distilled"))
    }
    return {"tokens": args.tokens, "early_tokens": early, "seconds": seconds, **kl}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; differences to one round are paired by rows of text and by seed."""
    lines = [
        "| parent | parameters | rounds | training tokens | of which before the last round | seeds "
        "| KL before the last training | KL | less than in one round |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in dict.fromkeys(map(_line, rows)):
        parent, size, tokens, rounds, early = line
        here = [r for r in rows if _line(r) == line]
        after = over_seeds([r["after"] for r in here])
        seeds = {r["seed"] for r in here}
        one = [r for r in rows if _line(r) == (parent, size, tokens, 1, "") and r["seed"] in seeds]
        said = ""
        if rounds > 1 and len(one) == len(here):
            less, error = difference(over_seeds([r["after"] for r in one]), after)
            said = f"{less:+.4f} ± {error:.4f}"
        before = mean([mean(r["before"]) for r in here])
        loss = f"{mean(after):.4f} ± {standard_error(after):.4f}"
        cells = (parent, f"{size:g}", rounds, f"{tokens:,}", early, len(here), f"{before:.4f}", loss, said)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"Commit {rows[0]['commit']}; one thread."]) + "\n"


def _line(row: dict[str, Any]) -> tuple[str, float, int, int, str]:
    early = sum(row["early_tokens"])
    return row["parent"], row["size"], row["tokens"], row["rounds"], f"{early:,}" if early else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("--name", help="of the parent, in the table; default: its folder's")
    parser.add_argument("--data")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.625, 0.5])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=300_000, help="training tokens in all")
    parser.add_argument("--early", type=float, help="share of the tokens before the last round")
    parser.add_argument("--rows", type=int, default=64, help="evaluation rows, at most")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the recipe, as in layersmith compress")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    name = args.name or Path(args.parent).name
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for size in args.sizes:
        for seed in args.seeds:
            for rounds in args.rounds:
                key = {"parent": name, "size": size, "tokens": args.tokens, "rounds": rounds, "seed": seed}
                key |= {"early": args.early if rounds > 1 else None}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(key | made(args, size, rounds, seed) | {"commit": commit()})
                write_rows(args.out, rows)
                args.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
