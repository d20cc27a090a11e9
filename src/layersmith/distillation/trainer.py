"""Transformers' Trainer with the loss of global distillation, exact resume, and a curve on the disk.

Everything that its users know works as they know it: accelerate, FSDP, mixed precision, gradient checkpointing,
loggers, and any of TrainingArguments through ``distillation.trainer``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from layersmith import upstream
from layersmith.distillation.checkpoints import load_states, save_states
from layersmith.distillation.objective import ParentTargets
from layersmith.distillation.optimizer import MuonAndAdamW
from layersmith.distillation.steps import Steps
from layersmith.errors import InputError
from layersmith.execution.sharded import is_sharded, let_go
from layersmith.execution.streaming import has_weights_on_disk
from layersmith.recipe import DistillationRecipe
from layersmith.run.artifacts import file_digest, write_json

COMPLETE = "whole"
# Writing checkpoints takes no more than this share of the time; more loses less work to an interruption.
_SAVING_SHARE = 0.05


def digests_of(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, without the file that keeps them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    return {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}


class Distiller(Trainer):
    """Trainer with the loss of global distillation."""

    def __init__(self, targets: ParentTargets, matrices: Sequence[nn.Parameter], **arguments: Any):
        super().__init__(**arguments)
        self.targets, self.matrices = targets, matrices
        self.child: nn.Module = arguments["model"]
        # By training or evaluation, the sum of the loss's parts and the number of batches since the last log entry.
        self._parts: dict[bool, tuple[torch.Tensor, int]] = {}
        self.remove_callback(PrinterCallback)
        if is_sharded(self.child) or has_weights_on_disk(self.child):
            upstream.prepared(self, self.child)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose checkpoints are their own
            upstream.checkpoint_by(self, self._save_states, self._load_states)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        parent = self.targets.outputs(inputs, from_cache=model.training)
        loss, parts = model(input_ids=inputs["input_ids"], parent=parent)
        self.targets.let_go()
        if not torch.is_grad_enabled():  # no backward pass will
            let_go(model)
        total, count = self._parts.get(model.training, (torch.zeros_like(parts), 0))
        self._parts[model.training] = total + parts.detach(), count + 1
        return (loss, {"loss": loss, "parts": parts}) if return_outputs else loss

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not has_weights_on_disk(model):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        adamw = super().create_optimizer(model)
        if is_sharded(self.child):
            _join_groups(adamw, self.child, set(self.get_decay_parameter_names(self.child)))
        if not self.matrices or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return adamw
        self.optimizer = MuonAndAdamW(self.matrices, adamw)
        return self.optimizer

    def _save_states(self, checkpoint: Path) -> None:
        save_states(self.child, _parts_of(self.optimizer), checkpoint)

    def _load_states(self, checkpoint: Path) -> None:
        load_states(self.child, _parts_of(self.optimizer), checkpoint)
        if isinstance(optimizer := _unwrapped(self.optimizer), MuonAndAdamW):
            optimizer.share_groups()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for training, name, prefix in ((True, "loss", ""), (False, "eval_loss", "eval_")):
            if name in logs and training in self._parts:
                total, count = self._parts.pop(training)
                kl, hidden, lm = self.accelerator.reduce(total / count, "mean").tolist()
                logs |= {f"{prefix}kl": kl, f"{prefix}hidden": hidden, f"{prefix}lm": lm}
        super().log(logs, start_time)

    def put_tensorboard_in(self, folder: Path) -> None:
        """Put TensorBoard's files into a folder, unless the user chose another: checkpoints are removed at the end."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder)


def _join_groups(optimizer: torch.optim.Optimizer, model: nn.Module, decayed: set[str]) -> None:
    """Join the groups of an optimizer with and without weight decay that Trainer makes for each mesh of processes.

    So a checkpoint has the same groups, however the weights are divided.
    """
    if len(optimizer.param_groups) <= 2:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    joined: dict[bool, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        is_decayed = names[id(group["params"][0])] in decayed
        joined.setdefault(is_decayed, {**group, "params": []})["params"] += group["params"]
    for group in joined.values():
        group["params"].sort(key=lambda parameter: order[id(parameter)])
    optimizer.param_groups[:] = joined.values()


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _parts_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    unwrapped = _unwrapped(optimizer)
    return list(unwrapped.both) if isinstance(unwrapped, MuonAndAdamW) else [unwrapped]


class CurveAndCheckpoints(TrainerCallback):
    """Reports progress, writes the curve, and decides when to write a checkpoint."""

    def __init__(
        self, recipe: DistillationRecipe, steps: Steps, curve: Path, name: str, advance: Callable[[float], None]
    ):
        self.recipe, self.steps, self.curve, self.name, self.advance = recipe, steps, curve, name, advance
        self.saved_at = time.monotonic()
        self.saving_seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.advance(state.global_step * self.steps.tokens)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.advance(self.steps.tokens)
        if state.global_step % self.recipe.log_every or state.global_step >= state.max_steps:
            return
        wait = max(self.recipe.save_seconds, self.saving_seconds / _SAVING_SHARE)
        due = time.monotonic() - self.saved_at >= wait
        if args.world_size > 1:  # the first process decides for all
            flag = torch.tensor([due], device=args.device, dtype=torch.int32)
            torch.distributed.broadcast(flag, 0)
            due = bool(flag.item())
        if due:
            self.saving_seconds, self.saved_at = time.monotonic(), time.monotonic()
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.saving_seconds = time.monotonic() - self.saved_at
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, digests_of(folder))
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
    """The training curve as JSON data; each point is a mean over the steps since the last one."""
    parts = ("loss", "kl", "hidden", "lm")

    def points(prefix: str) -> list[dict[str, Any]]:
        return [
            {"tokens": entry["step"] * step_tokens} | {part: entry[prefix + part] for part in parts}
            for entry in history
            if f"{prefix}kl" in entry
        ]

    return {"name": name, "x": "tokens", "points": points(""), "validation": points("eval_")}
