"""Check a global distillation before it starts, and choose the rows that it trains on.

Evaluation shows none of these rows.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from layersmith.data.splits import check_vocabulary
from layersmith.data.training import TrainingSource, training_rows
from layersmith.distillation import arguments
from layersmith.distillation.adapters import require_peft
from layersmith.distillation.parent_logits import ParentLogits
from layersmith.distillation.steps import Steps
from layersmith.distillation.train import hidden_size_of
from layersmith.errors import InputError, UsageError
from layersmith.execution.parent import Parent
from layersmith.execution.tensor_parallel import why_not_divided
from layersmith.recipe import DistillationRecipe, Overlap
from layersmith.run.artifacts import write_json, write_tensors
from layersmith.run.stage import Making, Stage
from layersmith.stages import long_context
from layersmith.stages.data import DATA, digest_of, read_rows
from layersmith.stages.job import Job
from layersmith.stages.refine import SOLUTION

# Bytes a parameter on the disk: two checkpoints of weights and two moments in float32.
_CHECKPOINTED = 2 * 3 * 4
_FILE = "tokens.safetensors"


def is_wanted(job: Job) -> bool:
    return job.recipe.distillation.tokens > 0


def check(job: Job) -> Steps:
    """How the recipe's tokens are divided into steps.

    Raises:
        UsageError: Settings do not go together, with the number of processes, or with the size of the parent.
    """
    why_not = why_not_sharded(job)
    is_on_disk = arguments.trains_on_disk(job.recipe.distillation, job.runtime.world_size)
    if job.is_streamed and not is_on_disk and (why_not is not None or job.recipe.distillation.sharded == "never"):
        raise UsageError(
            f"{job.source}: larger than the memory, so it cannot be distilled here: it is not sharded, because "
            f"{why_not or 'distillation.sharded is never'}. Set distillation.lora_rank, such as to 16, to train "
            "adapters in one process while the weights stay on the disk; or set distillation.tokens to 0, or stream "
            "to never in the recipe."
        )
    if why_not is not None and job.recipe.distillation.sharded == "always":
        raise UsageError(f"recipe distillation.sharded: parent and child cannot be sharded, because {why_not}.")
    settings, parent = job.recipe.distillation, job.parent
    check_tensor_parallel(settings, parent, why_not)
    steps = Steps.of(settings, settings.tokens, job.read(DATA).evaluation.shape[1], parent.runtime.world_size)
    size = hidden_size_of(parent)
    trainers = arguments.training_arguments(settings, steps, parent.runtime, size, job.recipe.seed, job.run.folder)
    if job.formats and (trainers.fsdp or trainers.deepspeed):
        raise UsageError(
            "distillation: a child with number formats cannot be divided among processes (FSDP, DeepSpeed)."
        )
    _check_adapters(job)
    if long_context.is_wanted(job):
        long_context.check(job)
    if parent.runtime.world_size == 1:
        job.once("rehearsal of training", lambda: arguments.rehearse(trainers, settings.trainer))
    return steps


def check_tensor_parallel(settings: DistillationRecipe, parent: Parent, why_not: str | None) -> None:
    """Raises: UsageError: Layers are to be divided and cannot be, because they cannot be sharded or without a plan."""
    if settings.tensor_parallel == 1:
        return
    if why_not := why_not or why_not_divided(parent.model, parent.descriptor, settings.tensor_parallel):
        raise UsageError(f"recipe distillation.tensor_parallel: the layers cannot be divided, because {why_not}.")


def _check_adapters(job: Job) -> None:
    """Raises: UsageError: Adapters do not go with another setting, or PEFT is not installed."""
    settings = job.recipe.distillation
    if not settings.lora_rank:
        return
    require_peft()
    if job.formats:
        raise UsageError("recipe distillation.lora_rank: a child with number formats is trained whole. Set it to 0.")
    if settings.finalists > 1:
        raise UsageError("recipe distillation.lora_rank: finalists are trained whole. Set distillation.finalists to 1.")


def why_not_sharded(job: Job) -> str | None:
    """Why the weights of parent and child cannot be sharded over all processes; None if they can."""
    runtime = job.runtime
    return arguments.why_not_sharded(job.recipe.distillation, runtime.world_size, str(runtime.dtype), bool(job.formats))


def _check_disk(job: Job) -> None:
    """Raises: InputError: Checkpoints will not fit on the disk."""
    costs, settings, steps = job.read(SOLUTION).costs, job.recipe.distillation, check(job)
    needed = costs["parameters"] * _CHECKPOINTED + costs["weight_bytes"]
    needed += ParentLogits.bytes_for(steps.count * steps.tokens, settings.cache_top) if settings.cache_top else 0
    free = shutil.disk_usage(job.run.folder).free
    if free < needed:
        raise InputError(
            f"{job.run.folder}: distillation needs about {needed / 1e9:.1f} GB here for checkpoints, {free / 1e9:.1f} "
            "GB are free. Free some and run the same command again."
        )


def training_source(job: Job) -> str:
    return job.data if job.training_data is None else job.training_data


def _overlap(job: Job) -> Overlap:
    return job.recipe.distillation.overlap or job.recipe.data.overlap


def _rows_inputs(job: Job) -> Any:
    steps = check(job)
    other = None if job.training_data is None else digest_of(job.training_data)
    return [job.made_from(DATA), steps.count * steps.rows, other, _overlap(job)]


def _read(job: Job, making: Making, name: str, source: TrainingSource) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows of a source without those that the run has for other purposes, and their description."""
    making.progress.note(f"data: {source.path}")
    with making.progress.stage(name, 1, "source") as advance:
        run_rows = {name: getattr(job.read(DATA), name) for name in ("scoring", "evaluation")}
        rows, description = training_rows(source, job.recipe.data, job.tokenizer, run_rows, job.recipe.seed)
        check_vocabulary(int(rows.max()) + 1, job.parent.language_config.vocab_size)
        advance(1)
    return rows, description


def _write(making: Making, rows: torch.Tensor, description: dict[str, Any]) -> None:
    write_tensors(making.folder / _FILE, {"training": rows.int()})
    write_json(making.folder / "data.json", description)
    for warning in description["warnings"]:
        making.progress.note(warning)


def _read_again(job: Job, folder: Path) -> torch.Tensor:
    return read_rows(folder / _FILE, "training")["training"]


def _make_rows(job: Job, making: Making) -> None:
    _check_disk(job)
    steps = check(job)
    is_of_run = job.training_data is None
    source = TrainingSource(training_source(job), is_of_run, steps.count * steps.rows, _overlap(job))
    _write(making, *_read(job, making, ROWS.name, source))


ROWS: Stage[Job, torch.Tensor] = Stage(
    name="distillation/data", inputs=_rows_inputs, make=_make_rows, read=_read_again, is_wanted=is_wanted
)


def _long_source(job: Job) -> str:
    return job.recipe.distillation.long_data or training_source(job)


def _long_inputs(job: Job) -> Any:
    steps, source = long_context.check(job), _long_source(job)
    other = None if source == job.data else digest_of(source)
    first = job.recipe.distillation.tokens if source == training_source(job) else 0
    return [job.made_from(DATA), steps.count * steps.rows, long_context.length_of(job), first, other, _overlap(job)]


def _make_long_rows(job: Job, making: Making) -> None:
    """Consecutive rows are joined; those that the first part has not used, if there are any."""
    steps, length, path = long_context.check(job), long_context.length_of(job), _long_source(job)
    of_run = job.read(DATA).evaluation.shape[1]
    wanted = steps.count * steps.rows * (length // of_run)
    before = -(-job.recipe.distillation.tokens // of_run) if path == training_source(job) else 0
    source = TrainingSource(path, path == job.data, before + wanted, _overlap(job))
    rows, description = _read(job, making, LONG_ROWS.name, source)
    long = long_context.joined(rows[before:] if len(rows) >= before + wanted else rows, length)
    if not len(long):
        raise InputError(f"{path}: its {rows.numel():,} tokens for training are too few for a row of {length}.")
    counts = {"sequence_length": length, "rows": len(long), "wanted": steps.count * steps.rows}
    _write(making, long, description | counts)


LONG_ROWS: Stage[Job, torch.Tensor] = Stage(
    name="distillation/long_data",
    inputs=_long_inputs,
    make=_make_long_rows,
    read=_read_again,
    is_wanted=long_context.is_wanted,
)
