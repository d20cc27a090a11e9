"""What a child recovers: each step of distillation at budgets, beside models that were made smaller in other ways.

    python -m benchmarks.recovery [PARENT --text TEXT --held-out TEXT] --work FOLDER --out FILE.jsonl
        [--budgets 0.8 0.7 0.5] [--seeds 3] [--tokens 32768] [--peer-python PYTHON --peer-driver FILE]

Without PARENT it is the demo's model and text. For every seed the documents are dealt anew. Models of a budget:

    (a) pruned        the search over alternatives as they were pruned
    (b) closed form   over alternatives whose last projections were refitted, scored so
    (c) local         over alternatives that were trained, scored so, and refined by running whole children on the
                      scoring rows; then each layer's chosen subblocks trained together
    uniform           every FFN as narrow as the budget asks, channels ranked the same way
    layers dropped    whole layers removed, those first whose two no-ops score least
    from scratch      the layers of (a) with random weights
    puzzletron        that library's child for the same data, budget and alternatives, if its environment and a driver
                      (``puzzletron_on_cpu.py``) are given

The last four and (c) then learn from the parent, on the same rows in the same order; (c) so distilled is (d). With
``--distil-all`` (a) and (b) do too. FILE.jsonl has a line for every model that is done, and what is there is not done
again; FILE.md the table of all of them. The search space is what both libraries know: FFN widths, KV heads and no-ops;
``--whole-space`` has all kinds of alternatives, and no puzzletron. The solution of (a) and (b) is the integer
program's, with ``--refine-passes 0`` that of (c) too. Tables that differ in settings of (c) alone share the other
lines. One thread, float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import PreTrainedModel

import layersmith
from benchmarks.distillation import Libraries, cost_table, dropped, libraries
from benchmarks.distillation_global import uniform
from layersmith.costs.budget import parse_budget
from layersmith.costs.table import CostTable
from layersmith.data.splits import TokenSplits, load_tokenizer, prepare
from layersmith.demo.job import MODEL, split_library
from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.train import GlobalSetup, TrainingRows, in_float32, train
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library, read_library, write_library
from layersmith.recipe import (
    DataRecipe,
    DistillationRecipe,
    LibraryRecipe,
    LocalDistillationRecipe,
    Recipe,
    SearchRecipe,
)
from layersmith.run.artifacts import fingerprint, read_json, write_json
from layersmith.run.folder import versions
from layersmith.run.journal import Recording
from layersmith.run.runtime import Runtime
from layersmith.search.problem import SearchProblem
from layersmith.stages.refine import RefineSetup, refined_solution

METRICS = {"loss": "loss above the parent's", "kl": "KL", "top_1": "top-1"}
STEPS = ("(a) pruned", "(b) closed form", "(c) local")
OURS = STEPS[-1]
SCRATCH = "from scratch"
OF_OURS = ("local_tokens", "pair_tokens", "pairs_on", "batch_tokens", "refine_passes")


# ---------------------------------------------------------------------------------------------- judging


class Judge:
    """Compares models with the parent on evaluation rows ``[N, T]``; what the parent says on them is kept."""

    def __init__(self, parent: PreTrainedModel, rows: torch.Tensor):
        self.rows = rows
        self.said = [_log_probabilities(parent, batch) for batch in rows.split(8)]
        self.parent_loss = torch.cat([_losses(logits, b) for logits, b in zip(self.said, rows.split(8), strict=True)])

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Loss above the parent's, KL in nats a token, and how often the parent's next token is the model's first."""
        model.eval()
        loss, kl, top = [], [], []
        for batch, log_p in zip(self.rows.split(8), self.said, strict=True):
            log_q = _log_probabilities(model, batch)
            loss.append(_losses(log_q, batch))
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(-1))
            top.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean(-1))
        by_metric = {"loss": torch.cat(loss) - self.parent_loss, "kl": torch.cat(kl), "top_1": torch.cat(top)}
        values = {name: float(metric.double().mean()) for name, metric in by_metric.items()}
        return values | {
            f"{name}_error": float(metric.double().std() / len(metric) ** 0.5) for name, metric in by_metric.items()
        }


@torch.inference_mode()
def _log_probabilities(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)


def _losses(log_q: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return -log_q[:, :-1].gather(-1, batch[:, 1:, None])[..., 0].mean(-1)


# ---------------------------------------------------------------------------------------------- models


@dataclasses.dataclass
class Seed:
    """What is made once a seed."""

    seed: int
    parent: Parent
    tokens: TokenSplits
    made: Libraries
    costs: CostTable
    judge: Judge


def prepared(parent: Parent, args: argparse.Namespace, seed: int) -> Seed:
    """Rows, libraries and scores of a seed; libraries that are in the work folder are read from there."""
    torch.manual_seed(seed)
    most = max(args.tokens, args.local_tokens * 25 // 24 + args.length)
    tokens = prepare(
        args.text,
        load_tokenizer(parent.path),
        DataRecipe(
            sequence_length=args.length,
            calibration_sequences=64,
            scoring_sequences=args.scoring_rows,
            evaluation_sequences=args.evaluation_rows,
            training_sequences=most // args.length + 1,
            evaluation_source=args.held_out,
        ),
        seed,
    )
    space = LibraryRecipe() if args.whole_space else LibraryRecipe(
        ffn_fractions=(0.75, 0.5, 0.25), kv_methods=("contribution",), query_heads=False, windows=False, linear=(),
    )  # fmt: skip
    shas = {name: tokens.description["sha256"][name] for name in ("calibration", "scoring")}
    inputs = fingerprint([parent.identity, shas, args.local_tokens, repr(space), versions()])
    place = args.work / f"seed-{seed}"
    said = place / "libraries.json"
    names = ("pruned", "reconstructed", "taught")
    if said.is_file() and read_json(said)["inputs"] == inputs:
        kept = read_json(said)
        saved = {name: read_library(place / name, parent) for name in names}
        made = Libraries(**saved, scores=kept["scores"], notes=kept["notes"], cpu_seconds=kept["cpu_seconds"])
    else:
        local = argparse.Namespace(batch_tokens=args.batch_tokens, tokens=args.local_tokens)
        made = libraries(parent, tokens, local, seed, space)
        for name in names:
            write_library(getattr(made, name), place / name)
        kept = {"inputs": inputs, "scores": made.scores, "notes": made.notes, "cpu_seconds": made.cpu_seconds}
        write_json(said, kept)
        print(json.dumps({"seed": seed, "cpu_seconds": made.cpu_seconds, "notes": made.notes}), flush=True)
    return Seed(seed, parent, tokens, made, cost_table(parent, made.pruned), Judge(parent.model, tokens.evaluation))


def chosen_for(
    of: Seed, row: str, budget: float, refine_passes: float = 0.0, journal: Path | None = None
) -> tuple[Alternative, ...]:
    """What the search takes from a step's library; what refinement runs is kept in a journal."""
    name = ("pruned", "reconstructed", "taught")[STEPS.index(row)]
    library: Library = getattr(of.made, name)
    recipe = Recipe(search=SearchRecipe(refine_passes=refine_passes))
    limit = parse_budget(params=str(budget)).limits
    problem = SearchProblem(
        library.alternatives, of.made.scores[name], of.costs, limit, recipe.search, of.parent.blocks
    )
    solution = problem.best()
    if refine_passes:
        inputs = fingerprint([library.identity, of.made.scores[name], solution.to_dict(), refine_passes])
        setup = RefineSetup(library, of.tokens.scoring, recipe.search, recipe.scoring, recipe.seed)
        refined = refined_solution(problem, solution, setup, Recording(journal, inputs))
        print(json.dumps({"seed": of.seed, "budget": budget, "row": row, "refined": refined.measured}), flush=True)
        solution = refined.solution
    return solution.alternatives


def models(of: Seed, budget: float, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every row, and what makes its model with weights of its own, or None where there is none."""
    limit = parse_budget(params=str(budget)).limits

    def taught() -> PreTrainedModel:
        recipe = LocalDistillationRecipe(
            coupled_tokens=args.pair_tokens, coupled_on=args.pairs_on, batch_tokens=args.batch_tokens
        )  # fmt: skip
        library, place = of.made.taught, args.work / f"seed-{of.seed}"
        chosen = chosen_for(of, OURS, budget, args.refine_passes, place / f"refined-{budget}")
        inputs = fingerprint([library.identity, [a.key for a in chosen], repr(recipe), versions()])
        work = place / f"pairs-{inputs[:16]}"
        setup = TrainingSetup(recipe, seed=of.seed, folder=work, inputs=inputs)
        both = distill_jointly(library, chosen, of.tokens.calibration, of.tokens.training, setup)
        return in_float32(both.compose(chosen))

    def narrow() -> PreTrainedModel | None:
        return uniform(of.parent, Recipe(), limit.resolve(of.costs.parent)["parameters"], of.tokens.calibration)

    def scratch() -> PreTrainedModel:
        torch.manual_seed(of.seed)
        blocks = of.made.pruned.blocks(chosen_for(of, STEPS[0], budget))
        return layersmith.build(of.parent.config, blocks, dtype=torch.float32)

    yield OURS, taught
    yield STEPS[0], lambda: in_float32(of.made.pruned.compose(chosen_for(of, STEPS[0], budget)))
    yield STEPS[1], lambda: in_float32(of.made.reconstructed.compose(chosen_for(of, STEPS[1], budget)))
    yield "uniform", narrow
    gone = dropped(of.made.pruned, of.costs, of.made.scores["pruned"], budget)
    yield "layers dropped", lambda: in_float32(of.made.pruned.compose(gone))
    yield SCRATCH, scratch
    yield "puzzletron", lambda: peer(of, budget, args)


def peer(of: Seed, budget: float, args: argparse.Namespace) -> PreTrainedModel | None:
    """Puzzletron's child for the seed's calibration and scoring text; None where it cannot be had."""
    if args.whole_space or of.seed >= args.peer_seeds or not (args.peer_python and args.peer_driver):
        return None
    work = (args.work / f"peer-{of.seed}").resolve()
    block = of.parent.config
    text = work.with_suffix(".txt")
    tokenizer = load_tokenizer(of.parent.path)
    # A fifth of the text is what its driver scores on.
    rows = torch.cat([of.tokens.scoring, of.tokens.calibration, of.tokens.training[:64]])
    text.write_text("".join(tokenizer.batch_decode(rows)), encoding="utf-8")
    widths = ",".join(str(block.intermediate_size * n // 4) for n in (3, 2, 1))
    heads = ",".join(str(block.num_key_value_heads // n) for n in (2, 4))
    common = [
        args.peer_python, args.peer_driver, "--hf", of.parent.path, "--data", str(text), "--work", str(work),
        "--dtype", "float32", "--threads", "1", "--ffn", widths, "--kv", heads, "--act-samples", "64",
        "--score-samples", str(args.peer_rows), "--mbs", "4", "--block-size", str(args.length),
        "--realize-samples", "2", "--objective", args.peer_objective, "--descriptor", args.peer_descriptor,
    ]  # fmt: skip

    def run(*more: str) -> dict[str, Any]:
        # An environment of its own: nothing of this one's.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([*common, *more], check=True, capture_output=True, env=environment)
        info: dict[str, Any] = json.loads((work / "timing.json").read_text())["info"]
        return info

    if not (work / "single_sequence_replacement_solutions.json").is_file():
        run("--fresh", "--stages", "convert,act,prune,library,stats")
    if not (work / "scored").is_file():  # it goes on with what it has scored
        run("--stages", "score")
        (work / "scored").write_text("")
    whole = of.costs.parent["parameters"]
    theirs = run("--stages", "mip")["teacher_params"]  # it counts tied embeddings twice, so its fraction is another
    ratio = (budget * whole + theirs - whole) / theirs
    solutions = run("--stages", "mip,realize", "--params-ratio", str(ratio))["solutions"]
    folder = next(Path(solutions[-1]).parent.rglob("solution_0/config.json")).parent
    return layersmith.load(folder, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- the work


def done_before(out: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off is none."""
    records = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", default=str(MODEL))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=Path, help="text to evaluate on; default: documents of --text")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="only rows whose names begin so")
    parser.add_argument("--tokens", type=int, default=32_768, help="of global distillation")
    parser.add_argument("--step-tokens", type=int, default=1024, help="of one of its steps")
    parser.add_argument("--learning-rate", type=float, help="of it; default: the recipe's")
    parser.add_argument("--distil-rows", type=int, help="training rows that it takes its own from; default: all")
    parser.add_argument("--eval-every", type=int, default=0, help="of its steps: the loss on scoring rows, for a curve")
    parser.add_argument("--distil-all", action="store_true", help="(a) and (b) too")
    local, search = LocalDistillationRecipe(tokens=131_072, coupled_tokens=131_072), SearchRecipe()
    parser.add_argument(
        "--local-tokens", type=int, default=local.tokens, help="of local distillation, for each alternative"
    )
    parser.add_argument(
        "--pair-tokens", type=int, default=local.coupled_tokens, help="for what was chosen for a layer, together"
    )
    parser.add_argument("--pairs-on", choices=("child", "parent"), default=local.coupled_on, help="whose activations")
    parser.add_argument("--refine-passes", type=float, default=search.refine_passes, help="of the search; 0: none")
    parser.add_argument("--batch-tokens", type=int, default=local.batch_tokens)
    parser.add_argument("--whole-space", action="store_true", help="all kinds of alternatives")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scoring-rows", type=int, default=24)
    parser.add_argument("--evaluation-rows", type=int, default=48)
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-driver")
    parser.add_argument("--peer-descriptor", default="llama")
    parser.add_argument("--peer-objective", default="metrics.kl_div")
    parser.add_argument("--peer-rows", type=int, default=24, help="on which puzzletron scores")
    parser.add_argument("--peer-seeds", type=int, default=3, help="for the first seeds only")
    parser.add_argument("--work", type=Path, required=True, help="folder for libraries")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.text is None:
        args.text, args.held_out = split_library(args.work / "text")

    parent = load_parent(args.parent, Runtime(torch.device("cpu"), torch.float32))
    settings = DistillationRecipe(
        tokens=args.tokens, batch_tokens=args.step_tokens, learning_rate=args.learning_rate, eval_every=args.eval_every
    )  # fmt: skip
    of_ours = {name: getattr(args, name) for name in OF_OURS}
    common = {name: getattr(args, name) for name in ("whole_space", "length", "scoring_rows", "evaluation_rows")} | {
        "parent": Path(args.parent).name, "parameters_of_parent": sum(p.numel() for p in parent.model.parameters())
    }  # fmt: skip
    training = {"tokens": args.tokens, "step_tokens": args.step_tokens, "distil_rows": args.distil_rows}
    training["learning_rate"] = settings.rate(parent.language_config.hidden_size)
    seeds: dict[int, Seed] = {}
    for budget in args.budgets:
        for seed in range(args.seeds):
            before = done_before(args.out)
            for name, make in models(_of(seeds, seed, parent, args), budget, args):
                key = common | {"budget": budget, "seed": seed, "row": name}
                key |= of_ours if name == OURS else {}
                key |= training if name not in STEPS[:2] or args.distil_all else {"tokens": 0}
                known = any(all(line.get(k) == v for k, v in key.items()) for line in before)
                if known or (args.only and not name.startswith(tuple(args.only))):
                    continue
                if (record := one(seeds[seed], make, key, settings)) is not None:
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    print(json.dumps(record), flush=True)
                    args.out.with_suffix(".md").write_text(table(done_before(args.out)))
    print(table(done_before(args.out)))


def _of(seeds: dict[int, Seed], seed: int, parent: Parent, args: argparse.Namespace) -> Seed:
    if seed not in seeds:
        seeds[seed] = prepared(parent, args, seed)
    return seeds[seed]


def one(of: Seed, make: Callable[[], Any], key: dict[str, Any], settings: DistillationRecipe) -> dict[str, Any] | None:
    """A line: a model as it was made, and after global distillation."""
    started = time.process_time()
    model = make()
    if model is None:
        return None
    record = key | {"parameters": sum(p.numel() for p in model.parameters())}
    record |= {"parent_loss": float(of.judge.parent_loss.double().mean()), "cpu_seconds_made": _since(started)}
    record["before"] = of.judge(model)
    if key["tokens"]:
        started = time.process_time()
        rows = of.tokens.training[: key["distil_rows"]]
        with tempfile.TemporaryDirectory() as folder:
            setup = GlobalSetup(
                recipe=settings,
                tokens=settings.tokens,
                seed=of.seed,
                folder=Path(folder),
                curve=Path(folder) / "log.json",
                name=key["row"],
            )
            validation = of.tokens.scoring if settings.eval_every else None
            trained = train(of.parent, model, TrainingRows(rows, validation), setup)
        if settings.eval_every:
            record["loss_on_scoring_rows"] = trained.curve["validation"]
        record["cpu_seconds_distilled"] = _since(started)
        record["after"] = of.judge(model)
    return record | {"versions": versions(), "machine": platform.processor() or platform.machine()}


def _since(started: float) -> float:
    return round(time.process_time() - started, 1)


# ---------------------------------------------------------------------------------------------- the table


def table(lines: list[dict[str, Any]]) -> str:
    """All lines as Markdown, one table for each way in which they were trained."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    of_all = ("parent", "whole_space", "evaluation_rows", "length")
    of_kind = (*of_all, *OF_OURS)
    for kind in dict.fromkeys(tuple(line[name] for name in of_kind) for line in lines if line["row"] == OURS):
        ours = [x for x in lines if x["row"] == OURS and tuple(x[name] for name in of_kind) == kind]
        others = [x for x in lines if x["row"] != OURS and tuple(x[name] for name in of_all) == kind[: len(of_all)]]
        of_training = ("tokens", "step_tokens", "learning_rate", "distil_rows")
        for training in dict.fromkeys(tuple(x[name] for name in of_training) for x in ours):
            same = [x for x in ours + others if not x["tokens"] or tuple(x[name] for name in of_training) == training]
            groups[(*kind, *training)] = same
    return "\n".join(part for group in groups.values() for part in _part(group))


def _part(lines: list[dict[str, Any]]) -> Iterator[str]:
    trained = next(line for line in lines if line["row"] == OURS)
    whose = "the child's own activations" if trained["pairs_on"] == "child" else "the parent's activations"
    refined = f"refined with {trained['refine_passes']:g} passes" if trained["refine_passes"] else "not refined"
    space = "all kinds of alternatives" if trained["whole_space"] else "FFN widths, KV heads and no-ops"
    yield (
        f"# What children of {trained['parent']} recover ({trained['parameters_of_parent'] / 1e6:.2f}M parameters)\n\n"
        f"{space}; local distillation of every alternative on {trained['local_tokens']:,} tokens, of pairs on "
        f"{trained['pair_tokens']:,}, on {whose}; solutions of (c) {refined}; global distillation on "
        f"{trained['tokens']:,} tokens in steps of {trained['step_tokens']:,}, learning rate "
        f"{trained['learning_rate']:.2g}; evaluated on {trained['evaluation_rows'] * trained['length']:,} tokens a "
        "seed. One thread, float32, "
        f"{', '.join(f'{k} {v}' for k, v in trained['versions'].items())}. Means over seeds ± their standard "
        "deviation; for one seed ± the standard error over rows.\n\n"
        f"`python -m benchmarks.recovery {_options(trained)}`\n"
    )
    heads = [*METRICS.values(), *(f"{name}, distilled" for name in METRICS.values())]
    yield f"| budget | | seeds | parameters | {' | '.join(heads)} |\n| --- | --- | --- | --- |" + " --- |" * len(heads)
    order = [*STEPS, "uniform", "layers dropped", SCRATCH, "puzzletron"]
    for budget in sorted({line["budget"] for line in lines}, reverse=True):
        for row in order:
            of_row = [line for line in lines if (line["budget"], line["row"]) == (budget, row)]
            if of_row:
                name = f"{row}; distilled: (d)" if row == OURS else row
                cells = [_cell(of_row, when, metric) for when in ("before", "after") for metric in METRICS]
                size = mean(line["parameters"] for line in of_row) / 1e6
                yield f"| {budget} | {name} | {len(_last(of_row))} | {size:.2f}M | {' | '.join(cells)} |"
    yield ""
    for budget in sorted({line["budget"] for line in lines}, reverse=True):
        yield from _verdicts([line for line in lines if line["budget"] == budget], budget)
    yield ""


def _options(line: dict[str, Any]) -> str:
    """What a line was made with, as it is typed."""
    names = (
        "local_tokens", "pair_tokens", "pairs_on", "refine_passes", "evaluation_rows", "scoring_rows", "length",
        "tokens", "step_tokens", *["distil_rows"] * (line["distil_rows"] is not None),
    )  # fmt: skip
    options = [f"--{name.replace('_', '-')} {line[name]}" for name in names]
    return " ".join(
        [*options, f"--learning-rate {line['learning_rate']:.3g}", *["--whole-space"] * line["whole_space"]]
    )


def _last(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By seed; of a model that was distilled and not, the line that has more."""
    return {line["seed"]: line for line in sorted(lines, key=lambda line: line["tokens"])}


def _cell(lines: list[dict[str, Any]], when: str, metric: str) -> str:
    values = [line[when] for line in _last(lines).values() if when in line]
    if not values:
        return ""
    noise = stdev(x[metric] for x in values) if len(values) > 1 else values[0][f"{metric}_error"]
    return f"{mean(x[metric] for x in values):.4f} ± {noise:.4f}"


def _verdicts(lines: list[dict[str, Any]], budget: float) -> Iterator[str]:
    by_row = {row: _last([line for line in lines if line["row"] == row]) for row in {line["row"] for line in lines}}
    ours = by_row.get(OURS, {})
    if both := [s for s in by_row.get(STEPS[0], {}) if "after" in ours.get(s, {})]:
        # Of means: where little is lost, that of one seed may be next to nothing.
        before, after = (
            [of[s][when]["loss"] for s in both] for of, when in ((by_row[STEPS[0]], "before"), (ours, "after"))
        )
        yield f"* {budget}: (d) closes {1 - mean(after) / mean(before):.1%} of the loss between (a) and the parent."
    for row in sorted(set(by_row) - set(STEPS)):
        if both := [s for s in by_row[row] if "after" in ours.get(s, {}) and "after" in by_row[row][s]]:
            before = [ours[s]["before"]["kl"] / by_row[row][s]["before"]["kl"] for s in both]
            gaps = [by_row[row][s]["after"]["loss"] - ours[s]["after"]["loss"] for s in both]
            if row == SCRATCH:
                yield f"* {budget}, {row}: distilled, it loses {_spread(gaps, '.4f')} nats a token more than (d)."
                continue
            yield (
                f"* {budget}, {row}: (c) has {_spread(before, '.2f')} times its KL; both distilled, it loses "
                f"{_spread(gaps, '.4f')} nats a token more than (d)."
            )


def _spread(values: list[float], form: str) -> str:
    """The mean, and the range over seeds."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}} over {len(values)} seeds)"


if __name__ == "__main__":
    main()
