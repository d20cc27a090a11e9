"""Transformers' Trainer, taught to distil: the child learns from what the parent says on the same tokens.

Everything that its users know works as they know it: accelerate, FSDP, mixed precision, gradient checkpointing,
logging, and any of TrainingArguments through ``distillation.trainer``. What is ours is the loss (:mod:`.losses`), an
order of rows that does not depend on the number of processes, and checkpoints that go on with the same bits.

The child's ``forward`` is exchanged for one that returns the loss, so that whatever wraps the child (DDP, FSDP,
autocast) wraps the loss too.

Shapes: B rows, T tokens, N = B T, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from transformers.trainer_callback import PrinterCallback

from layersmith.distillation.losses import FromHidden, Mixture, Target, cosine_distance, head_losses, span_tokens
from layersmith.distillation.optimizer import MuonAndAdamW, matrices_of
from layersmith.distillation.parent_logits import ParentLogits
from layersmith.distillation.tap import Tap
from layersmith.errors import InputError, LayersmithError, UsageError, did_you_mean, first_line
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import block_configs_of
from layersmith.recipe import DistillationRecipe
from layersmith.run import ranks
from layersmith.run.artifacts import saying_disk_full, write_json, write_text
from layersmith.run.runtime import Runtime

# Fields of TrainingArguments that the recipe sets by other names, or that the order of rows hangs on.
_OWNED = {
    "output_dir": "the run's folder",
    "max_steps": "distillation.tokens",
    "num_train_epochs": "distillation.tokens",
    "per_device_train_batch_size": "distillation.batch_tokens and distillation.device_tokens",
    "gradient_accumulation_steps": "distillation.batch_tokens and distillation.device_tokens",
    "learning_rate": "distillation.learning_rate",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "use_cpu": "the recipe's device",
    "resume_from_checkpoint": "nothing: a run goes on by itself",
    "remove_unused_columns": "nothing",
    "label_names": "nothing",
    "train_sampling_strategy": "nothing",
    "dataloader_drop_last": "nothing",
    "save_strategy": "distillation.save_seconds",
    "save_total_limit": "nothing",
}
# Loggers whose package has another name.
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}
_WEIGHTS, _WHOLE = "weights.safetensors", "whole"
# Of the time between two checkpoints, writing one takes no more than this share.
_SAVING_SHARE = 0.05


@dataclass(frozen=True)
class Steps:
    """How tokens are cut into steps.

    Attributes:
        rows: in a step of the optimizer, over all processes.
        rows_at_once: in one forward pass of one process.
        accumulated: forward passes of a process in a step.
        count: steps.
        tokens: in a step.
    """

    rows: int
    rows_at_once: int
    accumulated: int
    count: int
    tokens: int

    @staticmethod
    def of(recipe: DistillationRecipe, tokens: int, length: int, world_size: int = 1) -> Steps:
        """For rows of ``length`` tokens; the rows of a step are the same for any number of processes.

        Raises:
            UsageError: a step's rows cannot be shared by so many processes.
        """
        rows = max(1, recipe.step_tokens(tokens) // length)
        if rows % world_size:
            raise UsageError(
                f"recipe distillation.batch_tokens: {rows} rows of {length} tokens cannot be shared by {world_size} "
                f"processes. Make it {max(1, round(rows / world_size)) * world_size * length}."
            )
        own = rows // world_size
        most = max(1, recipe.device_tokens // length)
        at_once = max(n for n in range(1, own + 1) if own % n == 0 and n <= most)
        return Steps(rows, at_once, own // at_once, max(1, math.ceil(tokens / (rows * length))), rows * length)


class RowOrder(Dataset):
    """Rows in the order in which they are learnt: all of them once, then all again in another order, to the end."""

    def __init__(self, rows: torch.Tensor, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows)))]
        self.rows, self.order = rows, torch.cat(orders)[:count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.order[index]
        return {"input_ids": self.rows[row].long(), "row": row}


def together(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch."""
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}


@dataclass(frozen=True, eq=False)
class Said:
    """What the parent says on some rows.

    Attributes:
        target: on logits; None if KL has no weight.
        layers: ``[B, T, D]`` of every decoder layer; empty if hidden states have no weight.
    """

    target: Target | None
    layers: Sequence[torch.Tensor]


class Teacher:
    """The parent, run or remembered."""

    def __init__(self, parent: Parent, mixture: Mixture, cache: ParentLogits | None = None):
        self.mixture, self.cache = mixture, cache
        self.tap = Tap(parent)

    @torch.no_grad()
    def says(self, inputs: dict[str, torch.Tensor], from_cache: bool) -> Said:
        """On rows ``input_ids`` ``[B, T]``; ``row`` ``[B]`` are their places in the cache."""
        if self.cache is not None and from_cache:
            return Said(self.cache.target(inputs["row"], inputs["input_ids"].device), [])
        if not (self.mixture.kl or self.mixture.hidden):
            return Said(None, [])
        taken = self.tap.run(inputs["input_ids"], with_layers=bool(self.mixture.hidden))
        target = FromHidden(taken.read.flatten(0, 1), self.tap.head) if self.mixture.kl else None
        return Said(target, taken.layers)


class Student:
    """The child with the loss for a ``forward``."""

    def __init__(self, child: Parent, mixture: Mixture):
        self.mixture, self.tap = mixture, Tap(child)
        self.span = span_tokens(self.tap.vocab_size)

    def losses(self, input_ids: torch.Tensor, said: Said) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and what it is made of: ``[3]``, KL, distance of hidden states, LM loss."""
        taken = self.tap.run(input_ids, with_layers=bool(said.layers))
        labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -1)], 1).flatten()
        loss, kl, lm = head_losses(
            taken.read.flatten(0, 1), self.tap.head, self.tap.parameters(), labels, said.target, self.mixture, self.span
        )
        hidden = torch.zeros_like(loss)
        if said.layers:
            pairs = zip(taken.layers, said.layers, strict=True)
            hidden = torch.stack([cosine_distance(own, parents) for own, parents in pairs]).mean()
            loss = loss + self.mixture.hidden * hidden
        return loss, torch.stack([kl, hidden.detach(), lm])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the child's ``forward`` gives the losses."""
        model = self.tap.model.model
        # A function, not a method: accelerate would bind a method to the model.
        model.forward = lambda input_ids, said: self.losses(input_ids, said)
        try:
            yield
        finally:
            vars(model).pop("forward", None)
            vars(model).pop("_original_forward", None)


class Distiller(Trainer):
    """Trainer with the loss of global distillation."""

    def __init__(self, teacher: Teacher, matrices: Sequence[nn.Parameter], **given: Any):
        super().__init__(**given)
        self.teacher, self.matrices = teacher, matrices
        self._child: nn.Module = given["model"]
        self._parts: dict[bool, tuple[torch.Tensor, int]] = {}
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        said = self.teacher.says(inputs, from_cache=model.training)
        loss, parts = model(input_ids=inputs["input_ids"], said=said)
        total, count = self._parts.get(model.training, (torch.zeros_like(parts), 0))
        self._parts[model.training] = total + parts.detach(), count + 1
        return (loss, {"loss": loss, "parts": parts}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        if not self.matrices or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return made
        self.optimizer = MuonAndAdamW(self.matrices, made)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for training, name, prefix in ((True, "loss", ""), (False, "eval_loss", "eval_")):
            if name in logs and training in self._parts:
                total, count = self._parts.pop(training)
                kl, hidden, lm = self.accelerator.reduce(total / count, "mean").tolist()
                logs |= {f"{prefix}kl": kl, f"{prefix}hidden": hidden, f"{prefix}lm": lm}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as they are in memory: ``save_pretrained`` gives those of some families other names."""
        if state_dict is not None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self._child, str(folder / _WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = Path(resume_from_checkpoint) / _WEIGHTS
        if weights.is_file():
            load_model(self._child, weights)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Keeper(TrainerCallback):
    """Tells how far the training is, writes its curve, and has it saved from time to time."""

    def __init__(
        self, recipe: DistillationRecipe, steps: Steps, curve: Path, name: str, advance: Callable[[float], None]
    ):
        self.recipe, self.steps, self.curve, self.name, self.advance = recipe, steps, curve, name, advance
        self.saved_at = time.monotonic()
        self.saving_seconds = 0.0
        self.trainer: Distiller | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.advance(state.global_step * self.steps.tokens)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.advance(self.steps.tokens)
        if state.global_step % self.recipe.log_every or state.global_step >= state.max_steps:
            return
        wait = max(self.recipe.save_seconds, self.saving_seconds / _SAVING_SHARE)
        due = time.monotonic() - self.saved_at >= wait
        assert self.trainer is not None
        if args.world_size > 1:  # the first process decides
            flag = torch.tensor([due], device=args.device, dtype=torch.int32)
            torch.distributed.broadcast(flag, 0)
            due = bool(flag.item())
        if due:
            self.saving_seconds, self.saved_at = time.monotonic(), time.monotonic()
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.saving_seconds = time.monotonic() - self.saved_at
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE, "")
        self.saved_at = time.monotonic()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        last = state.log_history[-1]
        if "loss" in last and not math.isfinite(last["loss"]):
            raise InputError(
                f"distillation: the loss is not a number after {state.global_step * self.steps.tokens:,} tokens. "
                "Lower distillation.learning_rate in the recipe, or remove what is wrong with the data."
            )
        if state.is_world_process_zero:
            write_json(self.curve, curve_of(state.log_history, self.steps.tokens, self.name))


def curve_of(history: Sequence[dict[str, Any]], step_tokens: int, name: str) -> dict[str, Any]:
    """The training's curve as JSON data; its points are means since the point before."""
    parts = ("loss", "kl", "hidden", "lm")

    def points(prefix: str) -> list[dict[str, Any]]:
        return [
            {"tokens": entry["step"] * step_tokens} | {part: entry[prefix + part] for part in parts}
            for entry in history
            if f"{prefix}kl" in entry
        ]

    return {"name": name, "x": "tokens", "points": points(""), "validation": points("eval_")}


def training_arguments(
    recipe: DistillationRecipe, steps: Steps, runtime: Runtime, hidden_size: int, seed: int, folder: Path
) -> TrainingArguments:
    """Transformers' arguments for a recipe.

    Raises:
        UsageError: ``distillation.trainer`` names a field that there is not, or that the recipe sets by another name;
            a logger that Transformers does not know, or whose package is not installed.
    """
    check_loggers(recipe.report_to)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in recipe.trainer:
        if name in _OWNED:
            raise UsageError(f"recipe distillation.trainer: {name} is not set there; it follows from {_OWNED[name]}.")
        if name not in known:
            raise UsageError(
                f"recipe distillation.trainer: TrainingArguments has no {name!r}. {did_you_mean(name, known)}"
            )
    on_cpu = runtime.device.type == "cpu"
    precision: str = recipe.precision
    if precision == "auto":
        precision = "float32" if runtime.dtype == torch.float32 else str(runtime.dtype).removeprefix("torch.")
    chosen: dict[str, Any] = {
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": math.ceil(recipe.warmup * steps.count),
        "weight_decay": recipe.weight_decay,
        "optim": "adamw_torch",
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        # Its name from some version of Transformers on.
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
    try:
        made = TrainingArguments(**chosen)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"recipe distillation: {first_line(error)}") from error
    if runtime.world_size == 1:
        made._n_gpu = min(1, made.n_gpu)  # of several GPUs one is used; more are torchrun's matter
    return made


def check_loggers(names: Sequence[str]) -> None:
    """Raises: UsageError: a logger that Transformers does not know, or whose package is not installed."""
    known = set(INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise UsageError(f"recipe distillation.report_to: no logger {name!r}. {did_you_mean(name, known)}")
        if name not in get_available_reporting_integrations() and name != "flyte":  # which that list forgets
            raise UsageError(
                f"recipe distillation.report_to: {name} is not installed here. Install its package "
                f"(pip install {_PACKAGES.get(name, name)}), or leave it out."
            )


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        curve: as :func:`curve_of` gives it.
        validation: mean KL, distance of hidden states and LM loss on the validation rows; empty if there are none.
        steps: how it was cut.
        seconds: of this process's own time, since it began or went on.
        state: the child's weights where no process has them whole (FSDP), else None.
    """

    curve: dict[str, Any]
    validation: dict[str, float]
    steps: Steps
    seconds: float
    state: dict[str, torch.Tensor] | None = None


def train(
    parent: Parent,
    child: PreTrainedModel,
    rows: torch.Tensor,
    recipe: DistillationRecipe,
    *,
    tokens: int,
    seed: int,
    folder: Path,
    curve: Path,
    name: str,
    validation: torch.Tensor | None = None,
    cache: ParentLogits | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Trained:
    """Distil a parent into a child, whose weights are changed in place; an interrupted training is gone on with.

    Args:
        parent: whose device is used.
        child: in float32, on any device.
        rows: ``[N, T]`` to learn from; repeated, each time in another order, if there are fewer than wanted.
        recipe: of the distillation.
        tokens: to learn from.
        seed: of the order of rows.
        folder: gets checkpoints.
        curve: the file that gets the curve.
        name: of the curve.
        validation: ``[M, T]``; evaluated at the end, and on the way if the recipe says so.
        cache: the parent's logits on ``rows``; then the parent is not run.
        advance: told the tokens that were learnt.

    Raises:
        UsageError: the recipe does not go with the models, or with the number of processes.
        InputError: the loss is not finite; the disk is full.
    """
    mixture = Mixture(recipe.kl, recipe.hidden, recipe.lm, recipe.temperature)
    runtime = parent.runtime
    steps = Steps.of(recipe, tokens, rows.shape[1], runtime.world_size)
    arguments = training_arguments(recipe, steps, runtime, hidden_size_of(parent), seed, folder)
    child.eval().requires_grad_(True).to(runtime.device)  # tried without dropout; Trainer turns it on
    blocks = tuple(block_configs_of(child.config, parent.descriptor))
    student = Student(Parent("child", child, child.dtype, parent.descriptor, blocks, "", runtime), mixture)
    teacher = Teacher(parent, mixture, cache)
    check_pair(teacher.tap, student.tap, mixture)
    keeper = _Keeper(recipe, steps, curve, name, advance)
    started = time.monotonic()
    try:
        with student.in_place(), _saying_why(folder):
            own_choice = recipe.optimizer == "muon" and "optim" not in recipe.trainer
            trainer = Distiller(
                teacher,
                matrices_of(student.tap.model) if own_choice else (),
                model=child,
                args=arguments,
                data_collator=together,
                train_dataset=RowOrder(rows, steps.count * steps.rows, seed),
                eval_dataset=None if validation is None else RowOrder(validation, len(validation), seed),
                callbacks=[keeper],
            )
            keeper.trainer = trainer
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                    # Beside the curve: what lies among the checkpoints is removed with them.
                    callback.logging_dir = str(curve.parent / "tensorboard")
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
            measured = {} if validation is None else trainer.evaluate()
            state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
            history = trainer.state.log_history
    finally:
        teacher.tap.close()
        student.tap.close()
    found = {part: measured[f"eval_{part}"] for part in ("kl", "hidden", "lm") if f"eval_{part}" in measured}
    made = curve_of(history, steps.tokens, name)
    if arguments.process_index == 0:
        write_json(curve, made)
    return Trained(made, found, steps, time.monotonic() - started, state)


def hidden_size_of(model: Parent) -> int:
    embeddings: Any = model.model.get_submodule(model.descriptor.input_embedding_name())
    return int(embeddings.weight.shape[-1])


def check_pair(parent: Tap, child: Tap, mixture: Mixture) -> None:
    """Raises: UsageError: losses that these two models have no common ground for."""
    if mixture.kl and parent.vocab_size != child.vocab_size:
        raise UsageError(
            f"distillation: the parent has {parent.vocab_size} logits, the child {child.vocab_size}. "
            "Set distillation.kl to 0 in the recipe."
        )
    if mixture.hidden:
        probe = torch.arange(3, 7, device=parent.model.model.device)[None] % parent.model.language_config.vocab_size
        with torch.no_grad():
            shapes = [[h.shape[-1] for h in tap.run(probe, with_layers=True).layers] for tap in (parent, child)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                "distillation: the layers of parent and child have hidden states of other numbers or sizes. "
                "Set distillation.hidden to 0 in the recipe."
            )


# ---------------------------------------------------------------------------------------------- checkpoints


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; what a killed process left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / _WHOLE).is_file()]
    if ranks.is_first():
        for path in found:
            if path not in whole:
                shutil.rmtree(path)
    return str(whole[-1]) if whole else None


@contextmanager
def _saying_why(folder: Path) -> Iterator[None]:
    """Turn what Trainer raises on a full disk or a full device into one sentence."""
    try:
        with saying_disk_full(folder):
            yield
    except LayersmithError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"distillation: out of memory on the device ({first_line(error)}). Lower distillation.device_tokens, or "
            "set distillation.gradient_checkpointing in the recipe."
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise InputError(
                f"{folder}: no space left on the disk. Free some and run the same command again."
            ) from error
        raise
