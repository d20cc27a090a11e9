"""The command line. It parses, calls the pipeline, and prints."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layersmith.errors import LayersmithError, UsageError, did_you_mean
from layersmith.recipe import BATCH, CONTEXT, DataRecipe

if TYPE_CHECKING:
    from rich.console import Console

    from layersmith.run.progress import Progress

app = typer.Typer(
    help="Any Hugging Face decoder model and a budget in; a smaller model whose layers differ out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Parent = Annotated[str, typer.Argument(help="Checkpoint folder or hub name of the model to make smaller.")]
Params = Annotated[str | None, typer.Option(help="Parameters of the child: 0.7 of the parent's, or 7B.")]
ActiveParams = Annotated[str | None, typer.Option(help="Parameters that take part in a token: 0.7 or 3B.")]
Weights = Annotated[str | None, typer.Option(help="Memory of the weights: 0.7 or 10GiB.")]
KVCache = Annotated[str | None, typer.Option(help="Memory of the KV cache at --batch and --context: 0.5 or 2GiB.")]
Memory = Annotated[str | None, typer.Option(help="Weights and KV cache together: 0.7 or 10GiB.")]
TTFT = Annotated[
    str | None,
    typer.Option("--ttft", help="Time to first token, of a prompt of --context less --generate: 0.7 or 80ms."),
]
TimePerToken = Annotated[str | None, typer.Option(help="Time per token after it, of the whole batch: 0.7 or 12ms.")]
Throughput = Annotated[
    str | None, typer.Option(help="Tokens written a second, at least: 1.5x of the parent's, or 500tokens/s.")
]
Batch = Annotated[int, typer.Option(help="Sequences at once, for the KV cache and for times.")]
Context = Annotated[int, typer.Option(help="Tokens of each, for the KV cache and for times.")]
Generate = Annotated[
    int | None, typer.Option(help="Tokens of --context that the model writes; default: 128, at most half.")
]
KeepLayers = Annotated[str | None, typer.Option(help="Layers that stay as they are, e.g. 0,1,31.")]
MaxRemovedAttentions = Annotated[int | None, typer.Option(help="Maximum number of attentions to remove.")]
MaxRemovedFFNs = Annotated[int | None, typer.Option("--max-removed-ffns", help="Maximum number of FFNs to remove.")]
UniformGroups = Annotated[
    str | None, typer.Option(help="Give groups of N neighbouring layers the same shape ('all': every layer).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the recipe: section.key=value. May be repeated."),
]
TensorParallel = Annotated[int | None, typer.Option(help="Heads and widths that are left are multiples of this.")]
Refine = Annotated[
    bool | None, typer.Option("--refine/--no-refine", help="Better the solution by running whole children.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file; what it leaves out has its default.")]
Descriptor = Annotated[str | None, typer.Option(help="Descriptor of the model's family, as package.module:ClassName.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in the parent's folder.")
]


@app.command()
def compress(
    parent: Parent,
    out: Annotated[Path, typer.Argument(help="Folder of the run; the child will be in OUT/child.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, a folder of them, or a hub dataset.")],
    eval_data: Annotated[str | None, typer.Option(help="Evaluate on this instead of held-out documents.")] = None,
    params: Params = None,
    active_params: ActiveParams = None,
    weights: Weights = None,
    kv_cache: KVCache = None,
    memory: Memory = None,
    ttft: TTFT = None,
    time_per_token: TimePerToken = None,
    throughput: Throughput = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Random seed (overrides the recipe).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; goes before the recipe's.")] = None,
    scoring: Annotated[
        str | None, typer.Option(help="auto, exact or second_order: how alternatives are scored; before the recipe's.")
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(help="auto, never or always: read a layer at a time from the disk; goes before the recipe's."),
    ] = None,
    distill: Annotated[
        int | None, typer.Option(help="Then distil the parent into the child on so many tokens; before the recipe's.")
    ] = None,
    finalists: Annotated[int | None, typer.Option(help="Solutions that --distill tries first.")] = None,
    keep_layers: KeepLayers = None,
    max_removed_attentions: MaxRemovedAttentions = None,
    max_removed_ffns: MaxRemovedFFNs = None,
    uniform_groups: UniformGroups = None,
    tensor_parallel: TensorParallel = None,
    refine: Refine = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    until: Annotated[
        str | None,
        typer.Option(
            help="Stop after: costs, data, library, scores, settled, frontier, refine, solution, pairs, child, "
            "evaluation or clock."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what will be done and what can be reached.")] = False,
) -> None:
    """Make a smaller model of PARENT for a budget."""
    from layersmith.costs.budget import parse_budget
    from layersmith.recipe import Recipe

    chosen = Recipe.read(recipe).with_settings(settings or ())
    chosen = _with_options(chosen, seed, device, eval_data, trust_remote_code, scoring, stream, distill, finalists)
    rules = _with_rules(
        chosen.search, keep_layers, max_removed_attentions, max_removed_ffns, uniform_groups, tensor_parallel, refine
    )
    chosen = dataclasses.replace(chosen, search=rules)
    budget = parse_budget(
        params=params, active_params=active_params, weights=weights, kv_cache=kv_cache, memory=memory, ttft=ttft,
        time_per_token=time_per_token, throughput=throughput, batch=batch, context=context, generate=generate,
    )  # fmt: skip
    console = _console()
    family = _descriptor(descriptor)
    if dry_run:
        from layersmith.stages.dry_run import plan

        console.print(plan(parent, out, data, chosen, budget, family), markup=False, highlight=False, soft_wrap=True)
        return
    from layersmith.pipeline import STAGES, Result, stages

    if until is not None and until not in STAGES:
        raise UsageError(f"--until {until}: no such stage. {did_you_mean(until, STAGES)}")
    with _drawn(console) as progress:
        for reached in stages(parent, out, data, budget, chosen, family, progress):
            if isinstance(reached, Result):
                result = reached
            elif reached == until:
                console.print(f"stopped after {until}; the same command without --until goes on", highlight=False)
                return
    _print_result(console, result)


@app.command()
def inspect(
    parent: Parent,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try everything on a small random model of the same kinds of layers.")
    ] = False,
) -> None:
    """Print the blocks of a model, what can be changed in each, and where parameters and memory go."""
    if verify:
        from layersmith.stages.verify import verify as try_everything
        from layersmith.terminal import print_verification

        found = try_everything(parent, _descriptor(descriptor), trust_remote_code)
        print_verification(_console(), found)
        raise typer.Exit(1 if found.failed else 0)
    from layersmith.stages.inspect import inspect as look
    from layersmith.terminal import print_inspection

    print_inspection(_console(), look(parent, batch, context, _descriptor(descriptor), trust_remote_code))


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `compress` made.")],
    params: Params = None,
    active_params: ActiveParams = None,
    weights: Weights = None,
    kv_cache: KVCache = None,
    memory: Memory = None,
    ttft: TTFT = None,
    time_per_token: TimePerToken = None,
    throughput: Throughput = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    keep_layers: KeepLayers = None,
    max_removed_attentions: MaxRemovedAttentions = None,
    max_removed_ffns: MaxRemovedFFNs = None,
    uniform_groups: UniformGroups = None,
    tensor_parallel: TensorParallel = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--no-refine", help="Better it by running whole children; default: if one is written."),
    ] = None,
    solutions: Annotated[int, typer.Option(help="Print so many, best first.")] = 1,
    min_distance: Annotated[int, typer.Option(help="Subblocks in which each differs from those before.")] = 1,
    frontier: Annotated[bool, typer.Option("--frontier", help="Write RUN/frontier: every budget's answer.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Run some of it, and baselines, as whole models.")] = False,
    objective: Annotated[str | None, typer.Option(help="Metric to search by; default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the child into this folder.")] = None,
) -> None:
    """Answer another budget from the scores of a run, in seconds."""
    from layersmith.costs.budget import parse_budget
    from layersmith.recipe import Recipe
    from layersmith.run.folder import Run
    from layersmith.stages.reopen import frontier_again, search_several
    from layersmith.terminal import print_frontier, print_solution

    limits = (params, active_params, weights, kv_cache, memory, ttft, time_per_token, throughput)
    if frontier and not any(value is not None for value in limits):
        params = "1.0"
    budget = parse_budget(
        params=params, active_params=active_params, weights=weights, kv_cache=kv_cache, memory=memory, ttft=ttft,
        time_per_token=time_per_token, throughput=throughput, batch=batch, context=context, generate=generate,
    )  # fmt: skip
    rules = _with_rules(
        Recipe.from_dict(Run.existing(run).header()["recipe"]).search,
        keep_layers, max_removed_attentions, max_removed_ffns, uniform_groups, tensor_parallel, None,
    )  # fmt: skip
    console = _console()
    with _drawn(console) as progress:
        if frontier:
            path = frontier_again(run, budget, objective, progress, rules=rules, measure=measure)
        else:
            library, best = search_several(
                run, budget, objective, out, progress, rules=rules, refine=refine, solutions=solutions,
                min_distance=min_distance,
            )  # fmt: skip
    if frontier:
        print_frontier(console, path)
        return
    for solution in best:
        print_solution(console, library, solution)
    if out is not None:
        console.print(f"child: {out}", markup=False, highlight=False)


@app.command()
def costs(
    parent: Parent,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write them as a table that a recipe's costs.times can name.")
    ] = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    on: Annotated[str | None, typer.Option("--on", help="Predict for a device that is not here, e.g. H100.")] = None,
    recipe: RecipeFile = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; goes before the recipe's.")] = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Time every alternative of PARENT on this machine: to the first token, and per token after it."""
    from layersmith.costs.counted import Workload
    from layersmith.costs.times import to_csv
    from layersmith.recipe import Recipe
    from layersmith.run.artifacts import write_text
    from layersmith.stages.times import times_of
    from layersmith.terminal import print_times

    chosen = Recipe.read(recipe)
    changes: dict[str, Any] = {"trust_remote_code": trust_remote_code or chosen.trust_remote_code}
    if device is not None:
        changes["device"] = device
    if on is not None:
        changes["costs"] = dataclasses.replace(chosen.costs, device=on, times=None)
    console = _console()
    with _drawn(console) as progress:
        times, alternatives = times_of(
            parent, dataclasses.replace(chosen, **changes), Workload(batch, context, generate),
            _descriptor(descriptor), progress,
        )  # fmt: skip
    print_times(console, times, alternatives)
    if csv is not None:
        write_text(csv, to_csv(times, alternatives))
        console.print(f"times: {csv}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def distill(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `compress` made.")],
    tokens: Annotated[int | None, typer.Option(help="Tokens to learn from; default: the recipe's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to learn from; default: the run's, without evaluation's.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file; its section distillation goes before the run's.")
    ] = None,
    finalists: Annotated[
        int | None, typer.Option(help="Solutions to try for a short while first; the best goes on.")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Log there too: tensorboard, wandb, ...; may be given again.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; goes before the run's.")] = None,
    descriptor: Descriptor = None,
) -> None:
    """Distil the parent of a run into its child; the result will be in RUN/distilled."""
    from layersmith.stages.distill import distill as learn
    from layersmith.terminal import print_distilled

    console = _console()
    with _drawn(console) as progress:
        made = learn(
            run, tokens=tokens, data=data, recipe=recipe, finalists=finalists, device=device, report_to=report_to,
            descriptor=_descriptor(descriptor), progress=progress,
        )  # fmt: skip
    print_distilled(console, made)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name of the model to judge.")],
    data: Annotated[str, typer.Option(help="Text to judge it on.")],
    parent: Annotated[str | None, typer.Option(help="Compare with this model; default: with itself only.")] = None,
    sequences: Annotated[int, typer.Option(help="Rows of text.")] = DataRecipe.evaluation_sequences,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.")] = DataRecipe.sequence_length,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print loss, perplexity, and agreement with the parent, with the noise of each estimate."""
    from layersmith.stages.reopen import evaluate_model
    from layersmith.terminal import print_evaluation

    console = _console()
    with _drawn(console) as progress:
        table = evaluate_model(model, data, parent, sequences, sequence_length, seed, device, progress)
    print_evaluation(console, table)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run that `compress` made.")]) -> None:
    """Write the report of a run again and print where it is."""
    from layersmith.stages.reopen import report_again

    _console().print(str(report_again(run)), markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder of the run.")] = Path("runs/demo"),
    params: Annotated[str, typer.Option(help="Parameters of the child.")] = "0.7",
) -> None:
    """Compress a small code model that comes with layersmith; nothing is downloaded."""
    from layersmith.demo.job import run_demo

    console = _console()
    with _drawn(console) as progress:
        result = run_demo(out, params, progress)
    _print_result(console, result, with_samples=True)


# ---------------------------------------------------------------------------------------------- around the commands


def main() -> None:
    """Run the command line; user errors are one sentence and an exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin, by libgomp's own measure for milliseconds. Where others use the cores
        # they so hinder those that they wait for: small layers took three times as long. On free cores nothing changes.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app(standalone_mode=False)
    except LayersmithError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("interrupted; run the same command again to go on", 130)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # usage errors of typer, whose click is its own
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and error.errno == 28:
            _fail("no space left on the disk. Free some and run the same command again.", 2)
        raise


def _fail(message: str, code: int) -> None:
    print(f"layersmith: {message}", file=sys.stderr)
    sys.exit(code)


def _console() -> Console:
    from layersmith.run.progress import open_console

    return open_console()


def _descriptor(path: str | None) -> Any:
    if path is None:
        return None
    from layersmith.model_descriptor.factory import import_descriptor

    sys.path.insert(0, os.getcwd())
    return import_descriptor(path)


def _with_options(
    recipe: Any,
    seed: int | None,
    device: str | None,
    eval_data: str | None,
    trust: bool,
    scoring: str | None,
    stream: str | None,
    distill: int | None,
    finalists: int | None,
) -> Any:
    changes: dict[str, Any] = {}
    if seed is not None:
        changes["seed"] = seed
    if device is not None:
        changes["device"] = device
    if stream is not None:
        changes["stream"] = stream
    if trust:
        changes["trust_remote_code"] = True
    if eval_data is not None:
        changes["data"] = dataclasses.replace(recipe.data, evaluation_source=eval_data)
    if scoring is not None:
        changes["scoring"] = dataclasses.replace(recipe.scoring, mode=scoring)
    distillation = {"tokens": distill, "finalists": finalists}
    changes["distillation"] = dataclasses.replace(
        recipe.distillation, **{name: value for name, value in distillation.items() if value is not None}
    )
    return dataclasses.replace(recipe, **changes)


def _with_rules(
    search: Any,
    keep_layers: str | None,
    max_removed_attentions: int | None,
    max_removed_ffns: int | None,
    uniform_groups: str | None,
    tensor_parallel: int | None,
    refine: bool | None,
) -> Any:
    """A recipe's section ``search`` with what was said on the command line."""
    from layersmith.recipe import SearchRecipe

    changes: dict[str, Any] = {
        "max_removed_attentions": max_removed_attentions,
        "max_removed_ffns": max_removed_ffns,
        "tensor_parallel": tensor_parallel,
    }
    try:
        if keep_layers is not None:
            changes["keep_layers"] = tuple(int(layer) for layer in keep_layers.split(","))
        if uniform_groups is not None:
            changes["uniform_groups"] = 0 if uniform_groups == "all" else int(uniform_groups)
    except ValueError as error:
        raise UsageError("--keep-layers takes numbers such as 0,1,31, and --uniform-groups a number or all.") from error
    if refine is not None:
        changes["refine_passes"] = (search.refine_passes or SearchRecipe.refine_passes) if refine else 0.0
    return dataclasses.replace(search, **{name: value for name, value in changes.items() if value is not None})


def _print_result(console: Console, result: Any, with_samples: bool = False) -> None:
    from layersmith.terminal import print_result

    print_result(console, result, with_samples)


@contextmanager
def _drawn(console: Console) -> Iterator[Progress]:
    from layersmith.run.progress import shown_on

    yield shown_on(console)
