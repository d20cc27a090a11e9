"""Times of a search space in vLLM on this machine, and how well they foretell ``vllm bench`` of whole children.

    python -m benchmarks.vllm_times PARENT --vllm .venv-vllm/bin/python --csv times.csv --out vllm-times.md

PARENT is a folder whose layers the DeciLM layout can express (Llama, Qwen2, Mistral). Every shape of attention and FFN
is timed in a model in which all layers have it; a layer saves what that model saves, over the number of layers. The
CSV file is what ``--set costs.times=times.csv`` takes, so that ``search --time-per-token 0.7x`` is about vLLM. Five
other children correct the sums, as after measuring in Transformers. Then ``vllm bench latency`` runs on further
children, from small to large; none of them was timed before. All run in one process and one thread. Weights are made
up: times do not depend on them. Times that an earlier call stored next to the CSV file are used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.savings import as_times
from layersmith.costs.times import Check, Times, Timing, to_csv
from layersmith.costs.trial_solutions import trial_solutions
from layersmith.export.decilm import CONFIG_CLASS, CONFIG_FILE, VLLM, config_json
from layersmith.export.source import Source
from layersmith.library.alternative import Alternative, child_blocks
from layersmith.model_descriptor.stock import stock_model
from layersmith.recipe import LibraryRecipe
from layersmith.run.artifacts import write_json, write_text
from layersmith.stages.inspect import Outline, outline
from layersmith.upstream import shapes_on_disk

CLOCK = Path(__file__).with_name("vllm_clock.py")
# What `vllm bench` does, without the entry point of the package, which is not installed under the name vllm on CPUs.
_BENCH = (
    "from vllm.benchmarks.latency import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())\n"
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # as the parts were timed: no second process that waits for the first
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("parent")
    options.add_argument("--vllm", required=True, help="Python of an environment with vLLM")
    options.add_argument("--csv", type=Path, required=True, help="file for the times")
    options.add_argument("--out", type=Path, help="Markdown file for the comparison with vllm bench")
    options.add_argument("--name", help="the parent's name in the table")
    options.add_argument("--prompt", type=int, default=384)
    options.add_argument("--generate", type=int, default=128)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--checks", type=int, default=5, help="children that correct the sums")
    options.add_argument("--children", type=int, default=5, help="children that vllm bench runs")
    args = options.parse_args()
    workload = Workload(1, args.prompt + args.generate, args.generate)
    space = outline(args.parent, LibraryRecipe(linear=()), workload)  # the layout has no linear maps
    server = _Server(args.vllm, args.dtype, workload, space)
    kept = args.csv.with_suffix(".json")
    if kept.is_file():
        times = Times.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    else:
        times = server.times(args.checks)
        write_text(args.csv, to_csv(times, space.alternatives))
        write_json(kept, times.to_dict(space.alternatives))
        print(f"Written: {args.csv}, and with the children that correct the sums: {kept}")
    if args.out:
        write_text(args.out, _compared(server, times, args.children, args.name or Path(args.parent).name))
        print(f"Written: {args.out}")


@dataclass(frozen=True)
class _Server:
    """vLLM, asked about models of one parent's search space.

    Attributes:
        python: Interpreter of vLLM's environment.
        dtype: Data type of the weights.
        workload: One request.
        space: The search space.
    """

    python: str
    dtype: str
    workload: Workload
    space: Outline

    @cached_property
    def names(self) -> set[str]:
        """Names of the parent's tensors."""
        return set(shapes_on_disk(stock_model(self.space.config)))

    def times(self, checks: int) -> Times:
        """Times of all alternatives, corrected by whole children."""
        space, parent = self.space, self.space.blocks
        shapes: dict[tuple[str, BlockConfig], dict[int, list[Alternative]]] = {}
        for a in space.alternatives:
            if not a.is_parent:  # two methods may lead to one shape
                by_layer = shapes.setdefault((a.subblock, a.block_config(parent[a.layer])), {})
                by_layer.setdefault(a.layer, []).append(a)
        models: list[Sequence[BlockConfig]] = [parent]
        for layers in shapes.values():
            like = [of_layer[0] for of_layer in layers.values()]
            models.append(child_blocks(parent, [*_elsewhere(space, like), *like]))
        whole, *timed = self.clock(models)
        savings: dict[str, Timing] = {}
        for layers, timing in zip(shapes.values(), timed, strict=True):
            saving = (whole - timing).scaled(1 / len(layers), 1 / len(layers))
            savings |= {a.key: saving for of_layer in layers.values() for a in of_layer}
        times = as_times(space.alternatives, savings, whole, f"{platform.machine()} CPU, vLLM", self.workload)
        solutions = trial_solutions(times, space.alternatives, space.costs, checks)
        again, *children = self.clock([parent, *(child_blocks(parent, solution) for solution in solutions)])
        for solution, child in zip(solutions, children, strict=True):
            parts = times.whole(a.key for a in solution)
            times = times.checked(Check("made-up choice", self.share(solution), parts, child, again))
        return times

    def share(self, solution: Sequence[Alternative]) -> float:
        """Parameters of a child as a share of the parent's."""
        costs = self.space.costs
        parameters = costs.fixed["parameters"] + sum(costs.by_key[a.key]["parameters"] for a in solution)
        return float(parameters / costs.parent["parameters"])

    def clock(self, models: Sequence[Sequence[BlockConfig]]) -> list[Timing]:
        """Seconds of models in vLLM, one after another in one process."""
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary, str(i)) for i in range(len(models))]
            for folder, blocks in zip(folders, models, strict=True):
                self.write(folder, blocks)
            task: dict[str, Any] = {"folders": [str(f) for f in folders], "dtype": self.dtype}
            task |= {"prompt": self.workload.prompt, "generate": self.workload.generated}
            process = subprocess.Popen(
                [self.python, str(CLOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(task))
            process.stdin.close()
            times = []
            for line in process.stdout:
                if line.startswith("["):
                    times.append(Timing(*json.loads(line)))
                    print(f"{len(times)} of {len(models)}: {times[-1]}", flush=True)
            if process.wait() or len(times) < len(models):
                raise SystemExit(f"vLLM ended with {process.returncode} after {len(times)} of {len(models)} models.")
        return times

    def bench(self, blocks: Sequence[BlockConfig], tokens: int) -> tuple[float, float]:
        """Seconds of a request that generates ``tokens`` tokens, by ``vllm bench``, and its standard error."""
        with tempfile.TemporaryDirectory() as temporary:
            self.write(Path(temporary), blocks)
            out = Path(temporary, "latency.json")
            command = [
                self.python, "-c", _BENCH, "--model", temporary, "--load-format", "dummy", "--skip-tokenizer-init",
                "--disable-detokenize", "--trust-remote-code", "--enforce-eager", "--no-enable-prefix-caching",
                "--dtype", self.dtype, "--max-model-len", str(self.workload.context), "--max-num-seqs", "1",
                "--batch-size", "1", "--input-len", str(self.workload.prompt), "--output-len", str(tokens),
                "--num-iters-warmup", "1", "--num-iters", "8", "--output-json", str(out),
            ]  # fmt: skip
            subprocess.run(command, env=os.environ | _ENVIRONMENT, check=True, capture_output=True)
            seen = json.loads(out.read_text(encoding="utf-8"))["latencies"]
        # Whatever else the machine does only adds time, so the least counts.
        return min(seen), statistics.stdev(seen) / math.sqrt(len(seen))

    def write(self, folder: Path, blocks: Sequence[BlockConfig]) -> None:
        """The config of a model as ``export --to vllm`` writes it, where other numbers of query heads are filled up."""
        space = self.space
        source = Source(
            folder, space.config, space.config, space.descriptor, tuple(blocks), tuple(space.blocks), places={}
        )
        data = config_json(VLLM, source, self.names, source.num_query_heads)
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", data)
        write_text(folder / CONFIG_FILE, CONFIG_CLASS)


def _elsewhere(space: Outline, like: Sequence[Alternative]) -> list[Alternative]:
    """The parent's subblocks where a shape does not go."""
    places = {(a.layer, a.subblock) for a in like}
    return [a for a in space.alternatives if a.is_parent and (a.layer, a.subblock) not in places]


def _compared(server: _Server, times: Times, children: int, name: str) -> str:
    """The table of whole children."""
    space, generated = server.space, server.workload.generated
    curves = times.curves(space.alternatives)
    parent = times.parent(space.alternatives)
    first, whole = server.bench(space.blocks, 1), server.bench(space.blocks, generated)
    lines = [
        "# Times in vLLM, predicted and measured",
        "",
        f"Written by `python -m benchmarks.vllm_times`: {name}, {len(space.blocks)} layers, vLLM in one process on one "
        f"thread of a CPU, {server.dtype}, one request of {server.workload.prompt} tokens, {generated} written. The "
        f"parent, by `vllm bench latency`: {first[0]:.3f} ± {first[1]:.3f} s for one token, {whole[0]:.3f} ± "
        f"{whole[1]:.3f} s for all; by CPU time {parent.prefill:.3f} s and "
        f"{parent.prefill + (generated - 1) * parent.decode:.3f} s.",
        "",
        "Shares of the parent's latency; `sum` is that of the parts, `predicted` the corrected one.",
        "",
        "| parameters | one token: predicted | `vllm bench` | off by | all: sum | predicted | `vllm bench` | off by |",
        "| --- |" + " ---: |" * 7,
    ]
    for solution in trial_solutions(times, space.alternatives, space.costs, children):
        parts = times.whole(a.key for a in solution)
        corrected = Timing(*(curves[p](getattr(parts, p) / getattr(parent, p)) for p in ("prefill", "decode")))
        child = Timing(corrected.prefill * parent.prefill, corrected.decode * parent.decode)
        blocks = child_blocks(space.blocks, solution)
        one, every = server.bench(blocks, 1)[0] / first[0], server.bench(blocks, generated)[0] / whole[0]
        summed, said = (
            (t.prefill + (generated - 1) * t.decode) / (parent.prefill + (generated - 1) * parent.decode)
            for t in (parts, child)
        )
        lines.append(
            f"| {server.share(solution):.3f} | {corrected.prefill:.3f} | {one:.3f} "
            f"| {corrected.prefill / one - 1:+.1%} "
            f"| {summed:.3f} | {said:.3f} | {every:.3f} | {said / every - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
