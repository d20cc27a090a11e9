"""Scoring: its time compared with puzzletron's and with the arithmetic, and the accuracy of the estimates.

    python -m benchmarks.scoring PARENT --text FILE [--peer-python PYTHON --peer-driver FILE] --out FILE.md

One thread, float32, in one run: the same checkpoint, the same text, as many tokens, the same alternatives for both.
Puzzletron runs in a separate environment through a driver that times its stages (``puzzletron_on_cpu.py``); without
both, its rows are left out. It scores pairs of an attention and an FFN; its list is cut down to those in which one of
the two is the parent's, so that there are as many candidates as alternatives here. CPU seconds of its garbage
collection are stated apart. Random parents can be timed too, but say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from scipy.stats import spearmanr

from layersmith.costs.budget import Workload, parse_budget
from layersmith.costs.table import CostTable
from layersmith.data.splits import load_tokenizer
from layersmith.evaluation.compare import compare
from layersmith.execution.parent import load_parent
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.folder import versions
from layersmith.run.journal import Recording
from layersmith.run.progress import Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.regret import Axis
from layersmith.scoring.score import Score, losses
from layersmith.search.frontier import axes_of
from layersmith.search.problem import SearchProblem
from layersmith.stages.costs import cost_table

_BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)


class _Notes(Progress, logging.Handler):
    """Keeps notes, and what scoring logs of its arithmetic."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())


def timed(
    library: Library, rows: torch.Tensor, recipe: ScoringRecipe, axes: Sequence[Axis] = ()
) -> tuple[list[Score], float, str]:
    """Scores, CPU seconds, and what was said of the arithmetic."""
    notes, started = _Notes(), time.process_time()
    logger = logging.getLogger(score_library.__module__)
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    scores = score_library(library, rows, recipe, axes=axes, recording=Recording(progress=notes))
    logger.removeHandler(notes)
    return scores, time.process_time() - started, "; ".join(notes.notes)


def forward_seconds(library: Library, rows: torch.Tensor, batch: int) -> float:
    """CPU seconds of the parent's forward pass over all rows."""
    with torch.inference_mode():
        library.parent.model(input_ids=rows[:1])
        started = time.process_time()
        for start in range(0, len(rows), batch):
            library.parent.model(input_ids=rows[start : start + batch], use_cache=False)
    return time.process_time() - started


def matrix_seconds_per_flop(library: Library, tokens: int) -> float:
    """CPU seconds per operation of the parent's matrices on this number of tokens; the median of five runs."""
    seconds = flops = 0.0
    matrices = [m for m in library.parent.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    output: Any = library.parent.model.get_output_embeddings()
    for module, count in [*((m, len(library.parent.layers)) for m in matrices), (output, 1)]:
        x = torch.randn(tokens, module.in_features)
        times = []
        with torch.inference_mode():
            for _ in range(6):
                started = time.process_time()
                module(x)
                times.append(time.process_time() - started)
        seconds += count * sorted(times[1:])[2]
        flops += count * 2.0 * tokens * module.in_features * module.out_features
    return seconds / flops


def fidelity(exact: Sequence[Score], scores: Sequence[Score]) -> dict[str, Any]:
    """Spearman's rank correlation with the exact KL, in all and by kind, and relative errors."""
    truth = {s.alternative.key: s.mean("kl_divergence") for s in exact}
    changed = [s for s in scores if s.alternative.kind != "parent"]
    pairs = [(truth[s.alternative.key], s.mean("kl_divergence"), s.alternative) for s in changed]
    kinds = sorted({f"{a.subblock} {a.kind}" for *_, a in pairs})
    errors = torch.tensor([abs(f - t) / max(t, 1e-9) for t, f, _ in pairs])
    z = [(s.mean("kl_divergence") - t) / s.error for s, (t, _, _) in zip(changed, pairs, strict=True) if s.error > 0]
    return {
        "spearman": float(spearmanr([t for t, *_ in pairs], [f for _, f, _ in pairs])[0]),
        "by_kind": {
            kind: float(
                spearmanr(*zip(*[(t, f) for t, f, a in pairs if f"{a.subblock} {a.kind}" == kind], strict=True))[0]
            )
            for kind in kinds
        },
        "median_error": float(errors.median()),
        "p90_error": float(errors.quantile(0.9)),
        "z": float(torch.tensor(z).square().mean().sqrt()) if z else 0.0,
        "points": [(a.key, t, f) for t, f, a in pairs],
    }


def children(
    library: Library, costs: CostTable, by: dict[str, Sequence[Score]], rows: torch.Tensor
) -> list[dict[str, Any]]:
    """True KL, on unseen rows, of the children that each way of scoring leads to."""
    table = []
    for fraction in _BUDGETS:
        row: dict[str, Any] = {"budget": fraction}
        for name, scores in by.items():
            solution = SearchProblem(
                library.alternatives, losses(scores, "kl_divergence"), costs, parse_budget(params=str(fraction)).limits
            ).best()
            child = library.compose(solution.alternatives)
            result = compare(library.parent.model, child, rows, batch_sequences=4)
            values = result.metrics["kl_divergence"]
            row[name] = sum(values) / len(values)
            row[f"{name} rows"] = values
        table.append(row)
    return table


def noise_of_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Standard error of the ratio of two means over the same rows."""
    differences = torch.tensor(values, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return float(differences.std()) / len(reference) ** 0.5 / (sum(reference) / len(reference))


def peer(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Puzzletron's scoring stage on candidates that change one subblock."""
    common = [
        args.peer_python, args.peer_driver, "--hf", args.parent, "--data", args.text, "--work", str(work),
        "--dtype", "float32", "--threads", "1",
        "--ffn", ",".join(map(str, args.ffn)), "--kv", ",".join(map(str, args.kv)),
        "--hook", "independent", "--act-samples", "8", "--score-samples", str(args.rows), "--mbs", str(args.peer_mbs),
        "--block-size", str(args.length), "--descriptor", args.peer_descriptor,
    ]  # fmt: skip
    subprocess.run([*common, "--fresh", "--stages", "convert,act,prune,library,stats"], check=True, capture_output=True)
    file = work / "single_sequence_replacement_solutions.json"
    candidates = json.loads(file.read_text())
    pairs = len(candidates)
    config = json.loads((Path(args.parent) / "config.json").read_text())
    whole = (config["num_key_value_heads"], config["intermediate_size"])
    kept = []
    for candidate in candidates:
        (block,) = candidate["single_sequence_replacement"]["child_block_configs"]
        sizes = (block["attention"].get("num_key_value_heads"), block["ffn"].get("intermediate_size"))
        (layer,) = candidate["single_sequence_replacement"]["parent_layer_indices"]
        if sum(a != b for a, b in zip(sizes, whole, strict=True)) == 1 and layer % args.every == 0:
            kept.append(candidate)
    if args.peer_candidates:
        kept = kept[:: max(1, len(kept) // args.peer_candidates)][: args.peer_candidates]
    file.write_text(json.dumps(kept))
    subprocess.run([*common, "--stages", "score"], check=True, capture_output=True)
    timing = json.loads((work / "timing.json").read_text())
    parts = timing["info"]["scoring_components"]
    return {
        "candidates": len(kept), "pairs": pairs, "cpu_seconds": timing["cpu_s"]["replacement_scoring"],
        "gc_seconds": parts.get("gc.collect", {}).get("s", 0.0), "peak_rss_mb": timing["info"]["peak_rss_mb"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--unseen", type=int, default=64, help="rows on which children are compared")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--ffn", type=lambda s: [int(v) for v in s.split(",")], required=True, help="widths")
    parser.add_argument("--kv", type=lambda s: [int(v) for v in s.split(",")], required=True, help="KV heads")
    parser.add_argument("--every", type=int, default=1, help="only every so many layers have alternatives")
    parser.add_argument("--wide-library", action="store_true", help="every kind of alternative that the parent allows")
    parser.add_argument("--no-exact", action="store_true", help="leave out what needs exact scores of everything")
    parser.add_argument("--no-children", action="store_true")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-driver")
    parser.add_argument("--peer-descriptor", default="llama")
    parser.add_argument("--peer-candidates", type=int, help="an even selection; its cost is scaled up")
    parser.add_argument("--peer-mbs", type=int, default=4, help="rows in a batch of puzzletron's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    parent = load_parent(args.parent, Runtime(torch.device("cpu"), torch.float32))
    ids = load_tokenizer(args.parent)(Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    needed = (3 * args.rows + args.unseen) * args.length
    all_rows = torch.tensor(ids[:needed]).view(-1, args.length)
    calibration, rows, unseen = all_rows.split([2 * args.rows, args.rows, args.unseen])
    kept = tuple(i for i in range(len(parent.blocks)) if i % args.every)
    recipe = LibraryRecipe(keep_layers=kept) if args.wide_library else LibraryRecipe(
        keep_layers=kept,
        ffn_sizes=tuple(args.ffn), kv_heads=tuple(args.kv), kv_methods=("contribution",), ffn_ranking="contribution",
        query_heads=False, windows=False, linear=(),
    )  # fmt: skip
    library = build_library(parent, recipe, survey(parent, recipe), Calibration(calibration, 4))
    count = sum(a.kind != "parent" for a in library.alternatives)
    costs = cost_table(parent, library, Workload(1, 1))
    batch = max(1, args.batch_tokens // args.length)
    forward = forward_seconds(library, rows, batch)
    per_flop = matrix_seconds_per_flop(library, min(args.batch_tokens, rows.numel()))
    result: dict[str, Any] = {
        "versions": versions(), "machine": platform.processor() or platform.machine(), "threads": 1,
        "parent": str(Path(args.parent).name), "parameters": sum(p.numel() for p in parent.model.parameters()),
        "layers": len(parent.blocks), "alternatives": count, "tokens": rows.numel(),
        "forward_seconds": forward, "matrix_gflops": 1e-9 / per_flop,
    }  # fmt: skip
    axes = axes_of(library.alternatives, costs, parse_budget(params="0.5").limits)
    of_estimates = ScoringRecipe(mode="second_order", batch_tokens=args.batch_tokens)
    estimated, seconds, said = timed(library, rows, of_estimates, axes)
    result["second_order"] = {"cpu_seconds": seconds, "said": said}
    if not args.no_exact:
        exact, seconds, said = timed(library, rows, ScoringRecipe(mode="exact", batch_tokens=args.batch_tokens))
        result["exact"] = {"cpu_seconds": seconds, "said": said, "fidelity": fidelity(exact, estimated)}
        if not args.no_children:
            result["children"] = children(library, costs, {"exact": exact, "second_order": estimated}, unseen)
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if args.peer_python and args.peer_driver:
        result["peer"] = peer(args, args.out.with_suffix(".peer"))
    if "exact" in result:
        points = result["exact"]["fidelity"]["points"]
        plot(points, f"{result['parent']}: {count} alternatives", args.out.with_suffix(".svg"))
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(table(result))
    print(table(result))


def plot(points: Sequence[tuple[str, float, float]], title: str, out: Path) -> None:
    """Scores against exact KL, on logarithmic scales."""
    import altair

    rows = [
        {"exact KL": truth, "score": score, "kind": key.partition(": ")[2].split()[0], "alternative": key}
        for key, truth, score in points
        if truth > 0 and score > 0
    ]
    scale = altair.Scale(type="log")
    marks = altair.Chart(altair.Data(values=rows), title=title).mark_point(size=18)
    marks = marks.encode(
        x=altair.X("exact KL:Q", scale=scale), y=altair.Y("score:Q", scale=scale), color="kind:N", shape="kind:N"
    )
    ends = [{"exact KL": v, "score": v} for v in (min(r["exact KL"] for r in rows), max(r["exact KL"] for r in rows))]
    line = altair.Chart(altair.Data(values=ends)).mark_line(color="gray", strokeDash=[4, 3])
    line = line.encode(x=altair.X("exact KL:Q", scale=scale), y=altair.Y("score:Q", scale=scale))
    (line + marks).properties(width=420, height=360).save(str(out))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    count = result["alternatives"]
    lines = [
        f"# Scoring {result['parent']}: {result['parameters'] / 1e6:.1f}M parameters, {result['layers']} layers, "
        f"{count} alternatives, {result['tokens']:,} tokens",
        "",
        f"One thread, float32, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. A forward pass takes "
        f"{result['forward_seconds']:.2f} CPU s; the parent's matrices run at {result['matrix_gflops']:.0f} GFLOP/s.",
        "",
        "| | CPU s | forward passes | |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("second_order", "exact"):
        if ours := result.get(name):
            passes = ours["cpu_seconds"] / result["forward_seconds"]
            lines.append(
                f"| layersmith, {name.replace('_', ' ')} | {ours['cpu_seconds']:.1f} | {passes:.1f} | {ours['said']} |"
            )
    if peers := result.get("peer"):
        scale, without = count / peers["candidates"], peers["cpu_seconds"] - peers["gc_seconds"]
        note = f"{peers['candidates']} candidates run" + (f", scaled by {scale:.2f}" if scale != 1 else "")
        for what, seconds in (("", peers["cpu_seconds"]), (", garbage collection left out", without)):
            passes = scale * seconds / result["forward_seconds"]
            lines.append(f"| puzzletron{what} | {scale * seconds:.1f} | {passes:.1f} | {note} |")
        for name in ("second_order", "exact"):
            if name in result:
                ratio = scale * without / result[name]["cpu_seconds"]
                pairs = peers["pairs"] / peers["candidates"] * without / result[name]["cpu_seconds"]
                lines += [
                    "",
                    f"Puzzletron without garbage collection takes {ratio:.1f} times the CPU seconds of "
                    f"{name.replace('_', ' ')} scoring for the same alternatives, and {pairs:.0f} times for all its "
                    f"{peers['pairs']} pairs (scaled).",
                ]
    if exact := result.get("exact"):
        f = exact["fidelity"]
        lines += [
            "",
            f"Second order against exact: Spearman {f['spearman']:.4f}; "
            + ", ".join(f"{kind} {value:.3f}" for kind, value in f["by_kind"].items())
            + f"; relative error: median {f['median_error']:.1%}, 90th percentile {f['p90_error']:.1%}; errors over "
            f"stated errors: {f['z']:.2f} in the root mean square.",
        ]
    if rows := result.get("children"):
        lines += [
            "",
            "| parameters | KL of the child by exact scores | by second order | ratio |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['budget']} | {r['exact']:.5f} | {r['second_order']:.5f} | {r['second_order'] / r['exact']:.3f} ± "
            f"{noise_of_ratio(r['second_order rows'], r['exact rows']):.3f} |"
            for r in rows
        ]
    lines += ["", f"Peak memory of this process, children and all: {result['peak_rss_mb']} MB."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
