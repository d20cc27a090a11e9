"""The command line: it reads arguments, calls the pipeline or a command on a finished run, and prints the result.

Results go to standard output; progress, notes, logs and errors go to standard error. Modules that take seconds to
import, such as torch, are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from layersmith.errors import UsageError, did_you_mean
from layersmith.exit_codes import run_app
from layersmith.options import (
    TTFT,
    ActiveParams,
    Batch,
    Bits,
    Context,
    Data,
    DemoModel,
    Descriptor,
    Device,
    DeviceMemory,
    DeviceRate,
    DryRun,
    Formats,
    Frontier,
    Generate,
    Json,
    Keep,
    KVCache,
    Measure,
    Memory,
    Nested,
    On,
    Params,
    Parent,
    Prompt,
    Public,
    PushToHub,
    Quiet,
    RecipeFile,
    Refine,
    Rounds,
    Run,
    Server,
    Settings,
    Size,
    Tasks,
    Throughput,
    TimePerToken,
    TrustRemoteCode,
    Verbose,
    Verify,
    Version,
    Weights,
    Within,
    WorldSize,
    effort_settings,
    format_names,
    format_settings,
    task_names,
    task_settings,
    time_settings,
    times_elsewhere,
)
from layersmith.recipe import BATCH, CONTEXT, DataRecipe, Recipe
from layersmith.screen import open_screen
from layersmith.stages import NAMES

app = typer.Typer(
    help="Compress a Hugging Face decoder language model to a budget. Layers of the result can have different shapes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(version: Version = False) -> None:
    pass


@app.command()
def compress(
    command: typer.Context,
    parent: Parent,
    out: Annotated[Path, typer.Argument(help="Folder of the run. The child is written to OUT/child.")],
    data: Data,
    params: Params = None,
    active_params: ActiveParams = None,
    weights: Weights = None,
    kv_cache: KVCache = None,
    memory: Memory = None,
    ttft: TTFT = None,
    time_per_token: TimePerToken = None,
    throughput: Throughput = None,
    bits: Bits = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    prompt: Prompt = None,
    on: On = None,
    server: Server = None,
    recipe: RecipeFile = None,
    formats: Formats = None,
    settings: Settings = None,
    device: Device = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    tasks: Tasks = None,
    keep: Keep = None,
    within: Within = None,
    rounds: Rounds = None,
    push_to_hub: PushToHub = None,
    public: Public = False,
    until: Annotated[str | None, typer.Option(help=f"Stop after this stage: {', '.join(NAMES)}.")] = None,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
    device_memory: DeviceMemory = None,
    device_rate: DeviceRate = None,
    verify: Verify = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress PARENT to a budget. To resume an interrupted run, repeat the command."""
    given = [*(settings or ()), *task_settings(tasks, keep), *time_settings(on, server)]
    given += [*effort_settings(within, rounds), *format_settings(formats)]
    chosen = _recipe(recipe, given, device)
    budget = _budget(command.params, is_open=bool(chosen.evaluation.keep))
    screen = open_screen(verbose, quiet, as_json)
    family = _descriptor(descriptor)
    if dry_run:
        from layersmith.stages.dry_run import Asked, plan

        asked = Asked(world_size, device_memory, device_rate)
        planned = plan(parent, out, data, chosen, budget, family, trust_remote_code, asked)
        screen.show(lambda: planned, lambda: screen.line(str(planned)))
        return
    if (world_size, device_memory, device_rate) != (None, None, None):
        raise UsageError("--world-size, --device-memory and --device-rate are for plans. Add --dry-run.")
    from layersmith import hub, outputs
    from layersmith.pipeline import Result, stages
    from layersmith.run import ranks
    from layersmith.terminal import print_result

    if until is not None and until not in NAMES:
        raise UsageError(f"--until {until}: no such stage. {did_you_mean(until, NAMES)}")
    if push_to_hub is not None:
        hub.check_push(push_to_hub)
    reached: str | Result = ""
    for reached in stages(parent, out, data, budget, chosen, family, screen.progress, verify, trust_remote_code):
        if reached == until:
            break
    if isinstance(reached, Result):
        result = reached
        first = push_to_hub if ranks.is_first() else None
        address = None if first is None else hub.push(result.child, first, private=not public)

        def draw() -> None:
            print_result(screen.results, result)
            if address is not None:
                screen.line(f"uploaded: {address}")

        screen.show(lambda: outputs.compressed(result, address), draw)
    else:
        words = f"stopped after {until}; the same command without --until resumes"
        screen.show(lambda: outputs.Stopped(out, str(until)), lambda: screen.line(words))


@app.command()
def inspect(
    parent: Parent,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Try every alternative on a small random model with the same kinds of layers."),
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the blocks of a model, the alternatives of each, and where parameters and memory go."""
    screen = open_screen(verbose, quiet, as_json)
    from layersmith.terminal import print_inspection, print_verification

    if verify:
        from layersmith.outputs import Verified
        from layersmith.stages.verify import verify as verify_model

        verification = verify_model(parent, _descriptor(descriptor), trust_remote_code)
        verified = Verified(verification.failed, verification)
        screen.show(lambda: verified, lambda: print_verification(screen.results, verification))
        raise typer.Exit(1 if verification.failed else 0)
    from layersmith.stages.inspect import inspect as inspect_model

    inspection = inspect_model(parent, batch, context, _descriptor(descriptor), trust_remote_code)
    screen.show(lambda: inspection, lambda: print_inspection(screen.results, inspection))


@app.command()
def search(
    command: typer.Context,
    run: Run,
    params: Params = None,
    active_params: ActiveParams = None,
    weights: Weights = None,
    kv_cache: KVCache = None,
    memory: Memory = None,
    ttft: TTFT = None,
    time_per_token: TimePerToken = None,
    throughput: Throughput = None,
    bits: Bits = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    prompt: Prompt = None,
    on: On = None,
    server: Server = None,
    formats: Formats = None,
    settings: Settings = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    objective: Annotated[str | None, typer.Option(help="Metric to minimise. Default: the recipe's.")] = None,
    refine: Refine = None,
    solutions: Annotated[int, typer.Option(help="Number of solutions to print, best first.")] = 1,
    min_distance: Annotated[int, typer.Option(help="Least number of subblocks in which solutions differ.")] = 1,
    frontier: Frontier = False,
    nested: Nested = None,
    measure: Measure = False,
    out: Annotated[Path | None, typer.Option(help="Also write the child into this folder.")] = None,
    verify: Verify = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the best child for another budget from the scores of a finished run, in seconds."""
    from layersmith import outputs
    from layersmith.stages.nested import nested_children
    from layersmith.stages.reopen import SearchRequest, frontier_again
    from layersmith.stages.reopen import search as search_run
    from layersmith.terminal import print_frontier, print_solution

    budget = _budget(command.params, is_open=frontier or nested is not None)
    screen = open_screen(verbose, quiet, as_json)
    rules, family, elsewhere = _search_rules(run, settings), _descriptor(descriptor), times_elsewhere(on, server)
    names = format_names(formats)
    request = SearchRequest(run, budget, objective, rules, family, verify, trust_remote_code, elsewhere, names)
    if nested is not None:
        of_sizes = nested_children(request, nested.split(","), out=out, measure=measure, progress=screen.progress)
        screen.show(lambda: of_sizes, lambda: screen.line(str(of_sizes)))
        return
    if frontier:
        path = frontier_again(request, measure=measure, progress=screen.progress)
        screen.show(lambda: outputs.frontier(path), lambda: print_frontier(screen.results, path))
        return
    made = search_run(
        run, budget, objective=objective, rules=rules, out=out, refine=refine, solutions=solutions,
        min_distance=min_distance, descriptor=family, progress=screen.progress, verify=verify,
        trust_remote_code=trust_remote_code, times_on=elsewhere, formats=names,
    )  # fmt: skip

    def draw() -> None:
        for solution in made.solutions:
            print_solution(screen.results, made.library, solution)
        if out is not None:
            screen.line(f"child: {out}")

    screen.show(lambda: outputs.searched(made), draw)


@app.command()
def costs(
    parent: Parent,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write the times to a CSV file that costs.times can name.")
    ] = None,
    batch: Batch = BATCH,
    context: Context = CONTEXT,
    generate: Generate = None,
    prompt: Prompt = None,
    on: On = None,
    server: Server = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    device: Device = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure the time to first token and the time per token of every alternative of PARENT on this machine."""
    from layersmith import outputs
    from layersmith.costs.budget import workload_of
    from layersmith.costs.times import to_csv
    from layersmith.run.artifacts import check_writable, remove_leftovers, write_text
    from layersmith.run.folder import Run as RunFolder
    from layersmith.stages.costs import times_of
    from layersmith.terminal import print_times

    chosen = _recipe(recipe, [*(settings or ()), *time_settings(on, server)], device)
    if csv is not None:
        check_writable(csv)
    screen = open_screen(verbose, quiet, as_json)
    times, alternatives = times_of(
        parent,
        chosen,
        workload_of(batch, context, generate, prompt),
        _descriptor(descriptor),
        screen.progress,
        trust_remote_code,
    )
    if csv is not None:
        with RunFolder.locked_around(csv):
            remove_leftovers(csv.parent, csv.name)
            write_text(csv, to_csv(times, alternatives))

    def draw() -> None:
        print_times(screen.results, times, alternatives)
        if csv is not None:
            screen.line(f"times: {csv}")

    screen.show(lambda: outputs.times(times, alternatives, csv), draw)


@app.command()
def distill(
    run: Run,
    tokens: Annotated[int | None, typer.Option(help="Number of training tokens. Default: the recipe's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training text. Default: the run's data without its evaluation documents.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file whose section `distillation` overrides the run's.")
    ] = None,
    finalists: Annotated[
        int | None, typer.Option(help="Number of solutions to distil briefly first; only the best is distilled on.")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also log to tensorboard, wandb, ... May be repeated.")
    ] = None,
    device: Device = None,
    descriptor: Descriptor = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Verify = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the child of a run to match its parent (global distillation). The result is written to RUN/distilled."""
    from layersmith import outputs
    from layersmith.stages.distill_finished import distill as distill_run
    from layersmith.terminal import print_distilled

    screen = open_screen(verbose, quiet, as_json)
    made = distill_run(
        run, tokens=tokens, data=data, recipe=recipe, finalists=finalists, device=device, report_to=report_to,
        descriptor=_descriptor(descriptor), progress=screen.progress, verify=verify,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    screen.show(lambda: outputs.distilled(made), lambda: print_distilled(screen.results, made))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model to evaluate: a checkpoint folder, a hub id, or a GGUF file.")],
    data: Annotated[str | None, typer.Option(help="Text to evaluate it on; see `compress --data`.")] = None,
    tasks: Tasks = None,
    items: Annotated[int | None, typer.Option(help="Number of items of each task. Default: all.")] = None,
    shots: Annotated[int, typer.Option(help="Number of solved examples shown before each item of a task.")] = 0,
    parent: Annotated[str | None, typer.Option(help="Model to compare with, e.g. the parent of a child.")] = None,
    sequences: Annotated[int, typer.Option(help="Number of rows of text.")] = DataRecipe.evaluation_sequences,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.")] = DataRecipe.sequence_length,
    seed: Annotated[int, typer.Option(help="Seed of the order in which documents are drawn.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity, agreement with a parent and accuracy on tasks, each with its standard error."""
    from layersmith.stages.evaluate_model import evaluate as evaluate_model
    from layersmith.terminal import print_evaluation

    screen = open_screen(verbose, quiet, as_json)
    evaluation = evaluate_model(
        model, data, parent=parent, tasks=task_names(tasks), items=items, shots=shots, sequences=sequences,
        sequence_length=sequence_length, seed=seed, device=device or "auto", progress=screen.progress,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    screen.show(lambda: evaluation, lambda: print_evaluation(screen.results, evaluation))


@app.command()
def report(
    run: Run,
    trust_remote_code: TrustRemoteCode = False,
    verify: Verify = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the report of a finished run again and print its path."""
    from layersmith.outputs import ReportOutput
    from layersmith.stages.reopen import report as report_of

    screen = open_screen(verbose, quiet, as_json)
    page = report_of(run, progress=screen.progress, verify=verify, trust_remote_code=trust_remote_code).report
    screen.show(lambda: ReportOutput(page, run / "report.json"), lambda: screen.line(str(page)))


@app.command()
def export(
    child: Annotated[
        str, typer.Argument(help="Child to export: a checkpoint folder or a hub id; a run for --to automodel.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the export.")],
    to: Annotated[str, typer.Option("--to", help="Target; docs/serving.md has the table.")],
    size: Size = None,
    quantize: Annotated[str | None, typer.Option(help="With --to gguf: store the weights so, e.g. Q4_K_M.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="With --to automodel: training tokens. Default: the recipe's.")
    ] = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a child in another layout, and prove that the target reads the same model; or a recipe to distil it."""
    from layersmith.export.run import export as export_child
    from layersmith.stages.exported_recipe import export_recipe

    screen = open_screen(verbose, quiet, as_json)
    if to == "automodel":
        if size is not None or quantize is not None:
            raise UsageError("--to automodel writes a recipe for a run: without --size and --quantize.")
        written = export_recipe(child, out, tokens)
        screen.show(lambda: written, lambda: screen.line(str(written)))
        return
    if tokens is not None:
        raise UsageError(f"--tokens {tokens}: only --to automodel writes a recipe for training.")
    exported = export_child(child, out, to, size=size, quantize=quantize, progress=screen.progress)
    screen.show(lambda: exported, lambda: screen.line(str(exported)))


@app.command()
def push(
    child: Annotated[Path, typer.Argument(help="Folder of a child, e.g. RUN/child.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub, as user/name.")],
    public: Public = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "",
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Upload a child with its model card to the Hugging Face Hub, by default as a private repository."""
    from layersmith import hub, outputs

    address, screen = hub.push(child, repo, private=not public, message=message), open_screen(verbose, quiet, as_json)
    screen.show(lambda: outputs.PushOutput(address), lambda: screen.line(address))


@app.command()
def vocabulary(
    model: Annotated[str, typer.Argument(help="Parent or child: a checkpoint folder, a hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model with fewer tokens.")],
    data: Annotated[str, typer.Option(help="All text that the model is to read and write; see `compress --data`.")],
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Drop the tokens that DATA never has, and prove that all else is the same."""
    from layersmith.stages.vocabulary import trim_vocabulary

    screen = open_screen(verbose, quiet, as_json)
    trimmed = trim_vocabulary(model, out, data=data, progress=screen.progress, trust_remote_code=trust_remote_code)
    screen.show(lambda: trimmed, lambda: screen.line(str(trimmed)))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder of the run.")] = Path("runs/demo"),
    model: DemoModel = "code",
    params: Annotated[
        str | None, typer.Option(help="Parameters of the child. Default: 0.7, and 0.8 for smollm2.")
    ] = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress a model that needs no hub. Nothing is downloaded."""
    from layersmith.demo.job import run_demo, run_smollm2
    from layersmith.outputs import compressed
    from layersmith.terminal import print_result

    demos = {"code": (run_demo, "0.7"), "smollm2": (run_smollm2, "0.8")}
    if model not in demos:
        raise UsageError(f"--model {model}: no such demo. {did_you_mean(model, demos)}")
    run, usual = demos[model]
    screen = open_screen(verbose, quiet, as_json)
    result = run(out, params or usual, screen.progress)
    screen.show(lambda: compressed(result), lambda: print_result(screen.results, result, with_samples=True))


# ---------------------------------------------------------------------------------------------- arguments


def _recipe(recipe: Path | None, settings: list[str] | None, device: str | None) -> Recipe:
    """The recipe of a file, changed by ``--set`` and by options of its own settings."""
    extra = [] if device is None else [f"device={device}"]
    return Recipe.read(recipe).with_settings([*(settings or ()), *extra])


def _budget(given: dict[str, Any], is_open: bool) -> Any:
    """The budget of a command's options; the whole parent if no limit is given and the command ``is_open`` to that."""
    from layersmith.costs.budget import COST_OF, parse_budget

    limits = {name: given[name] for name in (*COST_OF, "bits") if given[name] is not None}
    workload = {name: given[name] for name in ("batch", "context", "generate", "prompt")}
    return parse_budget(**(limits or ({"params": "1.0"} if is_open else {})), **workload)


def _search_rules(run: Path, settings: list[str] | None) -> Any:
    """The section ``search`` of a finished run's recipe, changed by ``--set``."""
    from layersmith.run.folder import Run as RunFolder

    for setting in settings or ():
        if not setting.startswith("search."):
            raise UsageError(f"--set {setting}: `search` can change settings of the section search only.")
    return Recipe.from_dict(RunFolder.existing(run).header()["recipe"]).with_settings(settings or ()).search


def _descriptor(path: str | None) -> Any:
    if path is None:
        return None
    from layersmith.model_descriptor.factory import import_descriptor

    sys.path.insert(0, os.getcwd())
    return import_descriptor(path)


def main() -> None:
    """Run the command line and exit; :func:`layersmith.exit_codes.run_app` says with which code."""
    run_app(app)
