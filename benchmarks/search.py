"""The search: the program's time and proof, the frontier, what refinement gains, and what others would do.

    python -m benchmarks.search --out benchmarks/results/search.md [--run RUN ...] [--budgets 0.8,0.7,0.6,0.5]

The program is timed on made-up costs of 80 layers like those of a 70B Llama (27 or 54 alternatives for each attention
and each FFN; parameters, KV cache, memory, prefill and decode time all limited) against HiGHS's branch and cut on the
same program. A RUN is a folder that ``compress --until scores`` made; refinement and baselines are judged by the KL
divergence of whole children on its evaluation rows, which neither scores nor refinement have seen. One thread, CPU
seconds. Baselines come at few sizes, so their KL at the child's size is read off a line through the two nearest in
log KL.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from layersmith.costs.budget import Workload, parse_budget
from layersmith.run.folder import versions
from layersmith.run.journal import Journal
from layersmith.run.progress import SILENT
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.score import standard_error
from layersmith.search import baselines
from layersmith.search.program import branched
from layersmith.search.refine import Evaluations, refine
from layersmith.search.solve import Candidate, Group, Solver
from layersmith.stages.costs import cost_table
from layersmith.stages.data import DATA
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES
from layersmith.stages.search import search_problem

_HIDDEN, _FFN, _KV, _HEAD, _QUERIES, _VOCAB = 8192, 28672, 8, 128, 64, 128256
_FRACTIONS = {"parameters": 0.6, "kv": 0.5, "memory": 0.58, "prefill": 0.6, "decode": 0.55}


def made_up(layers: int, count: int, seed: int) -> tuple[list[Group], dict[str, int], dict[str, int]]:
    """Groups, costs outside them, and costs of the parent."""
    rng = random.Random(seed)
    attention, ffn = [], []
    for i in range(count):
        kv = (8, 4, 2, 1)[i % 4]
        queries = max(kv, round(_QUERIES * (1 - (i // 4) / (count / 4 + 1)) / kv) * kv)
        if i == count - 1:
            kv = queries = 0
        size = 2 * _HIDDEN * _HEAD * (queries + kv) + (_HIDDEN if queries else 0)
        cache = 2 * kv * _HEAD * 8192 * 16 * 2
        attention.append((size, cache, int(2.1 * size) + 300_000 * queries, int(0.61 * size) + 900_000 * kv))
        width = round(_FFN * (1 - i / (count - 1)) / 256) * 256
        size = 3 * _HIDDEN * width + (_HIDDEN if width else 0)
        ffn.append((size, 0, 2 * size + (7000 if width else 0), int(0.6 * size) + (9000 if width else 0)))
    groups = []
    for layer in range(layers):
        weight = math.exp(rng.gauss(0, 1)) * (1 + 4 * (layer < 2) + 3 * (layer == layers - 1))
        for name, alternatives, scale in (("attention", attention, 0.01), ("ffn", ffn, 0.02)):
            largest, power = weight * scale * math.exp(rng.gauss(0, 0.7)), rng.uniform(1.2, 2.5)
            candidates = []
            for i, (size, cache, prefill, decode) in enumerate(alternatives):
                gone = 1 - size / alternatives[0][0]
                lost_cache = 0.3 * (1 - cache / alternatives[0][1]) if alternatives[0][1] else 0.0
                score = largest * (gone**power * math.exp(rng.gauss(0, 0.15)) + lost_cache) if i else 0.0
                costs = {"parameters": size, "kv": cache, "memory": 2 * size + cache, "prefill": prefill}
                candidates.append(Candidate(f"{layer}.{name}.{i}", score, costs | {"decode": decode}, i == 0))
            groups.append(Group(f"{layer} {name}", tuple(candidates)))
    fixed = dict.fromkeys(_FRACTIONS, 0) | {"parameters": 2 * _VOCAB * _HIDDEN, "memory": 4 * _VOCAB * _HIDDEN}
    parent = {n: fixed[n] + sum(g.candidates[0].costs[n] for g in groups) for n in _FRACTIONS}  # type: ignore[misc]
    return groups, fixed, parent  # type: ignore[return-value]


def programs(seeds: int, other: bool) -> list[dict[str, Any]]:
    """Time of the proven optimum, and of another solver on the same program."""
    rows = []
    for count in (27, 54):
        for seed in range(seeds):
            groups, fixed, parent = made_up(80, count, seed)
            limits = {name: int(parent[name] * share) for name, share in _FRACTIONS.items()}
            started = time.process_time()
            solver = Solver(groups, fixed, parent)
            solution = solver.solve(limits)
            row: dict[str, Any] = {"count": count, "seed": seed, "seconds": time.process_time() - started}
            row["score"] = solution.score
            if other:
                program = solver.program(limits)
                started = time.process_time()
                columns = branched(program, program.score).columns
                row["highs_seconds"] = time.process_time() - started
                row["highs_score"] = math.fsum(program.score[columns]) if columns is not None else None
            rows.append(row)
    return rows


def frontier_seconds(count: int) -> float:
    """CPU seconds of 50 points of the frontier by parameters."""
    groups, fixed, parent = made_up(80, count, 0)
    started = time.process_time()
    solver = Solver(groups, fixed, parent)
    least = int(solver.least("parameters", {}))
    for k in range(50):
        solver.solve({"parameters": least + (parent["parameters"] - least) * k // 49})
    return time.process_time() - started


def children(folder: str, budgets: Sequence[float], most_rows: int) -> dict[str, Any]:
    """KL on unseen rows of the program's solution, the refined one, and the baselines."""
    job = job_of_run(folder)
    recipe, library, scores, tokens = job.recipe, job.read(LIBRARY), job.read(SCORES), job.read(DATA)
    seen, unseen = tokens.scoring, tokens.evaluation
    unseen = unseen[:most_rows]
    models = child_evaluator(library, seen, recipe.scoring, SILENT)
    judge = child_evaluator(library, unseen, recipe.scoring, SILENT)
    costs = cost_table(library.parent, library, Workload())

    def truth(solutions: Sequence[Any]) -> list[list[float]]:
        results = judge.run([c.alternatives for c in solutions], range(len(unseen)))
        return [[row["kl_divergence"] for row in rows] for rows in results]

    rows = []
    problems = {f: search_problem(library, scores, recipe, costs, parse_budget(params=str(f)).limits) for f in budgets}
    for budget, problem in problems.items():
        plain = problem.best()
        before, started = models.passes, time.process_time()
        with Journal(None, "") as journal:
            evaluations = Evaluations(models, "kl_divergence", journal)
            refined = refine(problem, plain, evaluations, recipe.search, recipe.seed)
        seconds, passes = time.process_time() - started, models.passes - before
        of_plain, of_refined = truth([plain, refined.solution])
        difference = [a - b for a, b in zip(of_refined, of_plain, strict=True)]
        rows.append({
            "budget": budget, "parameters": refined.solution.costs["parameters"],
            "plain": _mean(of_plain), "refined": _mean(of_refined),
            "change": _mean(difference) / _mean(of_plain),
            "error": (standard_error(difference) or 0.0) / _mean(of_plain),
            "tried": refined.tried, "passes": passes, "seconds": seconds,
        })  # fmt: skip
    problem = next(iter(problems.values()))
    whole = costs.parent["parameters"]
    sizes = [min(1.0, f + step) * whole for f in budgets for step in (-0.04, 0.0, 0.04)]
    points: dict[str, list[tuple[float, float]]] = {}
    for name, solutions in baselines.all_of(problem, "parameters", sorted(sizes)).items():
        low, high = (min(budgets) - 0.12) * whole, (max(budgets) + 0.12) * whole
        near = [c for c in solutions if low <= c.costs["parameters"] <= high]
        points[name] = [(c.costs["parameters"], _mean(v)) for c, v in zip(near, truth(near), strict=True)]
    for row in rows:
        row["baselines"] = {name: at_size(of_baseline, row["parameters"]) for name, of_baseline in points.items()}
    return {"run": Path(folder).name, "layers": len(library.parent.blocks), "rows": rows, "points": points}


def at_size(points: Sequence[tuple[float, float]], size: float) -> float | None:
    """KL at a size, on a line in log KL through the nearest points below and above."""
    below = max((p for p in points if p[0] <= size), default=None)
    above = min((p for p in points if p[0] >= size), default=None)
    if below is None or above is None:
        return None
    share = (size - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Search",
        "",
        f"One thread, CPU seconds, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        "",
        "80 layers, attention and FFN apart, five limits:",
        "",
        "| alternatives a subblock | seed | proven in, s | HiGHS, s | scores differ by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["programs"]:
        highs = f"{row['highs_seconds']:.2f}" if "highs_seconds" in row else ""
        differ = f"{abs(row['score'] - row['highs_score']):.1e}" if row.get("highs_score") is not None else ""
        lines.append(f"| {row['count']} | {row['seed']} | {row['seconds']:.2f} | {highs} | {differ} |")
    said = ", ".join(f"{seconds:.1f} s with {count} alternatives" for count, seconds in result["frontier"].items())
    lines += ["", f"Frontier of 50 points by parameters: {said}."]
    for run in result["children"]:
        names = list(run["rows"][0]["baselines"])
        lines += [
            "",
            f"## {run['run']}, {run['layers']} layers: KL of whole children on unseen rows",
            "",
            f"| parameters | program | refined | change | passes | {' | '.join(names)} | of the best |",
            "| --- " * (6 + len(names)) + "|",
        ]
        for row in run["rows"]:
            others = [row["baselines"][name] for name in names]
            best = min((value for value in others if value is not None), default=None)
            share = f"{row['refined'] / best:.2f}" if best else ""
            cells = " | ".join("" if value is None else f"{value:.4f}" for value in others)
            lines.append(
                f"| {row['budget']} | {row['plain']:.4f} | {row['refined']:.4f} | {row['change']:+.1%} ± "
                f"{row['error']:.1%} | {row['passes']:.1f} | {cells} | {share} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", default=[], help="folder that `compress --until scores` made")
    parser.add_argument("--budgets", type=lambda s: [float(v) for v in s.split(",")], default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--rows", type=int, default=10**6, help="evaluation rows, at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-highs", action="store_true", help="leave out the other solver, which takes minutes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"versions": versions(), "machine": platform.machine(), "children": []}
    result["programs"] = programs(args.seeds, not args.no_highs)
    result["frontier"] = {count: frontier_seconds(count) for count in (27, 54)}
    for folder in args.run:
        result["children"].append(children(folder, args.budgets, args.rows))
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
