"""CPU seconds of each stage in each of several processes, on a parent with random weights, and their memory.

    python -m benchmarks.processes OUT.md --processes 1 2 4
    python -m benchmarks.processes OUT.md --processes 1 2 4 --divided
    python -m benchmarks.processes OUT.md --processes 1 2 4 --divided --plan

The efficiency at n processes is the CPU time of one process over n times that of the busiest of n. It is what wall time
would show on n free cores, except for waiting, and also holds on a busy machine. What waiting costs where layers are
dealt to processes follows from their number and that of the batches (:mod:`layersmith.execution.dealing`).

With ``--divided``, weights stay on the disk, and each of several processes holds the layers that are dealt to it.
Memory is the largest resident set of the process less that after all imports.

With ``--plan``, the runs go on to the evaluation, and a table compares them with the plan that ``--dry-run`` makes. The
plan's rate is measured by CPU time as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import layersmith
from layersmith.costs.budget import Budget
from layersmith.demo.job import MODEL
from layersmith.execution.dealing import efficiency
from layersmith.pipeline import stages
from layersmith.recipe import Recipe
from layersmith.run import ranks
from layersmith.stages import time_plan
from layersmith.stages.dry_run import Asked, plan
from layersmith.stages.placement import Placement

STAGES = ("statistics", "library", "scores")
PLANNED = (*STAGES, "refine", "pairs", "child", "evaluation")
BUDGET = 0.7
RECIPE: dict[str, Any] = {
    "device": "cpu", "completion_tokens": 0, "costs": {"time_child": False},
    "data": {"sequence_length": 256, "evaluation_sequences": 4, "training_sequences": 0},
    "local_distillation": {"tokens": 0, "coupled_tokens": 0},
}  # fmt: skip


def parent(folder: Path, layers: int, hidden: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    layersmith.save(LlamaForCausalLM(config).to(torch.bfloat16), folder)
    tokenizer.save_pretrained(folder)


def resident() -> tuple[float, float]:
    """The resident set of this process in MiB: now, and the largest since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    Path("/proc/self/clear_refs").write_text("5")
    return sizes["VmRSS"], sizes["VmHWM"]


def work(folder: Path, recipe: dict[str, Any], until: str) -> None:
    """One process: everything up to a stage."""
    torch.set_num_threads(1)
    (base, _), seconds, memory, before = resident(), {}, {}, time.process_time()
    for stage in stages(folder / "parent", folder / "run", folder / "rows.npy", BUDGET, recipe):
        now = time.process_time()
        seconds[str(stage)], before = now - before, now
        memory[str(stage)] = resident()[1] - base
        if stage == until:
            break
    (folder / f"{ranks.number()}.json").write_text(json.dumps({"seconds": seconds, "memory": memory}))


def planned(folder: Path, processes: int, recipe: dict[str, Any]) -> Placement:
    """The plan that ``--dry-run`` makes for a number of processes."""
    time_plan.time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)  # type: ignore[assignment]
    (folder / "text.txt").write_text("A plan reads a document, and no rows of tokens.")
    given = folder / "parent", folder / "run", folder / "text.txt", Recipe.from_dict(recipe), Budget.parse(BUDGET)
    placement = plan(*given, asked=Asked(processes)).placement
    assert placement is not None
    return placement


def measured(
    processes: int, args: argparse.Namespace
) -> tuple[list[dict[str, dict[str, float]]], str, Placement | None]:
    """Seconds and MiB by stage of each process, the scores, and the plan if it is wanted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent(folder / "parent", args.layers, args.hidden)
        np.save(
            folder / "rows.npy", np.random.default_rng(0).integers(0, 4096, (3 * args.rows + 8) * 256, dtype=np.int64)
        )
        data = RECIPE["data"] | {"calibration_sequences": args.rows, "scoring_sequences": args.rows}
        recipe = RECIPE | {"data": data, "stream": "always" if args.divided else "never"}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        placement = planned(folder, processes, recipe) if args.plan else None
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERSMITH_STORE": "off"}
        command = [sys.executable, *launcher, "-m", "benchmarks.processes", "--work", name]
        command += ["--plan"] if args.plan else []
        subprocess.run(command, check=True, env=environment)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
        return found, (folder / "run" / "scores" / "scores.json").read_text(), placement


Results = dict[int, tuple[list[dict[str, dict[str, float]]], str, Placement | None]]


def against_plan(results: Results) -> Iterator[str]:
    """What the process that takes most was planned to take, without waiting, and takes."""
    yield "| processes | stage | MiB planned | measured | ratio | CPU seconds planned | measured | ratio |"
    yield "| --- |" + " --- |" * 7
    for n, (found, _, placement) in results.items():
        totals = [0.0, 0.0]
        for stage in PLANNED if placement is not None else ():
            share = placement.stages[stage]
            planned_seconds = share.seconds - share.waiting
            memory, seconds = (max(of[what][stage] for of in found) for what in ("memory", "seconds"))
            totals = [totals[0] + planned_seconds, totals[1] + seconds]
            size = share.on_device / 1024**2
            cells = [f"{size:.0f}", f"{memory:.0f}", f"{size / memory:.2f}"]
            cells += [f"{planned_seconds:.1f}", f"{seconds:.1f}", f"{planned_seconds / max(seconds, 0.1):.2f}"]
            yield f"| {n} | {stage} | {' | '.join(cells)} |"
        most = max(placement.stages[stage].on_device for stage in PLANNED) / 1024**2
        peak = max(of["memory"][stage] for of in found for stage in PLANNED)
        cells = [f"{most:.0f}", f"{peak:.0f}", f"{most / peak:.2f}", *(f"{t:.1f}" for t in totals)]
        yield f"| {n} | all | {' | '.join([*cells, f'{totals[0] / totals[1]:.2f}'])} |"


def table(results: Results, args: argparse.Namespace) -> Iterator[str]:
    first = min(results)
    where = "each process holds the layers that are dealt to it" if args.divided else "each process holds the parent"
    yield (
        f"CPU seconds of the busiest process, with the efficiency, and MiB of the largest; {where}. A random Llama of "
        f"{args.layers} layers, hidden size {args.hidden}; {args.rows} calibration and {args.rows} scoring rows of 256 "
        "tokens; one thread a process; float32."
    )
    yield ""
    yield "| processes | " + " | ".join(f"{stage}, s | MiB" for stage in STAGES) + " | scores |"
    yield "| --- |" + " --- |" * (2 * len(STAGES) + 1)
    for n, (found, scores, _) in results.items():
        cells = []
        for stage in STAGES:
            busiest = max(of_process["seconds"][stage] for of_process in found)
            alone = first * max(of_process["seconds"][stage] for of_process in results[first][0])
            cells.append(f"{busiest:.1f} ({alone / (n * busiest):.0%})")
            cells.append(f"{max(of_process['memory'][stage] for of_process in found):.0f}")
        yield f"| {n} | {' | '.join(cells)} | {'equal' if scores == results[first][1] else 'differ'} |"
    yield ""
    if args.plan:
        yield from against_plan(results)
        yield ""
    batches = (2, 4, 8, 32)
    yield (
        "Waiting where layers are dealt, by the model of costs: the share of the time of "
        + "; ".join(
            f"{n} processes that is work is "
            + ", ".join(f"{efficiency([1.0] * args.layers, n, b):.0%} with {b}" for b in batches)
            for n in results
            if n > 1
        )
        + " batches."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--divided", action="store_true", help="keep the weights on the disk")
    parser.add_argument("--plan", action="store_true", help="compare with what --dry-run plans")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        until = (PLANNED if args.plan else STAGES)[-1]
        work(args.work, json.loads((args.work / "recipe.json").read_text()), until)
        return
    lines = list(table({n: measured(n, args) for n in args.processes}, args))
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
