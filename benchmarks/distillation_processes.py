"""Speed and memory of global distillation in several processes, sharded or not, compared with a plain Trainer (DDP).

    python -m benchmarks.distillation_processes --processes 2 --out benchmarks/results/distillation-processes

The models are random: a Llama, and a child with narrower FFNs and a removed layer. All see the same rows and have the
same loss and optimizer (AdamW, which a plain Trainer has). ``plain`` is what Trainer's users would write, with whole
logits, under DDP; ``whole`` and ``sharded`` are layersmith's, with ``distillation.sharded`` never and always;
``together`` has ``distillation.tensor_parallel``, so all processes compute the same rows. Each process has one thread.
Times are those of the slowest process, without loading and the first step. Memory is the peak of the resident set of
the fullest, with loading, without what it had after its imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import layersmith
from benchmarks.distillation_global import PlainTrainer
from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.distillation.arguments import training_arguments
from layersmith.distillation.steps import RowOrder, Steps, collate
from layersmith.distillation.train import GlobalSetup, TrainingRows, train
from layersmith.execution.parent import load_parent
from layersmith.execution.sharded import load_sharded
from layersmith.recipe import DistillationRecipe
from layersmith.run import ranks
from layersmith.run.artifacts import write_json
from layersmith.run.folder import versions
from layersmith.run.runtime import Runtime

WAYS = ("plain", "whole", "sharded", "together")
LENGTH = 256


def make_models(folder: Path, layers: int, hidden: int, vocab: int) -> dict[str, int]:
    """Write a parent and a child; their numbers of parameters."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
    )  # fmt: skip
    heads = AttentionConfig(num_key_value_heads=hidden // 64)
    wide, narrow = FFNConfig(intermediate_size=3 * hidden), FFNConfig(intermediate_size=hidden)
    whole, less = BlockConfig(heads, wide), BlockConfig(heads, narrow)
    none = BlockConfig(AttentionConfig(no_op=True), FFNConfig(no_op=True))
    blocks = [none if i == layers // 2 else less if i % 2 else whole for i in range(layers)]
    counts = {}
    torch.manual_seed(0)
    for name, of_model in (("parent", [whole] * layers), ("child", blocks)):
        model = layersmith.build(config, of_model, dtype=torch.float32)
        layersmith.save(model, folder / name)
        counts[name] = sum(p.numel() for p in model.parameters())
    return counts


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def work(which: str, folder: Path, tokens: int, at_once: int) -> None:
    """Train in this process, with the others; prints what it took."""
    torch.set_num_threads(1)
    runtime = Runtime.detect("cpu", "float32")
    ranks.start(runtime)
    before = resident()
    recipe = DistillationRecipe(
        batch_tokens=at_once * runtime.world_size, device_tokens=at_once, optimizer="adamw", save_seconds=1e9
    )
    number = runtime.world_size if which == "together" else 1
    recipe = dataclasses.replace(recipe, tensor_parallel=number)
    marks: list[tuple[float, float]] = []
    if which in ("sharded", "together"):
        how: dict[str, Any] = {"near": folder, "tensor_parallel": number}
        parent = load_sharded(folder / "parent", runtime, **how)
        child = load_sharded(folder / "child", runtime, parent.descriptor, **how, trains=True).model
    else:
        parent, child = load_parent(folder / "parent", runtime), layersmith.load(folder / "child", dtype=torch.float32)
    rows = torch.randint(parent.language_config.vocab_size, (tokens // LENGTH, LENGTH))
    steps = Steps.of(recipe, tokens, LENGTH, runtime.world_size)

    def mark(done: float) -> None:
        marks.append((time.process_time(), time.monotonic()))

    with tempfile.TemporaryDirectory() as place:
        if which == "plain":
            arguments = training_arguments(recipe, steps, runtime, 1024, 0, Path(place))
            trainer = PlainTrainer(
                parent.model, recipe.hidden, model=child.train().requires_grad_(True), args=arguments,
                data_collator=collate, train_dataset=RowOrder(rows, steps.count * steps.rows, 0),
            )  # fmt: skip
            step = trainer.training_step

            def marked(*given: Any, **named: Any) -> Any:
                mark(0)
                return step(*given, **named)

            trainer.training_step = marked  # type: ignore[method-assign]
            trainer.train()
            mark(0)
        else:
            setup = GlobalSetup(
                recipe=recipe, tokens=tokens, seed=0, folder=Path(place), curve=Path(place) / "curve", name=""
            )
            train(parent, child, TrainingRows(rows), setup, mark)
    # The first mark is before the first step, the second after it.
    (cpu, wall), (cpu_end, wall_end) = marks[1], marks[steps.count]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    made = {
        "tokens": (steps.count - 1) * steps.tokens,
        "cpu": cpu_end - cpu,
        "wall": wall_end - wall,
        "peak_mib": peak - before,
    }
    for other in ranks.from_each(lambda: made):
        if ranks.is_first():
            print(json.dumps(other), flush=True)


def run(which: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a way in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command = [*launcher, "-m", "benchmarks.distillation_processes", "--work", which, "--folder", str(folder)]
    command += ["--tokens", str(args.tokens), "--at-once", str(args.at_once)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    if len(made) != args.processes:
        raise RuntimeError(done.stdout + done.stderr)
    fullest = {name: max(row[name] for row in made) for name in made[0]}
    return {"which": which, "processes": args.processes, **fullest}


def table(rows: list[dict[str, Any]], counts: dict[str, int]) -> str:
    lines = [
        "| | tokens per CPU second and process | tokens per second | peak memory of a process, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for which in WAYS:
        mine = [row for row in rows if row["which"] == which]
        by_cpu = sorted(row["tokens"] / row["processes"] / row["cpu"] for row in mine)
        by_wall = sorted(row["tokens"] / row["wall"] for row in mine)
        peak = max(row["peak_mib"] for row in mine)
        spans = [f"{values[0]:.0f} to {values[-1]:.0f}" for values in (by_cpu, by_wall)]
        lines.append(f"| {which} | {spans[0]} | {spans[1]} | {peak:.0f} |")
    parameters = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items())
    said = f"Parameters: {parameters}. {rows[0]['processes']} processes, {len(rows) // len(WAYS)} runs of each."
    return "\n".join([said, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--at-once", type=int, default=512, help="tokens of a pass of one process")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="files for the numbers and the table, without their suffix")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder, args.tokens, args.at_once)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        counts = make_models(Path(folder), args.layers, args.hidden, args.vocab)
        for turn in range(args.turns):
            for which in WAYS if turn % 2 == 0 else reversed(WAYS):
                rows.append(run(which, Path(folder), args))
                print(json.dumps(rows[-1]), flush=True)
    made = table(rows, counts)
    print(made)
    if args.out:
        write_json(args.out.with_suffix(".json"), {"versions": versions(), "parameters": counts, "rows": rows})
        args.out.with_suffix(".md").write_text(made + "\n")


if __name__ == "__main__":
    main()
