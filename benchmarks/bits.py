"""Shapes and number formats chosen together, compared with formats alone and with pruning before quantizing.

    python -m benchmarks.bits --program --out benchmarks/results/bits.json
    python -m benchmarks.bits --run RUN --shares 0.6,0.5,0.4,0.3,0.25 --rows 24 --out benchmarks/results/bits.json

RUN is a folder that ``compress --formats ... --until formats`` made. At each share of the parent's bytes (weights with
scales, embeddings and head) the methods are

* together: the program's shapes and formats, refined;
* one format: everything in the largest format that fits;
* prune, then quantize: the best shapes within the bytes if everything has one format, refined; the format with the
  lowest sum of scores;
* shapes alone: pruning in the parent's data type, refined.

* quantize, then prune: everything is rounded first, in the same format, and the same units are removed from it; nothing
  is refitted, as that would leave the levels.

All use the same scores and the same GPTQ. Other packages, see :mod:`benchmarks.rivals.quantizers`:

* llama.cpp: its mixtures of types with an importance matrix, the one with the most bits that fits;
* ``--checkpoint NAME FOLDER BITS EMBEDDINGS``: weights that another package rounded and saved in a floating-point type;
  BITS a weight that they take in linear maps, and the format in which embeddings and head are rounded here, by GPTQ
  as for the other methods.

KL is that of whole children on evaluation rows, in nats per token, ± one standard error; differences to the first
method are paired by row. ``--foretold`` compares the foretold scores of pairs with estimates in which the pair ran.
``--caches 0.5,0.3`` makes children for these limits on the KV cache, with formats of it and without. ``--program``
times the program on made-up costs of 80 layers with 54 shapes in 8 formats for each subblock, with five limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import PreTrainedModel

from benchmarks.rivals.quantizers import by_llama_cpp, of_folder
from benchmarks.search import made_up
from layersmith.costs.budget import Budget, Workload
from layersmith.distillation.quantize import layerwise_of
from layersmith.errors import Infeasible
from layersmith.evaluation.compare import compare
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import split_layers
from layersmith.library.formats import InputMoments, in_formats, matrices, quantized
from layersmith.library.stored_weights import Kept
from layersmith.quantization.formats import KV_FORMATS, format_named
from layersmith.run.artifacts import fingerprint
from layersmith.run.journal import Recording
from layersmith.run.progress import SILENT
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.estimated import row_seed
from layersmith.scoring.formats import FormatTask, score_formats
from layersmith.scoring.score import standard_error
from layersmith.scoring.second_order import SeededBatch, estimate
from layersmith.scoring.silencing import Survey
from layersmith.search.problem import SearchProblem, shapes_of
from layersmith.search.solution import Solution
from layersmith.search.solve import Candidate, Group, Solver
from layersmith.stages.costs import cost_table, smaller_caches
from layersmith.stages.data import DATA
from layersmith.stages.formats import head_moment
from layersmith.stages.job import Job, job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import PAIRS, composed
from layersmith.stages.refine import refined_solution, setup_of
from layersmith.stages.reopen import SearchRequest
from layersmith.stages.scores import SCORES
from layersmith.stages.search import search_problem

METHODS = ("together", "one format", "prune, then quantize", "quantize, then prune", "shapes alone")
LLAMA_CPP = "llama.cpp"
# Bits of a weight in made-up formats, and limits of the five costs that bind together.
_BITS = {"": 16, "8": 8.25, "6": 6.5625, "5": 5.5, "4a": 4.5, "4b": 4.25, "4c": 4.125, "3": 3.25}
_LIMITS = {"parameters": 0.63, "kv": 0.37, "memory": 0.21, "prefill": 0.615, "decode": 0.18}


def with_formats(groups: list[Group], seed: int) -> list[Group]:
    """Every candidate in every made-up format; rounding loses 4 times less with every bit."""
    rng, result = random.Random(seed), []
    for group in groups:
        noise, candidates = 64 * max(c.score for c in group.candidates) * math.exp(rng.gauss(0, 0.5)), []
        for c in group.candidates:
            size = int(c.costs["parameters"])
            for name, bits in _BITS.items() if size else [("", 16.0)]:
                score = c.score + (noise * 4.0**-bits * math.exp(rng.gauss(0, 0.1)) if name else 0.0)
                decode = int(c.costs["decode"] * (0.25 + 0.75 * bits / 16))
                costs = {**c.costs, "memory": int(size * bits / 8) + c.costs["kv"], "decode": decode}
                candidates.append(Candidate(f"{c.key} {name}", score, costs, c.is_parent and not name))
        result.append(Group(group.name, tuple(candidates)))
    return result


def program(seeds: int) -> dict[str, Any]:
    """CPU seconds of the proven optimum with five limits, and of a frontier of 50 budgets."""
    rows = []
    for seed in range(seeds):
        groups, fixed, parent = made_up(80, 54, seed)
        groups = with_formats(groups, seed)
        started = time.process_time()
        solution = Solver(groups, fixed, parent).solve({n: int(parent[n] * share) for n, share in _LIMITS.items()})
        seconds = time.process_time() - started
        candidates = sum(len(group.candidates) for group in groups)
        rows.append({"candidates": candidates, "seconds": seconds, "proven": solution.proven_optimal})
    started, solver = time.process_time(), Solver(groups, fixed, parent)
    least = int(solver.least("memory", {}))
    for k in range(50):
        solver.solve({"memory": least + (parent["memory"] - least) * k // 49})
    return {"rows": rows, "frontier_seconds": time.process_time() - started}


# ---------------------------------------------------------------------------------------------- children


def uniform(problem: SearchProblem, name: str) -> Solution:
    """The parent's shapes, all in one format."""
    chosen = [a for a in problem.alternatives if a.shape.is_parent and a.format == name]
    return problem.of(chosen, embeddings=name if name in problem.costs.outside else "")


def refined(job: Job, problem: SearchProblem, solution: Solution) -> Solution:
    """A solution with refined shapes, if any shape differs from the parent's."""
    if all(a.shape.is_parent for a in solution.alternatives):
        return solution
    return refined_solution(problem, solution, setup_of(job), Recording(progress=SILENT)).solution


def sequence(problem: SearchProblem, name: str) -> tuple[Solution, SearchProblem] | None:
    """The best shapes within the limits if everything has one format, and the problem of choosing them."""
    shapes = shapes_of(problem, uniform(problem, name))
    try:
        return shapes.best(), shapes
    except Infeasible:
        return None


def solution_of(method: str, job: Job, problem: SearchProblem) -> Solution | None:
    """The solution of a method; None if it has none."""
    if method == "together":
        return refined(job, problem, problem.best())
    if method == "one format":
        every = [uniform(problem, name) for name in job.formats]
        fitting = [s for s in every if s.costs["weight_bytes"] <= problem.limits["weight_bytes"]]
        return max(fitting, key=lambda solution: solution.costs["weight_bytes"], default=None)
    formats = [""] if method == "shapes alone" else job.formats
    found = {name: best for name in formats if (best := sequence(problem, name)) is not None}
    if not found:
        return None

    def in_format(name: str, solution: Solution) -> Solution:
        pairs = [a.in_format(name) for a in solution.alternatives]
        return problem.of(pairs, embeddings=uniform(problem, name).embeddings)

    name = min(found, key=lambda name: in_format(name, found[name][0]).score)
    best, shapes = found[name]
    return in_format(name, refined(job, shapes, best))


@contextmanager
def child_of(method: str, job: Job, problem: SearchProblem, solution: Solution) -> Iterator[PreTrainedModel]:
    """The child that a method makes of its solution."""
    if method != "quantize, then prune":
        with composed(job, solution, SILENT) as (child, _):
            yield child.to(job.runtime.dtype)
        return
    format = next(a.format for a in solution.alternatives if not a.is_no_op)
    with composed(job, uniform(problem, format), SILENT) as (whole, _):
        library = job.read(LIBRARY).with_parent(dataclasses.replace(job.parent, model=whole.to(job.runtime.dtype)))
        yield library.with_kept(Kept(), Kept()).compose([a.shape for a in solution.alternatives])


def measured(job: Job, child: PreTrainedModel, rows: torch.Tensor) -> dict[str, list[float]]:
    """KL and loss of a model on every row."""
    compared = compare(job.parent.model, child, rows, batch_sequences=4)
    return {"kl_by_row": compared.metrics["kl_divergence"], "loss_by_row": compared.child_loss}


def of_method(
    method: str, job: Job, problem: SearchProblem, rows: torch.Tensor, known: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What a method makes within the problem's limits; None if it has no solution."""
    if (solution := solution_of(method, job, problem)) is None:
        return None
    formats = [a.format for a in solution.alternatives if not a.is_no_op]
    is_pruned = method == "quantize, then prune" and any(not a.shape.is_parent for a in solution.alternatives)
    result = {
        "key": fingerprint([*(a.key for a in solution.alternatives), solution.embeddings, is_pruned]),
        "score": solution.score,
        "bytes": solution.costs["weight_bytes"],
        "parameters": solution.costs["parameters"] / solution.parent_costs["parameters"],
        "formats": _counts([*formats, solution.embeddings]),
    }
    same = next((row for row in known if row.get("key") == result["key"] and row["rows"] == len(rows)), None)
    if same is not None:  # the same child as of another method or share
        return result | {name: same[name] for name in ("kl_by_row", "loss_by_row")}
    with child_of(method, job, problem, solution) as child:
        return result | measured(job, child, rows)


def children(run: Path, share: float, args: argparse.Namespace, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Children of methods at a share of the parent's bytes; ``known`` are results of earlier calls."""
    job, problem = SearchRequest(run, Budget.parse({"weights": str(share)}), formats=args.formats).open(SILENT)
    tokens, parent_bytes = job.read(DATA), problem.costs.parent["weight_bytes"]
    job.put(DATA, dataclasses.replace(tokens, calibration=tokens.calibration[: args.calibration]))
    job.put(PAIRS, Kept())  # the run was stopped before, and no method trains
    if args.passes is not None:
        search = dataclasses.replace(job.recipe.search, refine_passes=args.passes)
        job.recipe = dataclasses.replace(job.recipe, search=search)
    rows, result = tokens.evaluation[:: max(1, len(tokens.evaluation) // args.rows)][: args.rows], []
    first = next((r for r in known if (r["share"], r["method"], r["rows"]) == (share, METHODS[0], len(rows))), None)
    for name in [args.checkpoint[0]] if args.checkpoint else args.only or METHODS:
        made: dict[str, Any] | None
        if args.checkpoint or name == LLAMA_CPP:
            if args.checkpoint:
                rounded = of_folder(*args.checkpoint[1:], head_moment(job))
            else:
                rounded = by_llama_cpp(job, share * parent_bytes)
            made = None if rounded is None else rounded.record() | measured(job, rounded.model, rows)
        else:
            made = of_method(name, job, problem, rows, [*known, *result])
        if made is None:
            continue
        first, kl = first or made, made["kl_by_row"]
        difference = [a - b for a, b in zip(kl, first["kl_by_row"], strict=True)]
        row = {"share": share, "method": name, "rows": len(kl), "parent_bytes": parent_bytes}
        row |= made | {"kl": math.fsum(kl) / len(kl), "error": standard_error(kl)}
        row |= {"perplexity": math.exp(math.fsum(made["loss_by_row"]) / len(kl))}
        row |= {"more": math.fsum(difference) / len(kl), "more_error": standard_error(difference)}
        result.append(row | {"seconds": time.process_time()})
        print(json.dumps({name: row[name] for name in ("share", "method", "formats", "kl", "more")}), flush=True)
    return result


def _counts(names: list[str]) -> dict[str, int]:
    return {name or "parent's": names.count(name) for name in sorted(set(names))}


# ---------------------------------------------------------------------------------------------- the KV cache


def caches(run: Path, num_rows: int, shares: list[float]) -> list[dict[str, Any]]:
    """Children for limits on the KV cache, with all formats of it and with none; shapes are not refined."""
    job = job_of_run(run)
    library, tokens, names = job.read(LIBRARY), job.read(DATA), list(KV_FORMATS)
    costs = cost_table(job.parent, library, Workload(), [], names)
    layerwise, settings = layerwise_of(job.parent, library), job.recipe.scoring
    kv_alternatives = smaller_caches(library.alternatives, costs, names)
    with tempfile.TemporaryDirectory() as folder:
        rows = tokens.calibration[:num_rows], tokens.scoring[:num_rows]
        task = FormatTask(library, layerwise, [], kv_alternatives, *rows, settings, 0, Path(folder), SILENT)
        scores, _ = score_formats(task)
    judge, result = child_evaluator(library, tokens.evaluation[:num_rows], settings, SILENT), []
    for share in shares:
        limits = Budget.parse({"kv_cache": str(share)}).limits
        for of_formats in (scores, {}):
            problem = search_problem(library, job.read(SCORES), job.recipe, costs, limits, of_formats)
            solution = problem.best()
            (rows_of_child,) = judge.run([solution.alternatives], range(len(judge.tokens)))
            kl = [row["kl_divergence"] for row in rows_of_child]
            formats = _counts([a.kv_format for a in solution.alternatives if a.subblock == "attention"])
            changed = sum(not a.shape.is_parent for a in solution.alternatives)
            row = {"share": share, "formats": formats, "changed": changed, "kl": math.fsum(kl) / len(kl)}
            result.append(row | {"error": standard_error(kl), "score": solution.score, "rows": len(kl)})
    return result


# ---------------------------------------------------------------------------------------------- foretold scores


@torch.no_grad()
def foretold_errors(run: Path, layers: int, num_rows: int) -> list[dict[str, Any]]:
    """Estimates of pairs that ran, against the sums of the estimates of their parts, in some of the layers."""
    job, _ = SearchRequest(run, Budget.parse("1.0")).open(SILENT)
    library, tokens, depth = job.read(LIBRARY), job.read(DATA), len(job.parent.blocks)
    chosen = {round(k * (depth - 1) / max(1, layers - 1)) for k in range(layers)}
    shapes = [a for a in library.alternatives if a.layer in chosen and not a.is_no_op]
    pairs, layerwise = in_formats(shapes, job.formats), split_layers(library.parent, library)
    batch = layerwise.start(tokens.calibration[: 2 * num_rows])
    inputs, kept = layerwise.hidden_states(batch), {}
    for shape in shapes:
        layer, i = library.layer(shape), shape.layer
        names = matrices(library.parent.model, library.parent.descriptor, layer, i, depth, library.axes[i])[
            shape.subblock
        ]
        moments = InputMoments(layer, names)
        with moments.watching():
            layerwise.run(batch, i, inputs[i], layer)
        for a in in_formats([shape], job.formats):
            rounded = quantized(layer, dict.fromkeys(names, format_named(a.format)), moments)
            kept[a.identity] = rounded.tensors()
    records = tuple({"identity": a.identity, "layer": a.layer, "weights": a.identity} for a in pairs)
    weights = {a.identity: {**library.kept.of(a.shape.identity), **kept[a.identity]} for a in pairs}
    whole = library.with_kept(Kept((*library.kept.records, *records), weights, library.kept.folder))
    with torch.enable_grad():
        rows = list(range(num_rows))
        seeded = SeededBatch(tokens.scoring[rows], [[row_seed(0, 0, row) for row in rows]])
        every = [a for a in [*shapes, *pairs] if not a.is_parent]
        (values,) = estimate(split_layers(library.parent, whole), every, Survey(), [seeded], States())
    score = {a.identity: float(values[a.identity].mean()) for a in every}
    result = []
    for a in pairs:
        if not a.shape.is_parent:
            of_parent = dataclasses.replace(a.shape, kind="parent", method="", size=0, query_heads=0)
            parts = score[a.shape.identity], score[of_parent.in_format(a.format).identity]
            result.append({"of": a.key, "format": a.format, "kind": a.kind, "pair": score[a.identity], "parts": parts})
    return result


def _quantiles(errors: list[float]) -> str:
    low, middle, high = torch.tensor(errors).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return f"{low:+.1%} to {high:+.1%}, median {middle:+.1%}"


# ---------------------------------------------------------------------------------------------- the table


def table(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Bits", ""]
    if "program" in data:
        rows = data["program"]["rows"]
        seconds = ", ".join(f"{row['seconds']:.2f}" for row in rows)
        frontier = f"{data['program']['frontier_seconds']:.1f}"
        lines += [
            f"80 layers, 54 shapes in 8 formats ({rows[0]['candidates']:,} candidates), five limits: proven optimal in "
            f"{seconds} CPU seconds. Frontier of 50 memory budgets: {frontier} CPU seconds.",
            "",
        ]
    for name, of_run in data.get("runs", {}).items():
        lines += [
            f"## {name}",
            "",
            "| bytes | method | used | parameters | formats | KL | more than together | perplexity |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in of_run.get("children", []):
            formats = ", ".join(f"{count} {format}" for format, count in row["formats"].items())
            used, error = row["bytes"] / row["parent_bytes"], row["error"] or 0.0
            more = f"{row['more']:+.5f} ± {row['more_error']:.5f}" if row["method"] != "together" else ""
            lines.append(
                f"| {row['share']:.0%} | {row['method']} | {used:.1%} | {row['parameters']:.0%} | {formats} | "
                f"{row['kl']:.5f} ± {error:.5f} | {more} | {row['perplexity']:.2f} |"
            )
        if pairs := of_run.get("foretold"):
            large = [row for row in pairs if sum(row["parts"]) > 0]
            lines += [
                "",
                f"Foretold scores of {len(pairs)} pairs, relative to estimates in which the pair ran (10% to 90%):",
                "",
            ]
            for format in dict.fromkeys(row["format"] for row in large):
                errors = [sum(row["parts"]) / row["pair"] - 1 for row in large if row["format"] == format]
                lines.append(f"- {format}: {_quantiles(errors)}")
        if rows := of_run.get("caches"):
            lines += ["", "| KV cache | formats of attentions | other shapes | KL |", "| --- | --- | --- | --- |"]
            for row in rows:
                formats = ", ".join(f"{count} {format}" for format, count in row["formats"].items())
                kl = f"{row['kl']:.4f} ± {row['error']:.4f}"
                lines.append(f"| {row['share']:.0%} | {formats} | {row['changed']} | {kl} |")
        lines.append("")
    return "\n".join(lines)


def save(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(data), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="store_true")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--shares", type=lambda text: [float(x) for x in text.split(",")], default=[])
    parser.add_argument("--only", nargs="+", choices=(*METHODS, LLAMA_CPP), help="these methods only")
    parser.add_argument("--checkpoint", nargs=4, metavar=("NAME", "FOLDER", "BITS", "EMBEDDINGS"))
    parser.add_argument("--formats", nargs="+", help="some of the run's; default: all")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--calibration", type=int, help="calibration rows of a child's GPTQ; default: all")
    parser.add_argument("--passes", type=int, help="forward passes of refinement; default: the recipe's")
    parser.add_argument("--foretold", type=int, default=0, metavar="LAYERS")
    parser.add_argument("--caches", type=lambda text: [float(x) for x in text.split(",")], default=[])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table is written next to it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if args.program:
        data["program"] = program(3)
    if args.run is not None:
        of_run = data.setdefault("runs", {}).setdefault(args.run.name, {})
        if args.foretold:
            of_run["foretold"] = foretold_errors(args.run, args.foretold, 4)
        if args.caches:
            of_run["caches"] = caches(args.run, args.rows, args.caches)
        for share in args.shares:
            made = children(args.run, share, args, of_run.get("children", []))
            names = {row["method"] for row in made}
            others = [r for r in of_run.get("children", []) if r["share"] != share or r["method"] not in names]
            of_run["children"] = sorted([*others, *made], key=lambda row: -row["share"])
            save(args.out, data)
    save(args.out, data)


if __name__ == "__main__":
    main()
