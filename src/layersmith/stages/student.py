"""The models of a global distillation: the parent, and the child in float32.

They are whole in every process, or sharded, or with adapters and on the disk.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from layersmith.distillation.adapters import add_adapters
from layersmith.distillation.train import TRAINED_BYTES, in_float32
from layersmith.execution.memory import free_memory, give_back
from layersmith.execution.parent import Parent
from layersmith.execution.sharded import load_sharded
from layersmith.execution.streaming import SHARE_OF_MEMORY, WeightStream, load_streamed
from layersmith.execution.tensor_parallel import whole_parts
from layersmith.heterogeneous.checkpoint import load
from layersmith.model_descriptor.stock import casting
from layersmith.quantization.rounding import Rounded
from layersmith.run import ranks
from layersmith.run.progress import Progress
from layersmith.search.solution import Solution
from layersmith.stages.finalists import starting_child
from layersmith.stages.job import Job, let_go_of_parents, ordinary_of
from layersmith.stages.realize import composed
from layersmith.stages.training_rows import why_not_sharded


@dataclass(frozen=True, eq=False)
class Student:
    """A child that is trained.

    Attributes:
        model: The child in float32, or with adapters and in the dtype of the computation.
        dtype: Data type in which it is written.
        rounded: Its weights in number formats, by name.
        stream: Reads its weights where they stay on the disk.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    rounded: dict[str, Rounded]
    stream: WeightStream | None = None


def parent_and_student(job: Job, progress: Progress) -> tuple[Parent, Student]:
    """Both models, ready for training; all processes call this together."""
    folder, solution = starting_child(job)
    if is_sharded(job, solution):
        number = job.recipe.distillation.tensor_parallel
        together = f" {number} of them compute the same rows together." if number > 1 else ""
        progress.note(f"the weights of parent and child are sharded over {job.runtime.world_size} processes.{together}")
        return _sharded(job, folder, progress)
    if job.is_streamed:
        progress.note("the weights of parent and child stay on the disk until a layer runs; adapters are trained.")
        return job.first_parent, _on_disk(job, folder)
    return job.first_parent, _whole(job, solution, folder, progress)


def _whole(job: Job, solution: Solution, folder: Path, progress: Progress) -> Student:
    if not solution.has_formats:
        child = load(folder, trust_remote_code=job.trust_remote_code)
        dtype, rank = child.dtype, job.recipe.distillation.lora_rank
        if not rank:
            return Student(child.float(), dtype, {})
        module: nn.Module = child
        with casting(child, job.runtime.dtype):
            module.to(job.runtime.dtype)
        add_adapters(child, job.first_parent.descriptor, rank, job.recipe.seed)
        return Student(child, dtype, {})
    with composed(job, solution, progress) as (child, rounded):
        return Student(in_float32(child), job.stored_parent.dtype, rounded)


def _on_disk(job: Job, folder: Path) -> Student:
    """The child with adapters in memory. Its layers are run again in the backward pass, when they are read again."""
    descriptor, near, trusts = job.first_parent.descriptor, job.run.folder, job.trust_remote_code
    child, dtype, stream = load_streamed(folder, job.runtime, descriptor, near, trusts)
    rank, seed = job.recipe.distillation.lora_rank, job.recipe.seed
    add_adapters(child, descriptor, rank, seed, job.runtime.device)
    stream.run_again_in_backward()
    return Student(child, dtype, {}, stream)


def _sharded(job: Job, folder: Path, progress: Progress) -> tuple[Parent, Student]:
    """Both as shards; no process holds a whole model, not even what earlier stages loaded."""
    path, runtime = ordinary_of(job, job.first or job.source), job.runtime
    let_go_of_parents(job)
    give_back()
    near, trusts, number = job.run.folder, job.trust_remote_code, job.recipe.distillation.tensor_parallel
    parent = load_sharded(path, runtime, job.family, near=near, trust_remote_code=trusts, tensor_parallel=number)
    wide = dataclasses.replace(runtime, dtype=torch.float32)
    child = load_sharded(
        folder, wide, parent.descriptor, near=near, trust_remote_code=trusts, trains=True, tensor_parallel=number
    )
    if whole := whole_parts(child.model, child.descriptor, number):
        names = ", ".join(whole) if len(whole) < 5 else f"{', '.join(whole[:3])} and {len(whole) - 3} others"
        progress.note(f"{number} processes cannot share these parts of the child equally, so each has all of: {names}.")
    return parent, Student(child.model, child.dtype, {})


def is_sharded(job: Job, solution: Solution) -> bool:
    """Whether parent and child are sharded: if that is asked for, or if some process has no memory for both.

    All processes ask together.
    """
    setting = job.recipe.distillation.sharded
    if why_not_sharded(job) is not None or setting == "never":
        return False
    if setting == "always" or job.is_streamed or job.recipe.distillation.tensor_parallel > 1:
        return True
    runtime, parameters = job.runtime, solution.costs["parameters"]
    job.first_parent  # noqa: B018  # so that what is free is what the child can have

    def is_too_large() -> bool:
        free = free_memory(runtime.device) / runtime.processes_on_device
        return bool(TRAINED_BYTES * parameters > SHARE_OF_MEMORY * free)

    return any(ranks.from_each(is_too_large))
