"""Accuracy of the remaining time that scoring shows: ``python -m benchmarks.time_left``.

Scoring runs in both modes, by default on the demo model. Every shown remaining time is recorded with the clock, and
compared with the true one at the end. The clock counts the CPU seconds of this process on one thread, so that other
load on the machine has no effect.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from layersmith.costs.budget import Workload, parse_budget
from layersmith.data.splits import load_tokenizer
from layersmith.demo.job import MODEL, standard_library
from layersmith.execution.parent import load_parent
from layersmith.library.build import build_library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.run.progress import Advance, Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.library_scores import score_library
from layersmith.search.frontier import axes_of
from layersmith.stages.costs import cost_table

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Recorder(Progress):
    """Records the remaining times with the time at which each was shown."""

    clock = staticmethod(time.process_time)

    def __init__(self) -> None:
        self.shown: list[tuple[float, float]] = []
        self.total = 0.0

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started = self.clock()

        def advance(steps: float, left: float | None = None, said: str = "") -> None:
            assert left is not None
            self.shown.append((self.clock() - started, left))

        yield advance
        self.total = self.clock() - started

    def errors(self) -> dict[str, Any]:
        """Relative errors of the remaining time after each share of the whole time, and the worst ones."""
        errors: dict[str, Any] = {"seconds": self.total, "shown": len(self.shown)}
        error = {at: (at + left - self.total) / (self.total - at) for at, left in self.shown if at < self.total}
        for share in _SHARES:
            at = next(at for at in error if at >= share * self.total)
            errors[f"{share:.0%}"] = error[at]
        for end in (0.9, 0.95):
            late = [error[at] for at in error if 0.1 * self.total <= at <= end * self.total]
            errors[f"worst from 10% to {end:.0%}"] = max(late, key=abs)
        return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", default=MODEL)
    parser.add_argument("--text", help="default: Python's library")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--modes", default="second_order,exact")
    parser.add_argument("--stream", action="store_true", help="leave the parent's weights on the disk")
    parser.add_argument("--ffn", type=lambda s: tuple(map(float, s.split(","))), help="widths as fractions")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = Path(args.text) if args.text else standard_library() / "argparse.py"
    ids = load_tokenizer(args.parent)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = (ids * -(-2 * args.rows * args.length // len(ids)))[: 2 * args.rows * args.length]
    calibration, rows = torch.tensor(ids).view(2, args.rows, args.length)
    result: dict[str, Any] = {"parent": Path(args.parent).name, "tokens": rows.numel(), "streamed": args.stream}
    with tempfile.TemporaryDirectory() as folder:
        near = Path(folder) if args.stream else None
        parent = load_parent(args.parent, Runtime(torch.device("cpu"), torch.float32), stream_near=near)
        recipe = LibraryRecipe(ffn_fractions=args.ffn, linear=()) if args.ffn else LibraryRecipe()
        library = build_library(parent, recipe, survey(parent, recipe), Calibration(calibration, 4))
        result["alternatives"] = sum(a.kind != "parent" for a in library.alternatives)
        limits = parse_budget(params="0.7").limits
        axes = axes_of(library.alternatives, cost_table(parent, library, Workload()), limits)
        for mode in args.modes.split(","):
            recorder = Recorder()
            journal = Path(folder) / f"{mode}.journal"
            score_library(
                library, rows, ScoringRecipe(mode=mode), axes=axes, recording=Recording(journal, progress=recorder)
            )
            result[mode] = recorder.errors()
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    modes = [mode for mode in ("second_order", "exact") if mode in result]
    heading = f"{result['parent']}, {result['alternatives']} alternatives, {result['tokens']:,} tokens"
    lines = [
        f"| {heading} | {' | '.join(mode.replace('_', ' ') for mode in modes)} |",
        "| --- |" + " --- |" * len(modes),
    ]
    lines.append("| CPU s | " + " | ".join(f"{result[mode]['seconds']:.1f}" for mode in modes) + " |")
    for key in result[modes[0]]:
        if key not in ("seconds", "shown"):
            lines.append(f"| {key} | " + " | ".join(f"{result[mode][key]:+.1%}" for mode in modes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
