"""Transformers' TrainingArguments for a recipe."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from layersmith import upstream
from layersmith.distillation.steps import Steps
from layersmith.errors import UsageError, did_you_mean
from layersmith.foreign import foreign_code
from layersmith.recipe import DistillationRecipe
from layersmith.run.runtime import Runtime

# Fields of TrainingArguments that the recipe sets under another name, or on which the order of rows depends.
_SET_ELSEWHERE = {
    "output_dir": "the run's folder",
    "max_steps": "distillation.tokens",
    "num_train_epochs": "distillation.tokens",
    "per_device_train_batch_size": "distillation.batch_tokens and distillation.device_tokens",
    "gradient_accumulation_steps": "distillation.batch_tokens and distillation.device_tokens",
    "learning_rate": "distillation.learning_rate",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "use_cpu": "the recipe's device",
    "resume_from_checkpoint": "nothing: a run resumes by itself",
    "remove_unused_columns": "nothing",
    "label_names": "nothing",
    "train_sampling_strategy": "nothing",
    "dataloader_drop_last": "nothing",
    "save_strategy": "distillation.save_seconds",
    "save_total_limit": "nothing",
    "load_best_model_at_end": "nothing",
    "report_to": "distillation.report_to",
}
# Loggers whose package has another name than the logger.
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}


def training_arguments(
    recipe: DistillationRecipe, steps: Steps, runtime: Runtime, hidden_size: int, seed: int, folder: Path
) -> TrainingArguments:
    """Transformers' arguments for a recipe.

    Raises:
        UsageError: ``distillation.trainer`` names an unknown field, or one that the recipe sets under another name;
            a logger is unknown, or its package is not installed.
    """
    check_loggers(recipe.report_to)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    _check_fields(recipe.trainer, known)
    on_cpu = runtime.device.type == "cpu"
    precision = str(runtime.dtype).removeprefix("torch.") if recipe.precision == "auto" else recipe.precision
    chosen: dict[str, Any] = {
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": math.ceil(recipe.warmup * steps.count),
        "weight_decay": recipe.weight_decay,
        "optim": "adamw_torch",
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        # Newer versions of Transformers call it activation_checkpointing.
        ("activation" if "activation_checkpointing" in known else "gradient")
        + "_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": recipe.log_every,
        "eval_strategy": "steps" if recipe.eval_every else "no",
        "eval_steps": recipe.eval_every or None,
        "per_device_eval_batch_size": steps.rows_at_once,
        "report_to": list(recipe.report_to) or "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": not on_cpu,
        **({"ddp_backend": "gloo"} if on_cpu and runtime.world_size > 1 else {}),
        **recipe.trainer,
        "output_dir": str(folder),
        "max_steps": steps.count,
        "per_device_train_batch_size": steps.rows_at_once,
        "gradient_accumulation_steps": steps.accumulated,
        "learning_rate": recipe.rate(hidden_size),
        "seed": seed,
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "label_names": ["input_ids"],
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
        "save_strategy": "no",
        "save_total_limit": 2,
    }
    with foreign_code("Are these arguments valid?", refusal_is_answer=True) as attempt:
        made = attempt.call(TrainingArguments, **chosen)
    if attempt.failed:
        raise UsageError(f"{_where(recipe.trainer)}: {attempt.reason}") from attempt.error
    if runtime.world_size == 1:
        upstream.use_one_gpu(made)  # several GPUs need a launcher such as torchrun
    return made


def why_not_sharded(recipe: DistillationRecipe, processes: int, dtype: str, has_formats: bool) -> str | None:
    """Why the weights of parent and child cannot be sharded over all processes; None if they can.

    Args:
        recipe: The recipe's section ``distillation``.
        processes: Number of processes.
        dtype: Name of the data type of the run's computation.
        has_formats: Whether the child has number formats.
    """
    if processes == 1:
        return "there is one process; start several with torchrun"
    if processes % recipe.tensor_parallel:
        return f"{processes} processes are not a multiple of distillation.tensor_parallel, {recipe.tensor_parallel}"
    if recipe.tensor_parallel > 1 and recipe.sharded == "never":
        return "distillation.sharded is never"
    if recipe.trainer.get("fsdp") or recipe.trainer.get("deepspeed"):
        return "distillation.trainer sets fsdp or deepspeed"
    if has_formats:
        return "the child has number formats"
    if recipe.lora_rank:
        return "adapters are trained whole; set distillation.lora_rank to 0"
    if recipe.finalists > 1:
        return "finalists are trained whole; set distillation.finalists to 1"
    if "optim" in recipe.trainer:
        return "distillation.trainer sets another optimizer"
    if "float16" in (dtype if recipe.precision == "auto" else recipe.precision).split("."):
        return "gradients in float16 are scaled as a whole; set distillation.precision to bfloat16 or float32"
    return None


def trains_on_disk(recipe: DistillationRecipe, processes: int) -> bool:
    """Whether adapters can be trained while the weights of parent and child stay on the disk."""
    return bool(recipe.lora_rank) and processes == 1


def _check_fields(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises: UsageError: Some name is no field of TrainingArguments, or one that the recipe sets elsewhere."""
    where = "recipe distillation.trainer"
    if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"{where}: deepspeed is not installed here.")
    for name in given:
        if name.startswith(("hub_", "push_to_hub")):
            raise UsageError(f"{where}: {name} is not set there; nothing is uploaded.")
        if name in _SET_ELSEWHERE:
            raise UsageError(f"{where}: {name} is not set there; it follows from {_SET_ELSEWHERE[name]}.")
        if name not in known:
            raise UsageError(f"{where}: TrainingArguments has no {name!r}. {did_you_mean(name, known)}")


def _where(given: Iterable[str]) -> str:
    """The settings that Transformers refuses, for a message: those that the recipe passes on, if there are any."""
    names = ", ".join(given)
    return f"recipe distillation.trainer ({names})" if names else "recipe distillation"


# Settings that need a language model, take long, or start processes.
_NOT_REHEARSED = {
    "activation_checkpointing": False,
    "gradient_checkpointing": False,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "report_to": "none",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
}


class _OneWeight(nn.Linear):
    """A model of one weight, with the loss that Trainer expects."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": super().forward(input_ids).square().mean()}


def rehearse(arguments: TrainingArguments, given: Iterable[str]) -> None:
    """Train a single weight for one step, so that arguments that do not work are refused before work starts.

    Args:
        arguments: What a child will be trained with.
        given: The fields of ``distillation.trainer``, for the message.

    Raises:
        UsageError: Transformers' Trainer fails with these arguments, or its step is not finite.
    """
    model = _OneWeight(1, 1, bias=False)
    rows = [{"input_ids": torch.ones(1)}] * arguments.train_batch_size
    state = random.getstate(), np.random.get_state()
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
        foreign_code("Does one step of training work?", refusal_is_answer=True) as attempt,
    ):
        known = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments) if f.init}
        workers = min(0, known["dataloader_num_workers"])
        changed = {n: value for n, value in _NOT_REHEARSED.items() if n in known}
        changed |= {"output_dir": folder, "dataloader_num_workers": workers}
        trainer = attempt.call(Trainer, model, TrainingArguments(**known | changed), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        attempt.call(trainer.train)
    random.setstate(state[0])
    np.random.set_state(state[1])
    where = _where(given)
    if attempt.failed:
        raise UsageError(f"{where}: training fails ({attempt.reason}).") from attempt.error
    if not torch.isfinite(model.weight).all():
        raise UsageError(f"{where}: one step of training with these settings gives NaN.")


def check_loggers(names: Sequence[str]) -> None:
    """Raises: UsageError: A logger is unknown to Transformers, or its package is not installed."""
    known = upstream.known_loggers()
    for name in names:
        if name not in known:
            raise UsageError(f"recipe distillation.report_to: no logger {name!r}. {did_you_mean(name, known)}")
        if name not in get_available_reporting_integrations() and name != "flyte":  # missing from that list
            raise UsageError(
                f"recipe distillation.report_to: {name} is not installed here. Install its package "
                f"(pip install {_PACKAGES.get(name, name)}), or leave it out."
            )
