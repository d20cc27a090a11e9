"""Two predictions for a GPU that is not here: the roofline and AIConfigurator, for ten children of an 8B parent.

    python -m benchmarks.serving --out benchmarks/results/serving.md

The parent has the config of Llama-3.1-8B or Qwen3-8B; no weights are needed. The children are what the search would
choose at ten times between the parent's and none, if scores were drawn at random. Both predictions sum over the same
alternatives under the same load. Each child that the DeciLM layout can express is also asked as a whole.

Needs ``pip install 'layersmith[serving]'``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from layersmith.costs.aiconfigurator import ask_whole, predict_served
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape
from layersmith.costs.roofline import predict
from layersmith.costs.times import Timing, costs_of
from layersmith.costs.trial_solutions import trial_solutions
from layersmith.errors import UnsupportedModel
from layersmith.library.alternative import Alternative, child_blocks
from layersmith.recipe import LibraryRecipe
from layersmith.stages.inspect import Outline, outline

CHILDREN = 10
LOADS = {"64 requests": Workload(64, 2048 + 256, 256), "one request": Workload(1, 2048 + 256, 256)}
DEVICES = {"h100_sxm": "H100", "b200_sxm": "B200"}
SERVER = "vllm"
PARENTS: dict[str, PretrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    ),
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True)
    args = options.parse_args()
    lines = [
        "# The roofline and AIConfigurator",
        "",
        f"Written by `python -m benchmarks.serving`: server {SERVER}, prompts of 2,048 tokens, 256 generated.",
        "Weights are in bfloat16. Time per token and time to first token are shares of the parent's. `whole` is",
        "AIConfigurator's answer for the whole child in the DeciLM layout, where that can express it.",
        "Nothing here was measured on a GPU.",
    ]
    for name, config in PARENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            for load, workload in LOADS.items():
                space = outline(folder, LibraryRecipe(), workload)
                for system, device in DEVICES.items():
                    lines += _table(f"{name} on {system}, {load}", space, (system, device), workload)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(title: str, space: Outline, names: tuple[str, str], workload: Workload) -> list[str]:
    """One table as lines of Markdown."""
    system, device = names
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    started = time.process_time()
    served = predict_served(system, SERVER, shape, space.alternatives, workload)
    seconds = time.process_time() - started
    roofline = predict(device, shape, space.alternatives, space.costs, workload)
    parent = served.parent(space.alternatives)
    of_parent = roofline.parent(space.alternatives)
    lines = [
        "", f"## {title}", "",
        f"The parent: AIConfigurator {_said(parent)}; roofline {_said(of_parent)}. "
        f"Asking took {seconds:.0f} CPU seconds.", "",
        "| child, parameters | time per token | roofline | whole | throughput | roofline "
        "| time to first token | roofline | whole |",
        "| --- |" + " ---: |" * 8,
    ]  # fmt: skip
    for solution in trial_solutions(served, space.alternatives, space.costs, CHILDREN):
        parameters = space.costs.fixed["parameters"] + sum(space.costs.by_key[a.key]["parameters"] for a in solution)
        child, flat = (times.whole(a.key for a in solution) for times in (served, roofline))
        whole = _whole(shape, solution, system, workload)
        faster = [_throughput(p, workload) / _throughput(c, workload) for c, p in ((child, parent), (flat, of_parent))]
        lines.append(
            f"| {parameters / space.costs.parent['parameters']:.3f} | {child.decode / parent.decode:.3f} "
            f"| {flat.decode / of_parent.decode:.3f} | {_share(whole.decode if whole else None, parent.decode)} "
            f"| {faster[0]:.2f}x | {faster[1]:.2f}x | {child.prefill / parent.prefill:.3f} "
            f"| {flat.prefill / of_parent.prefill:.3f} | {_share(whole.prefill if whole else None, parent.prefill)} |"
        )
    return lines


def _whole(shape: ModelShape, solution: list[Alternative], system: str, workload: Workload) -> Timing | None:
    """A Llama child asked as a whole; None if the layout cannot express it."""
    if type(shape.config) is not LlamaConfig:
        return None
    try:
        return ask_whole(system, SERVER, shape, child_blocks(shape.blocks, solution), workload)
    except UnsupportedModel:
        return None


def _share(of: float | None, whole: float) -> str:
    return "" if of is None else f"{of / whole:.3f}"


def _throughput(timing: Timing, workload: Workload) -> float:
    return costs_of(timing, workload)["token_seconds"]


def _said(timing: Timing) -> str:
    return f"{timing.prefill * 1e3:.0f} ms to the first token, {timing.decode * 1e3:.2f} ms a token"


if __name__ == "__main__":
    main()
