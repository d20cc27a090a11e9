"""Global distillation: its speed and memory beside a plain Trainer's, and children of one size made in different ways.

    python -m benchmarks.distillation_global speed PARENT --text TEXT
    python -m benchmarks.distillation_global table RUN --tokens 400000 --budgets 0.8 0.7 0.5 --seeds 0 1 2

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
import dataclasses
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

import layersmith
from layersmith.costs.budget import Budget, Limits, Workload
from layersmith.data.splits import evaluation_rows, load_tokenizer
from layersmith.data.training import TrainingSource, training_rows
from layersmith.distillation.arguments import training_arguments
from layersmith.distillation.steps import RowOrder, Steps, collate
from layersmith.distillation.train import GlobalSetup, TrainingRows, in_float32, train
from layersmith.evaluation.compare import compare
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import DataRecipe, DistillationRecipe, Recipe
from layersmith.run.artifacts import read_tensors, write_json
from layersmith.run.folder import Run, versions
from layersmith.run.runtime import Runtime
from layersmith.scoring.score import losses
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution
from layersmith.stages.costs import cost_table
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES

# ---------------------------------------------------------------------------------------------- speed


class PlainTrainer(Trainer):
    """The same loss as one would write it: whole logits, whole log-probabilities."""

    def __init__(self, parent: PreTrainedModel, hidden: float, **given: Any):
        super().__init__(**given)
        self.parent, self.hidden = parent, hidden

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        more = {"use_cache": False, "output_hidden_states": bool(self.hidden)}
        with torch.no_grad():
            said = self.parent(input_ids=inputs["input_ids"], **more)
        output = model(input_ids=inputs["input_ids"], **more)
        log_q = output.logits.float().log_softmax(-1).flatten(0, 1)
        log_p = said.logits.float().log_softmax(-1).flatten(0, 1)
        loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        if self.hidden:
            pairs = list(zip(output.hidden_states[1:], said.hidden_states[1:], strict=True))
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
    wanted = DataRecipe(sequence_length=256, evaluation_sequences=tokens // 256)
    rows = evaluation_rows(text, load_tokenizer(parent_path), wanted, seed=0)
    steps = Steps.of(recipe, tokens, rows.shape[1])
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def run(count: int) -> None:
            some = rows[: count * steps.rows]
            if which == "ours":
                setup = GlobalSetup(
                    recipe=recipe, tokens=some.numel(), seed=0, folder=place, curve=place / "c", name=""
                )
                train(parent, child, TrainingRows(some), setup)
                return
            few_steps = Steps.of(recipe, some.numel(), rows.shape[1])
            arguments = training_arguments(recipe, few_steps, parent.runtime, 1024, 0, place)
            order = RowOrder(some, len(some), 0)
            child.train().requires_grad_(True)
            PlainTrainer(
                parent.model, recipe.hidden, model=child, args=arguments, data_collator=collate, train_dataset=order
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


# ---------------------------------------------------------------------------------------------- table


def models(
    library: Library,
    scores: Mapping[str, float],
    solution: Solution,
    budget: Limits,
    recipe: Recipe,
    rows: torch.Tensor,
    peer: str | None,
    seed: int,
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Every row's name and model, before distillation, in float32 with weights of its own."""
    parent = library.parent
    yield "ours", in_float32(library.compose(solution.alternatives))
    limit = budget.resolve(solution.parent_costs)["parameters"]
    narrow = uniform(parent, recipe, limit, rows)
    if narrow is not None:
        yield "uniform", narrow
    yield "layers dropped", in_float32(library.compose(without_layers(library, scores, solution, limit)))
    torch.manual_seed(seed)
    yield "from scratch", layersmith.build(parent.config, library.blocks(solution.alternatives), dtype=torch.float32)
    if peer is not None:
        yield "peer", layersmith.load(peer, dtype=torch.float32)


def uniform(parent: Parent, recipe: Recipe, limit: int, rows: torch.Tensor) -> PreTrainedModel | None:
    """The parent with the widest FFNs, equal in all layers, that a number of parameters allows; None if none does."""
    width = parent.blocks[0].ffn.intermediate_size
    assert width is not None
    outside = sum(p.numel() for p in parent.model.parameters())
    of_ffn = sum(p.numel() for layer in parent.layers for p in layer.mlp.parameters())
    kept_width = int(width * (1 - (outside - limit) / of_ffn))
    if kept_width < 1:
        return None
    only = dataclasses.replace(
        recipe.library, ffn_sizes=(kept_width,), ffn_multiple=1, kv_heads=(), linear=(), no_op=(), query_heads=False,
        windows=False, mixers=False, keep_layers=(),
    )  # fmt: skip
    library = build_library(parent, only, survey(parent, only), Calibration(rows, 8))
    chosen = [a for a in library.alternatives if a.kind == "ffn_width"]
    kept = [a for a in library.alternatives if a.kind == "parent" and a.subblock == "attention"]
    return in_float32(library.compose([*chosen, *kept]))


def without_layers(library: Library, scores: Mapping[str, float], solution: Solution, limit: int) -> list[Alternative]:
    """Whole layers removed, in the order of what their two no-ops cost by score, until the parameters fit."""
    layers = sorted(
        range(len(library.parent.blocks)),
        key=lambda i: sum(scores[Alternative(i, s, "no_op").key] for s in ("attention", "ffn")),
    )
    left = solution.parent_costs["parameters"]
    chosen: list[Alternative] = []
    for i in layers:
        if left <= limit:
            break
        left -= sum(p.numel() for p in library.parent.layers[i].parameters())
        chosen += [Alternative(i, s, "no_op") for s in ("attention", "ffn")]
    return chosen


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    run = Run.existing(args.run_folder)
    job = job_of_run(args.run_folder)
    recipe, library = job.recipe, job.read(LIBRARY)
    parent, header = library.parent, run.header()
    scores = losses(job.read(SCORES), recipe.scoring.objective)
    held = read_tensors(run.folder / "data" / "tokens.safetensors")
    judges = held["evaluation"][: args.rows]
    settings = DistillationRecipe(tokens=args.tokens)
    tokenizer = load_tokenizer(parent.path)
    steps = Steps.of(settings, args.tokens, held["evaluation"].shape[1])
    overlap = recipe.distillation.overlap or recipe.data.overlap
    source = TrainingSource(header["data"]["source"], True, steps.count * steps.rows, overlap)
    rows, _ = training_rows(source, recipe.data, tokenizer, held, recipe.seed)
    made: list[dict[str, Any]] = []
    print("| parameters | seed | model | | loss - parent's | KL | top-1 agreement |")
    print("|---|---|---|---|---|---|---|")
    for share in args.budgets:
        budget = Budget.parse({"params": str(share)}).limits
        costs = cost_table(parent, library, Workload())
        solution = SearchProblem(library.alternatives, scores, costs, budget).best()
        for seed in args.seeds:
            for name, child in models(library, scores, solution, budget, recipe, held["calibration"], args.peer, seed):
                if args.only and name not in args.only:
                    continue
                record = {"budget": share, "seed": seed, "model": name, "tokens": steps.count * steps.tokens}
                record["parameters"] = sum(p.numel() for p in child.parameters())
                record["before"] = judged(parent, child, judges, share, seed, name, "before")
                started = time.process_time()
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder)
                    setup = GlobalSetup(
                        recipe=settings,
                        tokens=args.tokens,
                        seed=seed,
                        folder=place,
                        curve=place / "log.json",
                        name=name,
                    )
                    train(parent, child, TrainingRows(rows), setup)
                record["cpu_seconds"] = time.process_time() - started
                record["after"] = judged(parent, child, judges, share, seed, name, "distilled")
                made.append(record)
    return made


def judged(
    parent: Parent, child: PreTrainedModel, rows: torch.Tensor, share: float, seed: int, name: str, when: str
) -> dict[str, Any]:
    """Loss above the parent's, KL and agreement with their standard errors; prints a row of the table."""
    by_name = {row["metric"]: row for row in compare(parent.model, child.eval(), rows, batch_sequences=8).table()}
    loss, kl, top = (by_name[metric] for metric in ("loss", "kl_divergence", "top_1_agreement"))
    cells = [
        f"{loss['difference']:.4f} ± {loss['difference_standard_error']:.4f}",
        f"{kl['child']:.4f} ± {kl['child_standard_error']:.4f}",
        f"{top['child']:.3f} ± {top['child_standard_error']:.3f}",
    ]
    print(f"| {share} | {seed} | {name} | {when} | {' | '.join(cells)} |", flush=True)
    return {"loss": loss, "kl_divergence": kl, "top_1_agreement": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    parser_of = commands.add_parser("speed")
    parser_of.add_argument("parent")
    parser_of.add_argument("--child")
    parser_of.add_argument("--text", required=True)
    parser_of.add_argument("--tokens", type=int, default=16384)
    parser_of.add_argument("--device-tokens", type=int, default=4096)
    parser_of.add_argument("--hidden", type=float, default=1.0)
    parser_of.add_argument("--turns", type=int, default=2)
    parser_of.set_defaults(run=speed)
    parser_of = commands.add_parser("table")
    parser_of.add_argument("run_folder")
    parser_of.add_argument("--tokens", type=int, default=400_000)
    parser_of.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser_of.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser_of.add_argument("--rows", type=int, help="evaluation rows; default: all of the run's")
    parser_of.add_argument("--only", nargs="+", help="only these models")
    parser_of.add_argument("--peer", help="a checkpoint for the first budget")
    parser_of.set_defaults(run=table)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    made = args.run(args)
    if args.out:
        write_json(args.out, {"versions": versions(), "rows": made})


if __name__ == "__main__":
    main()
