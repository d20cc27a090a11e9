"""Global distillation: train the child against the parent, and resume an interrupted training with the same bits."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from layersmith.distillation.adapters import has_adapters
from layersmith.distillation.arguments import training_arguments
from layersmith.distillation.losses import Mixture
from layersmith.distillation.objective import ChildLosses, ParentTargets, check_pair
from layersmith.distillation.optimizer import matrices_of
from layersmith.distillation.parent_logits import ParentLogits
from layersmith.distillation.steps import RowOrder, Steps, collate, groups
from layersmith.distillation.trainer import COMPLETE, CurveAndCheckpoints, Distiller, curve_of, digests_of
from layersmith.errors import InputError, LayersmithError, OutOfMemory, first_line
from layersmith.execution.parent import Parent
from layersmith.execution.sharded import gathered, is_sharded, shard
from layersmith.execution.streaming import has_weights_on_disk
from layersmith.heterogeneous.build import block_configs_of
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import DistillationRecipe
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, saying_disk_full, write_json

logger = logging.getLogger(__name__)

# Of a child in training, for each parameter: weight, gradient and two moments in float32.
TRAINED_BYTES = 16.0


@dataclass(frozen=True)
class GlobalSetup:
    """How a child is trained, and where its files go.

    Attributes:
        recipe: The recipe's section ``distillation``.
        tokens: Number of training tokens.
        seed: Seed of the order of rows.
        folder: Folder for checkpoints.
        curve: File for the training curve.
        name: Name of the curve.
        dtype: Data type in which the child will be written.
        is_sharded: Whether to shard the weights of parent and child over all processes, in place. What is sharded
            already stays so in any case.
    """

    recipe: DistillationRecipe
    tokens: int
    seed: int
    folder: Path
    curve: Path
    name: str
    dtype: torch.dtype = torch.float32
    is_sharded: bool = False


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """What a child is trained and validated on.

    Attributes:
        rows: ``[N, T]`` to train on; repeated in another order if there are fewer than the tokens need.
        validation: ``[M, T]``, evaluated at the end, and on the way if the recipe says so; or None.
        cache: The parent's logits on ``rows``; if given, the parent is not run on them.
    """

    rows: torch.Tensor
    validation: torch.Tensor | None = None
    cache: ParentLogits | None = None


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        curve: As :func:`.trainer.curve_of` returns it.
        validation: Mean KL, distance of hidden states and LM loss on the validation rows; empty without such rows.
        steps: The steps that were made.
        seconds: Wall time of this process since the training began or was resumed.
        state: The child's weights in the first process if no process holds them whole (sharded, FSDP, or on the
            disk), else None.
    """

    curve: dict[str, Any]
    validation: dict[str, float]
    steps: Steps
    seconds: float
    state: dict[str, torch.Tensor] | None = None


def train(
    parent: Parent,
    child: PreTrainedModel,
    data: TrainingRows,
    setup: GlobalSetup,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Trained:
    """Train a child against its parent; its weights are changed in place. Resumes an interrupted training.

    Args:
        parent: Parent model, on the device to use.
        child: Child in float32, on any device; or one with adapters, in the dtype of the computation.
        data: Rows to train and validate on.
        setup: How to train.
        advance: Called with the number of tokens just trained on.

    Raises:
        UsageError: The recipe does not fit the models, or the number of processes.
        InputError: The loss is not finite; the disk or the device's memory is full.
    """
    recipe, runtime = setup.recipe, parent.runtime
    mixture = Mixture(kl=recipe.kl, hidden=recipe.hidden, lm=recipe.lm, temperature=recipe.temperature)
    steps = Steps.of(recipe, setup.tokens, data.rows.shape[1], runtime.world_size)
    arguments = training_arguments(recipe, steps, runtime, hidden_size_of(parent), setup.seed, setup.folder)
    arguments.use_cache = getattr(child.config, "use_cache", arguments.use_cache)  # Trainer writes it into the config
    if data.validation is not None:  # incomplete batches are left out, so there has to be a complete one
        most = max(1, len(data.validation) // groups(recipe, runtime.world_size))
        arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, most)
    _place(parent, child, setup)
    losses = ChildLosses(_as_parent(child, parent), mixture)
    targets = ParentTargets(parent, mixture, data.cache)
    order = RowOrder(data.rows, steps.count * steps.rows, setup.seed)
    started = time.monotonic()
    try:
        check_pair(targets.tap, losses.tap, mixture)
        with ranks.ending_all(), losses.as_forward(), _plain_errors(setup.folder):
            uses_muon = recipe.optimizer == "muon" and "optim" not in recipe.trainer and not has_adapters(child)
            trainer = Distiller(
                targets,
                matrices_of(losses.tap.model) if uses_muon else (),
                model=child,
                args=arguments,
                data_collator=collate,
                train_dataset=order.for_each_of(recipe.tensor_parallel, steps.rows_at_once),
                eval_dataset=None if data.validation is None else _validation(data.validation, setup, arguments),
                callbacks=[CurveAndCheckpoints(recipe, steps, setup.curve, setup.name, advance)],
            )
            trainer.put_tensorboard_in(setup.curve.parent / "tensorboard")
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(setup.folder))
            measured = {} if data.validation is None else trainer.evaluate()
            state = _whole_state(trainer, child, setup)
    finally:
        targets.tap.close()
        losses.tap.close()
    validation = {part: measured[f"eval_{part}"] for part in ("kl", "hidden", "lm") if f"eval_{part}" in measured}
    curve = curve_of(trainer.state.log_history, steps.tokens, setup.name)
    if arguments.process_index == 0:
        write_json(setup.curve, curve)
    return Trained(curve=curve, validation=validation, steps=steps, seconds=time.monotonic() - started, state=state)


def _place(parent: Parent, child: PreTrainedModel, setup: GlobalSetup) -> None:
    """Put the child where it is trained, and shard both models if wanted."""
    child.eval()  # checked without dropout; Trainer turns it on
    if not (is_sharded(child) or has_weights_on_disk(child)):
        module: torch.nn.Module = child if has_adapters(child) else child.requires_grad_(True)
        module.to(parent.runtime.device)
    if setup.is_sharded:
        for model in (parent.model, child):
            shard(model, parent.descriptor, parent.runtime)


def _whole_state(trainer: Distiller, child: PreTrainedModel, setup: GlobalSetup) -> dict[str, torch.Tensor] | None:
    if is_sharded(child):
        return gathered(child, setup.dtype, setup.folder)
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def save_trained(child: PreTrainedModel, trained: Trained, dtype: torch.dtype, tokenizer: Any, folder: Path) -> None:
    """Write a trained child in a dtype, usually the one that it had before training."""
    with quiet_transformers():
        if trained.state is not None:
            state = {name: tensor.to(dtype) for name, tensor in trained.state.items()}
            child.config.dtype = dtype
            child.save_pretrained(folder, state_dict=state)
        else:
            child.eval().to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def in_float32(child: PreTrainedModel) -> PreTrainedModel:
    """The child with float32 copies of its parameters, so that training leaves the parent's weights as they are."""
    tied: dict[int, torch.nn.Parameter] = {}
    for module in child.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in tied:
                tied[id(parameter)] = torch.nn.Parameter(parameter.detach().float().clone())
            module.register_parameter(name, tied[id(parameter)])
    return child


def _as_parent(child: PreTrainedModel, parent: Parent) -> Parent:
    """The child in the form that a tap takes."""
    blocks = tuple(block_configs_of(child.config, parent.descriptor))
    return Parent("child", child, child.dtype, parent.descriptor, blocks, "", parent.runtime)


def _validation(rows: torch.Tensor, setup: GlobalSetup, arguments: TrainingArguments) -> RowOrder:
    order = RowOrder(rows, len(rows), setup.seed)
    return order.for_each_of(setup.recipe.tensor_parallel, arguments.per_device_eval_batch_size)


def hidden_size_of(model: Parent) -> int:
    embeddings: Any = model.model.get_submodule(model.descriptor.input_embedding_name())
    return int(embeddings.weight.shape[-1])


def last_complete_checkpoint(folder: Path) -> str | None:
    """The last checkpoint whose files are as they were written; later ones, of a killed process or damaged, go."""
    return ranks.from_first(lambda: _last_intact(folder))


def _last_intact(folder: Path) -> str | None:
    numbered = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((p for p, number in numbered.items() if number.isdigit()), key=lambda p: int(numbered[p]))
    while checkpoints:
        path = checkpoints.pop()
        try:
            is_intact = read_json(path / COMPLETE) == digests_of(path)
        except (InputError, OSError):
            is_intact = False
        if is_intact:
            return str(path)
        if (path / COMPLETE).exists():
            logger.warning("%s: a file of it is damaged; training goes on from the checkpoint before it.", path)
        shutil.rmtree(path, ignore_errors=True)
    return None


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a full device into one sentence."""
    try:
        with saying_disk_full(folder):
            yield
    except LayersmithError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"distillation: out of memory on the device ({first_line(error)}). Lower distillation.device_tokens, or "
            "set distillation.gradient_checkpointing in the recipe."
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise InputError(
                f"{folder}: no space left on the disk. Free some and run the same command again."
            ) from error
        raise
