"""CPU seconds of each stage in each of several processes, on a parent with random weights.

    python -m benchmarks.processes OUT.md --processes 1 2 4

The efficiency at n processes is the CPU time of one process over n times that of the busiest of n. It is what wall time
would show on n free cores, except for waiting, and also holds on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import layersmith
from layersmith.demo.job import MODEL
from layersmith.pipeline import stages
from layersmith.run import ranks

STAGES = ("statistics", "library", "scores")
RECIPE = {
    "device": "cpu",
    "data": {"sequence_length": 256, "calibration_sequences": 32, "scoring_sequences": 32, "evaluation_sequences": 4,
             "training_sequences": 0},
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


def work(folder: Path) -> None:
    """One process: everything up to the scores."""
    torch.set_num_threads(1)
    seconds, before = {}, time.process_time()
    for stage in stages(folder / "parent", folder / "run", folder / "rows.npy", 0.7, RECIPE):
        now = time.process_time()
        seconds[str(stage)], before = now - before, now
        if stage == STAGES[-1]:
            break
    (folder / f"seconds-{ranks.number()}.json").write_text(json.dumps(seconds))


def measured(processes: int, layers: int, hidden: int) -> tuple[list[dict[str, float]], str]:
    """Seconds by stage of each process, and the scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent(folder / "parent", layers, hidden)
        np.save(folder / "rows.npy", np.random.default_rng(0).integers(0, 4096, 100 * 256, dtype=np.int64))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERSMITH_STORE": "off"}
        command = [sys.executable, *launcher, "-m", "benchmarks.processes", "--work", name]
        subprocess.run(command, check=True, env=environment)
        seconds = [json.loads((folder / f"seconds-{rank}.json").read_text()) for rank in range(processes)]
        return seconds, (folder / "run" / "scores" / "scores.json").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work)
        return
    results = {n: measured(n, args.layers, args.hidden) for n in args.processes}
    first = min(results)
    lines = [
        f"CPU seconds of the busiest process, and the efficiency. A random Llama of {args.layers} layers, hidden size "
        f"{args.hidden}; 32 calibration and 32 scoring rows of 256 tokens; one thread a process.",
        "",
        "| processes | " + " | ".join(STAGES) + " | scores |",
        "| --- |" + " --- |" * (len(STAGES) + 1),
    ]
    for n, (seconds, scores) in results.items():
        cells = []
        for stage in STAGES:
            busiest = max(of_process[stage] for of_process in seconds)
            alone = first * max(of_process[stage] for of_process in results[first][0])
            cells.append(f"{busiest:.1f} ({alone / (n * busiest):.0%})")
        lines.append(f"| {n} | {' | '.join(cells)} | {'equal' if scores == results[first][1] else 'differ'} |")
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
