"""Predicted against measured times of whole children, across the frontier.

    python -m benchmarks.costs RUN [RUN ...] --out benchmarks/results/costs.md [--context 512] [--generate 128]

A RUN is a folder that ``compress --until scores`` made. The parts of its parent are timed as a run with a budget of
time does it (:mod:`layersmith.costs.measured`, 120 s at most), and ten children of the frontier by time per token,
from the smallest to nearly the parent, are made with their real weights. Then a stopwatch of its own calls ``generate``
on all children and the parent in turns: time to first token is that of one token, time per token is what further ones
add, over their number. A child's time is compared as a fraction of the parent's, before and after the correction that
made-up choices gave; none of the children is one of those. One thread on a CPU is told its own time, so that what
others take of the machine is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from layersmith.costs.budget import Budget, Workload
from layersmith.costs.clock import median_polish
from layersmith.costs.curve import Curve
from layersmith.costs.measured import measure
from layersmith.costs.stopwatch import Stopwatch
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import CostsRecipe
from layersmith.run.folder import versions
from layersmith.search.frontier import frontier
from layersmith.stages.costs import cost_table
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES
from layersmith.stages.search import search_problem

CHILDREN = 10
_PHASES = {"prefill": "time to first token", "decode": "time per token"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", nargs="+")
    options.add_argument("--out", type=Path)
    options.add_argument("--context", type=int, default=512)
    options.add_argument("--generate", type=int, default=128)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seconds", type=float, default=CostsRecipe.seconds)
    chosen = options.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    results = [examined(run, chosen) for run in chosen.runs]
    text = rendered(results, chosen)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text)
        chosen.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def examined(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """What ten children of a run were said to take, and what they took."""
    job = job_of_run(folder)
    recipe, library = job.recipe, job.read(LIBRARY)
    parent = library.parent
    load = {"batch": options.batch, "context": options.context, "generate": options.generate}
    limits = Budget.parse({"time_per_token": 1.0, **load}).limits
    workload = Workload(**load)
    costs = cost_table(parent, library, workload)
    scores = job.read(SCORES)
    started = time.process_time()
    timing = CostsRecipe(seconds=options.seconds, rounds=options.rounds)
    times = measure(Stopwatch(parent, workload, timing), library.alternatives, costs)
    seconds = time.process_time() - started
    problem = search_problem(library, scores, recipe, times.into(costs, library.alternatives), limits)
    solutions = [c for c in frontier(problem, "decode_seconds") if any(a.kind != "parent" for a in c.alternatives)]
    some = [solutions[i * (len(solutions) - 1) // (CHILDREN - 1)] for i in range(CHILDREN)]
    # The parent, beside which all are told, three times.
    models = [*[parent.model] * 3, *(library.compose(solution.alternatives) for solution in some)]
    seen, errors = stopwatch(models, options, parent.language_config.vocab_size)
    clock = {phase: sum(one[phase] for one in seen[:3]) / 3 for phase in _PHASES}
    noise = {phase: math.hypot(*(one[phase] for one in errors[:3])) / 3 / clock[phase] for phase in _PHASES}
    rows = []
    for solution, measured, error in zip(some, seen[3:], errors[3:], strict=True):
        row: dict[str, Any] = {"parameters": solution.costs["parameters"] / solution.parent_costs["parameters"]}
        parts = times.whole(a.key for a in solution.alternatives)
        whole = times.parent(library.alternatives)
        for phase in _PHASES:
            name = f"{phase}_seconds"
            row[phase] = {
                "sum": getattr(parts, phase) / getattr(whole, phase),
                "predicted": solution.costs[name] / solution.parent_costs[name],
                "measured": measured[phase] / clock[phase],
                "error": math.hypot(error[phase] / measured[phase], noise[phase]),
            }
        rows.append(row)
    return {
        "name": f"{Path(parent.path).name}, {len(parent.blocks)} layers",
        "parameters": costs.parent["parameters"],
        "device": times.device,
        "parent": clock,
        "curves": {p: dataclasses.asdict(c) for p, c in times.curves(library.alternatives).items()},
        "seconds": seconds,
        "rows": rows,
    }


class Ticks(BaseStreamer):
    """Notes when ``generate`` hands over each token."""

    def __init__(self) -> None:
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.at: list[float] = [self.clock()]

    def put(self, value: torch.Tensor) -> None:  # first the prompt, which waits for nothing, then each token
        self.at.append(self.clock())

    def end(self) -> None:
        pass


def stopwatch(
    models: list[Any], options: argparse.Namespace, vocab_size: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Times of models in turns, told from the rounds by medians, and their standard errors."""
    prompt = options.context - options.generate
    ids = torch.randint(0, vocab_size, (options.batch, prompt), generator=torch.Generator().manual_seed(7))
    config = GenerationConfig(
        max_new_tokens=options.generate, min_new_tokens=options.generate, do_sample=False, pad_token_id=0,
        disable_compile=True,
    )  # fmt: skip

    def took(model: Any) -> dict[str, float]:
        ticks = Ticks()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=ticks)
        start, _, *tokens = ticks.at
        first, *more = [after - before for before, after in pairwise([start, *tokens])]
        return {"prefill": first, "decode": statistics.median(more)}

    seen: list[list[dict[str, float]]] = []
    order = list(range(len(models)))
    with quiet_transformers():
        for round_ in range(options.rounds + 1):
            row: list[dict[str, float]] = [{} for _ in models]
            random.Random(round_).shuffle(order)
            for k in order:
                row[k] = took(models[k])
            if round_:  # the first warms up
                seen.append(row)
    seconds, errors = {}, {}
    for phase in _PHASES:
        seconds[phase], errors[phase] = median_polish([[one[phase] for one in row] for row in seen])
    by_model = [[{phase: of[phase][k] for phase in _PHASES} for k in range(len(models))] for of in (seconds, errors)]
    return by_model[0], by_model[1]


def rendered(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    prompt = options.context - options.generate
    lines = [
        "# Times of whole children, predicted and measured",
        "",
        f"Batch {options.batch}, prompt of {prompt} tokens, {options.generate} written. {packages}.",
    ]
    for one in results:
        said = ", ".join(f"{_PHASES[p]} {Curve(**packages)(0.5):.3f}" for p, packages in one["curves"].items())
        lines += [
            "",
            f"## {one['name']}, {one['parameters'] / 1e6:.1f}M parameters",
            "",
            f"{one['device']}. Timing the parts took {one['seconds']:.0f} CPU seconds; a sum of 0.5 is taken for: "
            f"{said}. The parent takes {1e3 * one['parent']['prefill']:.1f} ms to the first token, "
            f"{1e3 * one['parent']['decode']:.2f} ms per token.",
            "",
            "| parameters | "
            + " | ".join(f"{w}: sum | predicted | measured | off by" for w in _PHASES.values())
            + " |",
            "| --- |" + " --- |" * 8,
        ]
        for row in one["rows"]:
            cells = [f"{row['parameters']:.3f}"]
            for phase in _PHASES:
                own_row = row[phase]
                off = own_row["predicted"] / own_row["measured"] - 1
                cells += [f"{own_row[k]:.3f}" for k in ("sum", "predicted", "measured")]
                cells.append(f"{off:+.1%} ± {own_row['error']:.1%}")
            lines.append("| " + " | ".join(cells) + " |")
        for phase, words in _PHASES.items():
            offs = [abs(row[phase]["predicted"] / row[phase]["measured"] - 1) for row in one["rows"]]
            before = [abs(row[phase]["sum"] / row[phase]["measured"] - 1) for row in one["rows"]]
            noise = sum(row[phase]["error"] for row in one["rows"]) / len(one["rows"])
            lines += [
                "",
                f"{words.capitalize()}: off by {sum(offs) / len(offs):.1%} in the mean, {max(offs):.1%} at most; "
                f"without correction {sum(before) / len(before):.1%} and {max(before):.1%}. The stopwatch's own "
                f"standard error is {noise:.1%} in the mean.",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
