"""Global distillation: its speed and memory beside a plain Trainer's, and children of one size made in different ways.

    python -m benchmarks.distillation_global speed PARENT --text TEXT
    python -m benchmarks.distillation_global table PARENT RUN --tokens 200000 --budgets 0.8 0.7 0.5 --seeds 0 1 2

``speed``: the same two models, rows, loss and optimizer, a process each; what Trainer's users would write is KL and
cosine distance of whole logits and hidden states. ``table``: RUN is a finished run of ``layersmith compress``; its
library answers the budgets, and every model learns from the parent on the same rows in the same order:

    ours                  what the search chose
    uniform               every FFN as narrow as the budget asks, channels ranked the same way
    layers dropped        whole layers left out, those first whose removal costs least
    from scratch          the layers that the search chose, with fresh random weights
    peer                  a checkpoint of another library for this parent, given with --peer

Prints tables in Markdown, and with --out writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

import layersmith
from layersmith.data import evaluation_rows, load_tokenizer
from layersmith.distillation.trainer import _together, RowOrder, Steps, train, training_arguments
from layersmith.parent import Parent, load_parent
from layersmith.recipe import DistillationRecipe
from layersmith.runtime import Runtime

# ---------------------------------------------------------------------------------------------- speed


class PlainTrainer(Trainer):
    """The same loss as one would write it: whole logits, whole log-probabilities."""

    def __init__(self, parent: PreTrainedModel, hidden: float, **given: Any):
        super().__init__(**given)
        self.parent, self.hidden = parent, hidden

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        more = {"use_cache": False, "output_hidden_states": bool(self.hidden)}
        with torch.no_grad():
            said = self.parent(input_ids=inputs["input_ids"], **more)
        own = model(input_ids=inputs["input_ids"], **more)
        log_q = own.logits.float().log_softmax(-1).flatten(0, 1)
        log_p = said.logits.float().log_softmax(-1).flatten(0, 1)
        loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        if self.hidden:
            pairs = list(zip(own.hidden_states[1:], said.hidden_states[1:], strict=True))
            distances = [
                1 - torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in pairs
            ]
            loss = loss + self.hidden * torch.stack(distances).mean()
        return loss


def measure(which: str, parent_path: str, child_path: str, text: str, recipe: DistillationRecipe, tokens: int) -> dict:
    """CPU seconds and memory of one training; run in a process of its own."""
    torch.set_num_threads(1)
    parent = load_parent(parent_path, Runtime.detect("cpu"))
    child = layersmith.load(child_path, dtype=torch.float32)
    rows = evaluation_rows(text, load_tokenizer(parent_path), sequence_length=256, sequences=tokens // 256, seed=0)
    steps = Steps.of(recipe, tokens, rows.shape[1])
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def run(count: int) -> None:
            some = rows[: count * steps.rows]
            if which == "ours":
                train(parent, child, some, recipe, tokens=some.numel(), seed=0, folder=place, curve=place / "c", name="")
                return
            own = Steps.of(recipe, some.numel(), rows.shape[1])
            arguments = training_arguments(recipe, own, parent.runtime, 1024, 0, place)
            order = RowOrder(some, len(some), 0)
            child.train().requires_grad_(True)
            PlainTrainer(
                parent.model, recipe.hidden, model=child, args=arguments, data_collator=_together, train_dataset=order
            ).train()

        before = _resident()
        run(1)
        started = time.process_time()
        run(steps.count)
        seconds.append(time.process_time() - started)
    return {
        "which": which, "tokens": steps.count * steps.tokens, "cpu_seconds": seconds[0],
        "tokens_per_cpu_second": steps.count * steps.tokens / seconds[0],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
    }  # fmt: skip


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    recipe = DistillationRecipe(
        batch_tokens=args.device_tokens, device_tokens=args.device_tokens, optimizer="adamw", hidden=args.hidden
    )
    rows = []
    for turn in range(args.turns):
        for which in ("plain", "ours") if turn % 2 == 0 else ("ours", "plain"):
            given = (which, args.parent, args.child or args.parent, args.text, recipe, args.tokens)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, given))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("speed")
    own.add_argument("parent")
    own.add_argument("--child")
    own.add_argument("--text", required=True)
    own.add_argument("--tokens", type=int, default=16384)
    own.add_argument("--device-tokens", type=int, default=4096)
    own.add_argument("--hidden", type=float, default=1.0)
    own.add_argument("--turns", type=int, default=2)
    own.set_defaults(run=speed)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
