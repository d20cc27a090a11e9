"""Check a global distillation before it starts, and choose the rows that it trains on.

Evaluation shows none of these rows.
"""

from __future__ import annotations

import shutil
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
from layersmith.recipe import Overlap
from layersmith.run.artifacts import write_json, write_tensors
from layersmith.run.stage import Making, Stage
from layersmith.stages import long_context
from layersmith.stages.data import DATA, digest_of, read_rows
from layersmith.stages.job import Job
from layersmith.stages.refine import SOLUTION

# Bytes a parameter on the disk: two checkpoints of weights and two moments in float32.
_CHECKPOINTED = 2 * 3 * 4


def is_wanted(job: Job) -> bool:
    return job.recipe.distillation.tokens > 0


def check(job: Job) -> Steps:
    """How the recipe's tokens are divided into steps.

    Raises:
        UsageError: Settings do not go together, with the number of processes, or with the size of the parent.
    """
    why_not = why_not_sharded(job)
    if job.is_streamed and (why_not is not None or job.recipe.distillation.sharded == "never"):
        raise UsageError(
            f"{job.source}: larger than the memory, so it cannot be distilled here: it is not sharded, because "
            f"{why_not or 'distillation.sharded is never'}. Set distillation.tokens to 0, or stream to never in the "
            "recipe."
        )
    if why_not is not None and job.recipe.distillation.sharded == "always":
        raise UsageError(f"recipe distillation.sharded: parent and child cannot be sharded, because {why_not}.")
    settings, parent = job.recipe.distillation, job.parent
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


def _make_rows(job: Job, making: Making) -> None:
    _check_disk(job)
    steps = check(job)
    making.progress.note(f"data: {training_source(job)}")
    with making.progress.stage(ROWS.name, 1, "source") as advance:
        run_rows = {name: getattr(job.read(DATA), name) for name in ("scoring", "evaluation")}
        source = TrainingSource(
            training_source(job), job.training_data is None, steps.count * steps.rows, _overlap(job)
        )
        rows, description = training_rows(source, job.recipe.data, job.tokenizer, run_rows, job.recipe.seed)
        check_vocabulary(int(rows.max()) + 1, job.parent.language_config.vocab_size)
        advance(1)
    write_tensors(making.folder / "tokens.safetensors", {"training": rows.int()})
    write_json(making.folder / "data.json", description)
    for warning in description["warnings"]:
        making.progress.note(warning)


ROWS: Stage[Job, torch.Tensor] = Stage(
    name="distillation/data",
    inputs=_rows_inputs,
    make=_make_rows,
    read=lambda job, folder: read_rows(folder / "tokens.safetensors", "training")["training"],
    is_wanted=is_wanted,
)
