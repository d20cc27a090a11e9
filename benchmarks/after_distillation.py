"""Children of layersmith and of other methods after global distillation on the same tokens.

    python -m benchmarks.after_distillation RUN --outside text.jsonl --work WORK --out after-distillation.json
        [--share 0.75] [--methods layersmith Minitron "GISP refit"] [--tokens 1000000] [--tasks-in tasks/]

RUN, the text outside and WORK are those of ``benchmarks/quality.py``; children that it made are taken from WORK. All
children are trained by ``layersmith.distillation.train`` on the same rows in the same order, with the recipe's default
settings in bfloat16. An interrupted training is resumed. Methods that are in the file already are not trained again.

A child of Minitron is computed at the parent's hidden size, with zeros in the dimensions that it does not have
(``benchmarks/rivals/minitron.py``). Gradients of weights that are zero are set to zero, so they stay zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.quality import OURS, RIVALS, Methods, commit, prepared, write_rows
from benchmarks.rivals.judge import Judge, difference, mean
from layersmith.data.training import TrainingSource, training_rows
from layersmith.distillation.steps import Steps
from layersmith.distillation.train import GlobalSetup, TrainingRows, in_float32, train
from layersmith.recipe import DistillationRecipe
from layersmith.stages.data import DATA
from layersmith.stages.job import Job

TEXTS = ("inside", "outside")


def rows_of(job: Job, recipe: DistillationRecipe) -> torch.Tensor:
    """Rows ``[N, T]`` of the run's text, without those of evaluation and scoring."""
    tokens = job.read(DATA)
    run_rows = {"scoring": tokens.scoring, "evaluation": tokens.evaluation}
    steps = Steps.of(recipe, recipe.tokens, tokens.evaluation.shape[1], 1)
    source = TrainingSource(job.data, True, steps.count * steps.rows, job.recipe.data.overlap)
    rows, description = training_rows(source, job.recipe.data, job.tokenizer, run_rows, job.recipe.seed)
    print(json.dumps(description), flush=True)
    return rows


def child_of(methods: Methods, method: str, share: float) -> tuple[PreTrainedModel, float]:
    """A child in float32, and its parameters in the layers as a share of the parent's."""
    name, _, refit = method.partition(" ")
    made = methods.ours(share, False, True) if name == OURS else methods.rival(name, share, refit == "refit")
    return in_float32(made.child), made.parameters / methods.total


def keep_zeros(child: PreTrainedModel) -> None:
    """Weights that are zero now stay zero in training."""
    for parameter in child.parameters():
        if parameter.ndim and bool((parameter == 0).any()):
            mask = parameter.detach() != 0
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def judged(judge: Judge, child: PreTrainedModel) -> dict[str, Any]:
    """Evaluated in bfloat16, as it would be saved."""
    child.eval().to(torch.bfloat16)
    result = {"text": judge.on_text(child), "tasks": judge.on_tasks(child)}
    child.float()
    return result


def measure(
    methods: Methods, judge: Judge, method: str, args: argparse.Namespace, rows: torch.Tensor
) -> dict[str, Any]:
    """Train one child, and evaluate it before and after."""
    child, parameters = child_of(methods, method, args.share)
    child.requires_grad_(True)
    row = {"method": method, "share": args.share, "parameters": parameters, "tokens": args.tokens, "commit": commit()}
    before = args.work / f"before-{method.replace(' ', '-')}-{args.share}.json"
    if not before.is_file():
        before.write_text(json.dumps(judged(judge, child)), encoding="utf-8")
        child, parameters = child_of(methods, method, args.share)  # the weights were rounded
        child.requires_grad_(True)
    if method.startswith("Minitron"):
        keep_zeros(child)
    name = f"distilled-{method.replace(' ', '-')}-{args.share}-{args.tokens}"
    setup = GlobalSetup(
        recipe=args.recipe,
        tokens=args.tokens,
        seed=methods.job.recipe.seed,
        folder=args.work / name,
        curve=args.work / f"{name}-curve.json",
        name=method,
    )
    setup.folder.mkdir(exist_ok=True)
    started, done = time.process_time(), 0.0

    def advance(tokens: float) -> None:
        nonlocal done
        done += tokens
        print(f"{method}: {done:,.0f} tokens, {time.process_time() - started:,.0f} CPU s", flush=True)

    train(methods.job.parent, child, TrainingRows(rows), setup, advance)
    row |= {"seconds": time.process_time() - started}
    child.requires_grad_(False)
    return row | {"before": json.loads(before.read_text(encoding="utf-8")), "after": judged(judge, child)}


def page(rows: list[dict[str, Any]], parent: str, args: argparse.Namespace) -> Iterator[str]:
    """The table in Markdown."""
    yield f"# After global distillation, on {parent}\n"
    yield (
        "Written by `benchmarks/after_distillation.py`. Children of "
        f"{args.share:.1%} of the parameters in the layers learn from the parent on the same rows of the run's text, "
        "in the same order, with the recipe's default settings in bfloat16. KL (nats a token) on rows of other "
        "documents of the same sources (inside) and on the starts of documents of other sources (outside); ± is one "
        "standard error over rows, and the difference to layersmith's is paired by row. CPU seconds are those of "
        "the training on one thread of a shared machine.\n"
    )
    heads = ["method", "share", "tokens"]
    heads += [f"KL {when}, {text}" for text in TEXTS for when in ("before", "after")]
    heads += [f"to layersmith, {text}" for text in TEXTS]
    heads += ["CPU s", "commit"]
    yield f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
    ours = next((row for row in rows if row["method"] == OURS), None)
    for row in sorted(rows, key=lambda row: mean(row["after"]["text"]["inside"]["kl"])):
        cells = [row["method"], f"{row['parameters']:.3f}", f"{row['tokens']:,}"]
        for text in TEXTS:
            for when in ("before", "after"):
                kl = row[when]["text"][text]["kl"]
                cells.append(f"{mean(kl):.3f} ± {difference(kl, [0.0] * len(kl))[1]:.3f}")
        for text in TEXTS:
            if ours is None or row is ours:
                cells.append("")
                continue
            gap, error = difference(row["after"]["text"][text]["kl"], ours["after"]["text"][text]["kl"])
            cells.append(f"{gap:+.3f} ± {error:.3f}")
        cells += [f"{row['seconds']:.0f}", row["commit"]]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--outside", type=Path, required=True, help="JSONL file of text outside the run's domain")
    parser.add_argument("--tasks-in", type=Path, help="folder with JSONL files of tasks; without it, no tasks")
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between calls")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--methods", nargs="+", default=[OURS, "Minitron"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=16, help="of each text")
    parser.add_argument("--parent", help="the parent's name in the table; default: its folder's")
    args = parser.parse_args()
    unknown = {method.partition(" ")[0] for method in args.methods} - {OURS, *RIVALS}
    if unknown:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    args.recipe = dataclasses.replace(DistillationRecipe(), tokens=args.tokens, precision="bfloat16")
    job, problem, judge = prepared(args)
    rows = rows_of(job, args.recipe)
    methods = Methods(problem, [args.share], args.work, job, 250_000)
    table: list[dict[str, Any]] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for method in args.methods:
        key = (method, args.share, args.tokens)
        if all((row["method"], row["share"], row["tokens"]) != key for row in table):
            table.append(measure(methods, judge, method, args, rows))
            write_rows(args.out, table)
    of_size = [row for row in table if math.isclose(row["share"], args.share) and row["tokens"] == args.tokens]
    text = "\n".join(page(of_size, args.parent or Path(job.path).name, args))
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
