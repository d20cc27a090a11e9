"""Training adapters while all weights stay on the disk, compared with its reading and its arithmetic alone.

    python -m benchmarks.reading --layers 12 --hidden 1024 --tokens 16 32 64 128 256 --out benchmarks/results/reading.md

A random Llama is parent and child. For each number of tokens in a pass, the same steps of global distillation with
adapters run with all weights in memory (the arithmetic), and with all weights on the disk; in both, layers are run
again in the backward pass. Then the same tensors are read again in the same order (the reading). What was read is
dropped from the system's cache at once, so every read goes to the disk. Times are medians over the steps; waiting is
how long of a step the arithmetic waited for weights. The memory is the process' peak since its start, by ``VmHWM``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from layersmith.distillation.adapters import add_adapters
from layersmith.distillation.objective import ChildLosses, Mixture, ParentTargets
from layersmith.execution.files import Files
from layersmith.execution.parent import Parent, load_parent
from layersmith.execution.streaming import WeightStream
from layersmith.run.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
STEPS = 5
_KL_AND_HIDDEN = Mixture(kl=1.0, hidden=1.0, lm=0.0, temperature=1.0)


def write_model(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama in float32, with a small vocabulary: the layers are what is read."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


class Reads:
    """Keeps the names of all tensors that are read, and drops them from the system's cache.

    Attributes:
        names: Of the tensors, with their files.
        waited: Seconds in which a model waited for weights.
    """

    def __init__(self) -> None:
        self.names: list[tuple[Files, str]] = []
        self.waited = 0.0
        self._read, self._need = Files.read, WeightStream.need

    def __call__(self, files: Files, name: str, device: torch.device) -> torch.Tensor:
        result = self._read(files, name, device)
        tensor = files._tensors[name]
        os.posix_fadvise(tensor.file, tensor.start, result.nbytes, os.POSIX_FADV_DONTNEED)
        self.names.append((files, name))
        return result

    def need(self, stream: WeightStream, unit: nn.Module) -> None:
        started = time.monotonic()
        self._need(stream, unit)
        self.waited += time.monotonic() - started


def models(path: Path, on_disk: bool) -> tuple[Parent, Parent]:
    """Parent, and a child with adapters."""
    near = path if on_disk else None
    parent, child = (load_parent(path, CPU, stream_near=near) for _ in range(2))
    add_adapters(child.model, child.descriptor, 16, 0)
    if child.stream is not None:
        child.stream.run_again_in_backward()
    else:  # the same arithmetic
        for layer in child.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return parent, child


def step(targets: ParentTargets, losses: ChildLosses, ids: torch.Tensor) -> None:
    """The passes of a step of distillation, without the optimizer's."""
    loss, _ = losses.losses(ids, targets.outputs({"input_ids": ids}, from_cache=False))
    loss.backward()


def measured(path: Path, on_disk: bool, tokens: int, reads: Reads) -> dict[str, float]:
    parent, child = models(path, on_disk)
    targets, losses = ParentTargets(parent, _KL_AND_HIDDEN), ChildLosses(child, _KL_AND_HIDDEN)
    child.model.train()
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(0))
    step(targets, losses, ids)  # what follows what is known from now on
    seconds, reading, waiting = [], [], []
    for _ in range(STEPS):
        reads.names.clear()
        reads.waited = 0.0
        started = time.monotonic()
        step(targets, losses, ids)
        seconds.append(time.monotonic() - started)
        names, waited, started = list(reads.names), reads.waited, time.monotonic()
        for files, name in names:
            files.read(name, CPU.device)
        reading.append(time.monotonic() - started)
        waiting.append(waited)
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    medians = {"step": seconds, "reading": reading, "waiting": waiting}
    return {"peak": float(peak) / 1024, **{name: statistics.median(values) for name, values in medians.items()}}


def in_a_process(path: Path, on_disk: bool, tokens: int) -> dict[str, float]:
    """In a process of its own, so that its peak of memory is known."""
    command = [sys.executable, "-m", "benchmarks.reading", "--one", str(path), str(int(on_disk)), str(tokens)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = output.splitlines()[-1].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def row(path: Path, tokens: int) -> str:
    memory, disk = (in_a_process(path, on_disk, tokens) for on_disk in (False, True))
    share = max(memory["step"], disk["reading"]) / disk["step"]
    seconds = [f"{value:.2f} s" for value in (memory["step"], disk["reading"], disk["step"], disk["waiting"])]
    peaks = [f"{found['peak']:,.0f} MiB" for found in (memory, disk)]
    return f"| {' | '.join([str(tokens), *seconds, f'{share:.2f}', *peaks])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        path, on_disk, tokens = args.one
        reads = Reads()
        Files.read = lambda files, name, device: reads(files, name, device)  # type: ignore[method-assign]
        WeightStream.need = lambda stream, unit: reads.need(stream, unit)  # type: ignore[method-assign]
        found = measured(Path(path), on_disk == "1", int(tokens), reads)
        print(*[word for pair in found.items() for word in pair])
        return
    columns = ["tokens in a pass", "arithmetic", "reading", "on the disk", "waiting", "the slower / on the disk"]
    columns += ["peak in memory", "peak on the disk"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.layers, args.hidden)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for tokens in args.tokens:
            lines.append(row(Path(folder), tokens))
            print(lines[-1], flush=True)
    text = _text(args, size) + "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def _text(args: Any, size: int) -> str:
    return f"{args.layers} layers of hidden size {args.hidden}, {size / 1024**2:,.0f} MiB in float32.\n\n"


if __name__ == "__main__":
    main()
