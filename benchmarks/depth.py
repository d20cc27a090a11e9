"""Depth alone: children that only lose attentions and FFNs, by three methods, at equal sizes.

    layersmith compress PARENT RUN --data TEXT --params 0.9 --until statistics
    python -m benchmarks.depth RUN [RUN ...] --tokens 60000 --out benchmarks/results/depth.json

Every child has the parameters of a number of whole layers less, within 0.05%, and unchanged weights otherwise. Block
influence (ShortGPT) removes whole layers. EvoPress removes attentions and FFNs by an evolutionary search on children.
layersmith scores each removal alone, solves the integer program, and refines with the rest of the tokens that EvoPress
has, by the same code as ``layersmith compress``. Both searches see the same rows. Work is counted in tokens of forward
passes of the parent; a backward pass counts as two. Children are judged on the run's evaluation rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import commit, write_rows
from benchmarks.rivals.activations import observe
from benchmarks.rivals.depth import Evolution, block_influence, evopress
from benchmarks.rivals.judge import Judge, Tasks, difference, mean, over_seeds
from benchmarks.rivals.problem import Choice, Problem, Work
from layersmith.costs.budget import Limit, Limits
from layersmith.costs.table import CostTable
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative
from layersmith.library.stored_weights import Kept
from layersmith.recipe import ScoringRecipe, SearchRecipe
from layersmith.run.journal import Journal
from layersmith.run.progress import SILENT
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.score import standard_error
from layersmith.search.problem import SearchProblem
from layersmith.search.refine import Evaluations, refine
from layersmith.stages.data import DATA
from layersmith.stages.job import job_of_run
from layersmith.stages.statistics import STATISTICS

# Share of the work that goes into the scores of single removals, and passes of refinement over its rows, whose number
# follows from the rest.
_FOR_SCORES, _PASSES = 0.3, SearchRecipe.refine_passes
# Sizes that differ by at most this share of the layers' parameters are equal: an FFN is not exactly two attentions.
_EQUAL = 0.0005


def sweeps(problem: Problem, parameters: float, tokens: float) -> Choice:
    """The best child by the program on scores of single removals, refined with whole children."""
    layers = range(len(problem.layers))
    removals = [Alternative(i, subblock, "no_op") for i in layers for subblock in SUBBLOCKS]
    parents = [Alternative(i, subblock, "parent") for i in layers for subblock in SUBBLOCKS]
    library = dataclasses.replace(problem.library, alternatives=[*parents, *removals], _skeletons={})
    length = problem.all_rows.shape[1]
    seen = problem.all_rows[: max(4, int((1 - _FOR_SCORES) * tokens / _PASSES / length))]
    models = child_evaluator(library, seen, ScoringRecipe(), SILENT)
    each = [[removal] for removal in removals]
    of_row = (models.cost(each, len(seen)) + 1) * length
    results = models.run(each, range(min(len(seen), max(1, int(_FOR_SCORES * tokens / of_row)))))
    losses = {
        a.key: math.fsum(r["kl_divergence"] for r in by_row) / len(by_row)
        for (a,), by_row in zip(each, results, strict=True)
    }

    sizes = {"attention": problem.sizes.attention, "ffn": problem.sizes.ffn}
    by_key = {a.key: {"parameters": 0 if a.is_no_op else sizes[a.subblock][a.layer]} for a in library.alternatives}
    within_layers = sum(sum(of) for of in sizes.values())
    costs = CostTable(by_key, {"parameters": problem.sizes.total - within_layers}, {"parameters": problem.sizes.total})
    limits = Limits((Limit("parameters", amount=int(parameters + _EQUAL * problem.sizes.total)),))
    search = SearchProblem(library.alternatives, losses | dict.fromkeys((a.key for a in parents), 0.0), costs, limits)
    with Journal(None, "") as journal:
        evaluations = Evaluations(models, "kl_divergence", journal)
        recipe = SearchRecipe(refine_passes=tokens / seen.numel() - models.passes)
        found = refine(search, search.best(), evaluations, recipe, problem.seed).solution
    problem.work.tokens += models.passes * seen.numel()
    gone = {(a.layer, a.subblock) for a in found.alternatives if a.is_no_op}
    shapes = [
        tuple(0 if (i, s) in gone else n for s, n in zip(SUBBLOCKS, whole, strict=True))
        for i, whole in enumerate(problem.whole)
    ]
    return Choice.of(problem, {}, shapes)


def rows_of(
    folder: Path, removed: Sequence[float], tokens: float, seeds: int, work: Path, most: int
) -> list[dict[str, Any]]:
    """All methods on one parent, for several shares of layers removed."""
    job = job_of_run(folder, (DATA, STATISTICS))
    data = job.read(DATA)
    library = dataclasses.replace(job.read(STATISTICS), kept=Kept(), pairs=Kept())
    judge = Judge(job.parent, job.tokenizer, {"unseen": data.evaluation[:most]}, Tasks([], 1), work)
    whole = Problem(library, data.calibration, data.scoring)
    seen = observe(whole)
    rows = []
    for share in removed:
        count = max(1, round(share * len(whole.layers)))
        parameters = whole.sizes.total - sum(sorted(whole.sizes.of_layer)[:count])
        methods: dict[str, Callable[[Problem], Choice]] = {
            "block influence": partial(block_influence, seen=seen, parameters=parameters),
            "EvoPress": partial(evopress, parameters=parameters, how=Evolution(tokens=tokens)),
            "layersmith": partial(sweeps, parameters=parameters, tokens=tokens),
        }
        for name, method in methods.items():
            for seed in range(1 if name == "block influence" else seeds):
                problem = dataclasses.replace(whole, work=Work(), seed=seed)
                started = time.process_time()
                choice = method(problem)
                seconds, kl = time.process_time() - started, judge.on_text(choice.child())["unseen"]["kl"]
                rows.append({
                    "parent": folder.name, "layers": len(whole.layers), "removed": count, "method": name, "seed": seed,
                    "parameters": choice.parameters / whole.sizes.total, "seconds": seconds,
                    "tokens": problem.work.tokens or whole.work.tokens,  # block influence: the pass that all share
                    "kl": kl, "commit": commit(),
                })  # fmt: skip
                print({**rows[-1], "kl": mean(kl)}, flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; KL is the mean over seeds, and the difference is paired by rows of text."""
    lines = [
        "# Depth alone", "",
        "KL of children that only lose attentions and FFNs, on rows that no method saw, in nats per token; mean over "
        "seeds, ± one standard error over rows. Work is in tokens of forward passes of the parent.", "",
        "| parent | layers removed | method | parameters in layers | work, tokens | KL | above layersmith's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    places = list(dict.fromkeys((r["parent"], r["layers"], r["removed"]) for r in rows))
    for parent, layers, removed in places:
        here = [r for r in rows if (r["parent"], r["removed"]) == (parent, removed)]
        kl = {
            name: over_seeds([r["kl"] for r in here if r["method"] == name])
            for name in dict.fromkeys(r["method"] for r in here)
        }
        for name, values in kl.items():
            of_method = [r for r in here if r["method"] == name]
            less, error = difference(values, kl["layersmith"])
            said = "" if name == "layersmith" else f"{less:+.4f} ± {error:.4f}"
            size, work = of_method[0]["parameters"], mean([r["tokens"] for r in of_method])
            loss = f"{mean(values):.4f} ± {standard_error(values):.4f}"
            cells = (parent, f"{removed} of {layers}", name, f"{size:.3f}", f"{work:,.0f}", loss, said)
            lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    return "\n".join([*lines, "", f"Commits {commits}; one thread."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that `compress --until statistics` made")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.25, 0.5], help="shares of the layers")
    parser.add_argument("--tokens", type=float, default=60_000, help="work of each search")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="evaluation rows, at most")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between calls")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows of other parents in it are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    for folder in args.runs:
        rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
        rows = [row for row in rows if row["parent"] != folder.name]
        rows += rows_of(folder, args.removed, args.tokens, args.seeds, args.work, args.rows)
        write_rows(args.out, rows)
        args.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
