"""Distillation: what each step gives at budgets, beside models that were made smaller without a search.

    python -m benchmarks.distillation PARENT --text FILE [--budgets 0.8 0.7 0.5] [--seeds 3] --out FILE.md

For every seed the documents are dealt anew, so that calibration, scoring, training and evaluation rows are others. Rows
of the table are children of the same budget:

* ``uniform``: every layer narrowed alike, the best of those that fit by the sum of scores as pruned;
* ``dropped layers``: whole layers removed, those first whose two no-ops score least;
* ``(a) as pruned``: the search over alternatives as they were pruned;
* ``(b) reconstructed``: over alternatives whose last projections were refitted, scored so;
* ``(c) locally distilled``: over alternatives that were trained, scored so; then each layer's chosen subblocks trained
together.

The second table is the library itself: replace-one-block KL by exact scores on rows that nothing was trained on, in a
few layers, by kind of alternative. One thread, float32. ``benchmarks.recovery`` goes on with global distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.scoring import matrix_seconds_per_flop
from layersmith.costs.budget import Workload, parse_budget
from layersmith.costs.table import CostTable, count_costs
from layersmith.data.splits import TokenSplits, load_tokenizer, prepare
from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.evaluation.compare import compare
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import DataRecipe, LibraryRecipe, LocalDistillationRecipe, ScoringRecipe
from layersmith.run.folder import versions
from layersmith.run.progress import Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.score import losses
from layersmith.search.problem import SearchProblem
from layersmith.stages.costs import shape_of

METRICS = {"loss": "validation loss", "kl_divergence": "KL", "top_1_agreement": "top-1 agreement"}


class _Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclasses.dataclass
class Child:
    """A row of the table at a budget, before anything else is done to it.

    Attributes:
        row: of the table.
        library: that it is composed of.
        alternatives: that it is made of.
    """

    row: str
    library: Library
    alternatives: Sequence[Alternative]


def splits_of(text: Path, parent: Parent, args: argparse.Namespace, seed: int) -> TokenSplits:
    """Rows of every split; documents are dealt by the seed."""
    return prepare(
        text,
        load_tokenizer(parent.path),
        DataRecipe(
            sequence_length=args.length,
            calibration_sequences=64,
            scoring_sequences=args.scoring_rows,
            evaluation_sequences=args.evaluation_rows,
            training_sequences=args.tokens // args.length * 25 // 24 + 1,
        ),
        seed,
    )


def cost_table(parent: Parent, library: Library) -> CostTable:
    return count_costs(shape_of(parent, library), library.alternatives, Workload(1, 1))


def kl_of(library: Library, rows: torch.Tensor, mode: str = "auto") -> dict[str, float]:
    scores = score_library(library, rows, ScoringRecipe(mode=mode))  # type: ignore[arg-type]
    return losses(scores, "kl_divergence")


def uniform(library: Library, costs: CostTable, scores: dict[str, float], budget: float) -> list[Alternative]:
    """One attention and one FFN for all layers, the best by scores that fits."""
    depth = len(library.parent.blocks)
    by_name: dict[tuple[str, str], list[Alternative]] = {}
    for a in library.alternatives:
        if a.kind not in ("no_op", "linear"):
            by_name.setdefault((a.subblock, a.name), []).append(a)
    solutions = []
    for (subblock, _), attentions in by_name.items():
        for (other, _), ffns in by_name.items():
            if (subblock, other) == ("attention", "ffn") and len(attentions) == len(ffns) == depth:
                chosen = attentions + ffns
                parameters = costs.fixed["parameters"] + sum(costs.by_key[a.key]["parameters"] for a in chosen)
                if parameters <= budget * costs.parent["parameters"]:
                    solutions.append((sum(scores[a.key] for a in chosen), chosen))
    return min(solutions, key=lambda pair: pair[0])[1] if solutions else []


def dropped(library: Library, costs: CostTable, scores: dict[str, float], budget: float) -> list[Alternative]:
    """Both subblocks of as many layers removed as are needed."""
    by_layer: dict[int, list[Alternative]] = {}
    for a in library.alternatives:
        if a.kind == "no_op":
            by_layer.setdefault(a.layer, []).append(a)
    left, chosen = costs.parent["parameters"], []
    for i in sorted(by_layer, key=lambda i: sum(scores[a.key] for a in by_layer[i])):
        if left <= budget * costs.parent["parameters"]:
            break
        chosen += by_layer[i]
        parents = [Alternative(i, a.subblock, "parent") for a in by_layer[i]]
        left -= sum(costs.by_key[a.key]["parameters"] for a in parents)
        left += sum(costs.by_key[a.key]["parameters"] for a in by_layer[i])
    return chosen


@dataclasses.dataclass
class Libraries:
    """The library of a parent as pruned, after reconstruction and after local distillation, each with its scores."""

    pruned: Library
    reconstructed: Library
    taught: Library
    scores: dict[str, dict[str, float]]
    notes: list[str]
    cpu_seconds: dict[str, float]


def libraries(
    parent: Parent, tokens: TokenSplits, args: argparse.Namespace, seed: int, recipe: LibraryRecipe | None = None
) -> Libraries:
    """Make and score all three."""
    recipe, notes, seconds = recipe or LibraryRecipe(), _Notes(), {}
    started = time.process_time()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = time.process_time() - started
        started = time.process_time()

    pruned = build_library(parent, recipe, survey(parent, recipe), Calibration(tokens.calibration, 8))
    lap("pruning")
    only = LocalDistillationRecipe(tokens=0, batch_tokens=args.batch_tokens)
    reconstructed = distill_locally(
        pruned, tokens.calibration, tokens.training[:0], TrainingSetup(only, progress=notes)
    )
    lap("reconstruction")
    both = LocalDistillationRecipe(tokens=args.tokens, batch_tokens=args.batch_tokens)
    taught = distill_locally(
        pruned, tokens.calibration, tokens.training, TrainingSetup(both, seed=seed, progress=notes)
    )
    lap("reconstruction and local distillation")
    scores = {
        name: kl_of(library, tokens.scoring)
        for name, library in (("pruned", pruned), ("reconstructed", reconstructed), ("taught", taught))
    }
    lap("scoring, three times")
    return Libraries(pruned, reconstructed, taught, scores, notes.notes, seconds)


def children(
    made: Libraries, costs: CostTable, tokens: TokenSplits, args: argparse.Namespace, budget: float, seed: int
) -> Iterator[Child]:
    """The rows of the table at a budget."""
    for row, narrow in (("uniform", uniform), ("dropped layers", dropped)):
        if alternatives := narrow(made.pruned, costs, made.scores["pruned"], budget):
            yield Child(row, made.pruned, alternatives)
    for row, library, scores in (
        ("(a) as pruned", made.pruned, made.scores["pruned"]),
        ("(b) reconstructed", made.reconstructed, made.scores["reconstructed"]),
        ("(c) locally distilled", made.taught, made.scores["taught"]),
    ):
        chosen = (
            SearchProblem(library.alternatives, scores, costs, parse_budget(params=str(budget)).limits)
            .best()
            .alternatives
        )
        if row.startswith("(c)"):
            recipe = LocalDistillationRecipe(coupled_tokens=args.tokens, batch_tokens=args.batch_tokens)
            library = distill_jointly(
                library, chosen, tokens.calibration, tokens.training, TrainingSetup(recipe, seed=seed)
            )
        yield Child(row, library, chosen)


def evaluated(child: Child, rows: torch.Tensor) -> dict[str, Any]:
    """Metrics of a child on evaluation rows, and its parameters."""
    model = child.library.compose(list(child.alternatives))
    table = compare(child.library.parent.model, model, rows, batch_sequences=8).table()
    by_metric = {row["metric"]: row for row in table}
    values = {name: by_metric[name]["child"] for name in METRICS}
    errors = {f"{name} error": by_metric[name]["child_standard_error"] for name in METRICS}
    parameters = sum(p.numel() for p in model.parameters())
    return values | errors | {"parent loss": by_metric["loss"]["parent"], "parameters": parameters}


def of_the_library(made: Libraries, rows: torch.Tensor, every: int) -> list[dict[str, Any]]:
    """Exact replace-one-block KL of alternatives in every so many layers."""
    table: dict[str, dict[str, Any]] = {}
    for name in ("pruned", "reconstructed", "taught"):
        library: Library = getattr(made, name)
        alternatives = [
            a
            for a in library.alternatives
            if a.kind == "parent" or (a.kind != "no_op" and a.layer % every == 1 % every)
        ]
        few = dataclasses.replace(library, alternatives=alternatives)
        kl = kl_of(few, rows, "exact")
        for a in alternatives:
            if a.kind != "parent":
                kind = f"{a.subblock} {a.kind}" + (f" ({a.method})" if a.kind == "kv_heads" else "")
                table.setdefault(a.key, {"of": a.key, "kind": kind})[name] = kl[a.key]
    return list(table.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=262_144, help="of local distillation, for each alternative")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scoring-rows", type=int, default=24)
    parser.add_argument("--evaluation-rows", type=int, default=96)
    parser.add_argument("--every", type=int, default=3, help="layers between those whose library is scored exactly")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)

    parent = load_parent(args.parent, Runtime(torch.device("cpu"), torch.float32))
    result: dict[str, Any] = {
        "versions": versions(), "machine": platform.processor() or platform.machine(), "threads": 1,
        "parent": Path(args.parent).name, "parameters": sum(p.numel() for p in parent.model.parameters()),
        "layers": len(parent.blocks), "tokens": args.tokens, "seeds": args.seeds,
        "rows": [], "library": [], "notes": [], "cpu_seconds": [],
    }  # fmt: skip
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        tokens = splits_of(args.text, parent, args, seed)
        made = libraries(parent, tokens, args, seed)
        result["notes"].append(made.notes)
        result["cpu_seconds"].append(made.cpu_seconds)
        costs = cost_table(parent, made.pruned)
        for budget in args.budgets:
            for child in children(made, costs, tokens, args, budget, seed):
                row = {"budget": budget, "row": child.row, "seed": seed} | evaluated(child, tokens.evaluation)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
        if seed == 0:
            result["gflops"] = 1e-9 / matrix_seconds_per_flop(made.pruned, args.batch_tokens)
            result["library"] = of_the_library(made, tokens.scoring[:8], args.every)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.write_text(table(result))
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    first, rows = result["rows"][0], result["rows"]
    lines = [
        f"# Distilling {result['parent']}: {result['parameters'] / 1e6:.1f}M parameters, {result['layers']} layers, "
        f"{result['tokens']:,} training tokens",
        "",
        f"One thread, float32, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. The parent's validation "
        f"loss with the first seed is {first['parent loss']:.4f}. Means over {len({r['seed'] for r in rows})} seeds; "
        "± is the standard deviation over seeds of the difference to (a), or for one seed the standard error of rows.",
        "",
        f"| budget | | parameters | {' | '.join(METRICS.values())} |",
        "| --- | --- | --- |" + " --- |" * len(METRICS),
    ]
    for budget, name in dict.fromkeys((r["budget"], r["row"]) for r in rows):
        records = [r for r in rows if (r["budget"], r["row"]) == (budget, name)]
        base = {r["seed"]: r for r in rows if r["budget"] == budget and r["row"].startswith("(a)")}
        cells = []
        for metric in METRICS:
            if len(records) < 2:
                noise = records[0][f"{metric} error"]
            elif name.startswith("(a)"):
                noise = stdev(r[metric] for r in records)
            else:
                noise = stdev(r[metric] - base[r["seed"]][metric] for r in records)
            cells.append(f"{mean(r[metric] for r in records):.4f} ± {noise:.4f}")
        parameters = mean(r["parameters"] for r in records)
        lines.append(f"| {budget} | {name} | {parameters / 1e6:.2f}M | {' | '.join(cells)} |")
    if library := result["library"]:
        lines += [
            "", "## The library: median replace-one-block KL", "",
            "| kind | alternatives | pruned | reconstructed | locally distilled | taught / pruned |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for kind in ["all", *sorted({f["kind"] for f in library})]:
            records = [f for f in library if kind in ("all", f["kind"])]
            middle = {name: median(f[name] for f in records) for name in ("pruned", "reconstructed", "taught")}
            values = " | ".join(f"{v:.5f}" for v in middle.values())
            lines.append(f"| {kind} | {len(records)} | {values} | {middle['taught'] / middle['pruned']:.2f} |")
    lines += ["", f"The parent's matrices run at {result.get('gflops', float('nan')):.0f} GFLOP/s.", ""]
    lines += [f"* {note}" for note in result["notes"][0]]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["cpu_seconds"][0].items())
    lines += [f"* CPU seconds of the first seed: {seconds}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
