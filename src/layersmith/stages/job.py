"""What was asked for, and what the stages have made of it so far: the one thing that all stages are given.

A stage takes from the job what it needs and passes only that to the rooms below: a section of the recipe, the limits,
the workload. Nothing is loaded before a stage needs it, so a finished run is opened again without its parent's weights.
"""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from layersmith.costs.budget import Budget, Limits, Workload
from layersmith.data.splits import load_tokenizer
from layersmith.errors import InputError, UsageError
from layersmith.execution.exchange import first_overflow
from layersmith.execution.parent import Parent, identity_of, load_parent
from layersmith.execution.streaming import is_too_large
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.weight_files import check_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import read_config
from layersmith.model_descriptor.factory import ModelDescriptorFactory, source_of
from layersmith.quantization.formats import format_named, kv_format_named
from layersmith.recipe import AUTOMATIC, Recipe
from layersmith.run import ranks
from layersmith.run.digests import digest
from layersmith.run.folder import Run, versions
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.run.stage import Stage

T = TypeVar("T")

# Settings of the section ``search`` that matter only to refinement.
REFINEMENT = ("refine_passes", "refine_rows")


def formats_of(recipe: Recipe) -> list[str]:
    """The number formats that a recipe offers besides the parent's data type.

    Raises:
        UsageError: One is unknown, or they cannot be used together or with another setting.
    """
    formats = [format_named(name) for name in dict.fromkeys(recipe.formats) if name != AUTOMATIC]
    storages = {f.storage for f in formats} - {"plain"}
    if len(storages) > 1:
        names = ", ".join(recipe.formats)
        raise UsageError(f"recipe formats: no file holds all of {names}. Choose those of one file format.")
    if storages:
        _check_objective(recipe)
    if "compressed-tensors" in storages and find_spec("compressed_tensors") is None:
        raise UsageError(
            f"recipe formats: {', '.join(recipe.formats)} need the package compressed-tensors: "
            "pip install 'layersmith[quantized]'"
        )
    if storages and recipe.distillation.tokens and recipe.distillation.finalists > 1:
        raise UsageError("recipe formats: finalists are trained without them. Set distillation.finalists to 1.")
    return [f.name for f in formats if f.storage != "plain"]


def kv_formats_of(recipe: Recipe) -> list[str]:
    """The number formats that a recipe offers for the KV cache besides the parent's data type.

    Raises:
        UsageError: One is unknown, or they cannot be scored.
    """
    if recipe.kv_formats:
        _check_objective(recipe)
    return [kv_format_named(name).name for name in dict.fromkeys(recipe.kv_formats)]


def _check_objective(recipe: Recipe) -> None:
    if (objective := recipe.scoring.objective) != "kl_divergence":
        raise UsageError(f"recipe formats: they are scored by kl_divergence only, not by {objective}.")


@dataclass(eq=False)
class Job:
    """A run and its request.

    Attributes:
        run: The run folder.
        source: Parent as the user named it: checkpoint folder, hub id or GGUF file.
        data: Source of documents.
        limits: Upper limits on costs of the child.
        workload: What its costs are for.
        recipe: All settings.
        family: Descriptor of the parent's model family; default: inferred.
        progress: Receives steps and notes.
        training_data: Source of global distillation; default: that of the run's data.
        rate: Operations per second of the parent's forward pass, if they were measured.
        first: The first parent, as the user named it, where the parent was made from it: by an earlier round, or by
            narrowing.
        hidden_sizes: What each hidden size would cost, where there was a choice.
        trust_remote_code: Whether code from the folders of parent and child may run. No file can allow it.
    """

    run: Run
    source: str
    data: str
    limits: Limits
    workload: Workload
    recipe: Recipe
    family: type[ModelDescriptor] | None = None
    progress: Progress = SILENT
    training_data: str | None = None
    trust_remote_code: bool = False
    rate: float | None = None
    first: str | None = None
    hidden_sizes: tuple[Any, ...] = ()
    _results: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ the parent

    @cached_property
    def runtime(self) -> Runtime:
        """Device and dtype of the computation; a wider dtype than float16 if the parent's activations overflow it."""
        runtime = Runtime.detect(self.recipe.device, self.recipe.dtype)
        if runtime.dtype != torch.float16 or runtime.world_size > 1:
            return runtime
        near = self.run.folder if is_streamed(self.path, self.recipe, runtime) else None
        parent = load_parent(self.path, runtime, self.family, self.trust_remote_code, stream_near=near)
        if first_overflow(parent) is None:
            self.__dict__["parent"] = parent
            return runtime
        wider = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
        self.progress.note(f"the parent's activations overflow float16; it is run in {str(wider)[6:]}.")
        return dataclasses.replace(runtime, dtype=wider)

    @property
    def dtype(self) -> str:
        """Dtype and device of the computation, which results depend on."""
        return f"{self.runtime.dtype} on {self.runtime.device.type}"

    @cached_property
    def path(self) -> str:
        """The parent as an ordinary checkpoint: the source itself, or what it was converted to."""
        return ordinary_of(self, self.source)

    @cached_property
    def is_streamed(self) -> bool:
        """Whether the parent's weights stay on the disk until a layer runs; all processes ask together."""
        return any(ranks.from_each(lambda: is_streamed(self.path, self.recipe, self.runtime)))

    @cached_property
    def identity(self) -> str:
        """Digest of the parent's config and weights; the weights are read, but no model is made."""
        check_files(self.path)
        return identity_of(self.path, self._config)

    @cached_property
    def _config(self) -> Any:
        return read_config(self.path, trust_remote_code=self.trust_remote_code)

    @cached_property
    def descriptor(self) -> dict[str, Any] | None:
        """Name and digest of the source of a descriptor that was given or registered; None if it is inferred."""
        family = self.family or ModelDescriptorFactory.registered(self._config.model_type)
        if family is None:
            return None
        return {"name": f"{family.__module__}:{family.__qualname__}", "source": source_of(family)}

    def files_besides_weights(self, *patterns: str) -> dict[str, str]:
        """Digests of files of the parent's folder; of a model of the hub its identity says all."""
        folder = Path(self.path)
        files = {file for pattern in patterns for file in folder.glob(pattern)} if folder.is_dir() else set()
        return {file.name: digest(file) for file in sorted(files) if file.is_file()}

    @cached_property
    def parent(self) -> Parent:
        """The parent, loaded."""
        return self._load(self.path, self.runtime)

    @cached_property
    def first_parent(self) -> Parent:
        """What children are compared with and learn from: the parent, or in a later round the first one."""
        return self.parent if self.first is None else self._load(ordinary_of(self, self.first), self.runtime)

    @property
    def stored_parent(self) -> Parent:
        """The parent in its checkpoint's dtype, in which the child is written; on the CPU if it stays on the disk.

        From a wider dtype, in which it may be loaded, the way back is exact; otherwise it is read again.
        """
        is_here = self.parent.stream is None or self.parent.runtime.device.type == "cpu"
        if self.parent.runtime.dtype == self.parent.dtype and is_here:
            return self.parent
        return self._load(self.path, Runtime(torch.device("cpu"), self.parent.dtype), self.parent.descriptor)

    def _load(self, path: str, runtime: Runtime, family: type[ModelDescriptor] | None = None) -> Parent:
        near = self.run.folder if self.is_streamed else None
        return load_parent(path, runtime, family or self.family, self.trust_remote_code, stream_near=near)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    # ------------------------------------------------------------------------------------------ the request

    @property
    def formats(self) -> list[str]:
        """The number formats that its recipe offers."""
        return formats_of(self.recipe)

    @property
    def kv_formats(self) -> list[str]:
        """The number formats that its recipe offers for the KV cache."""
        return kv_formats_of(self.recipe)

    def settings(self, section: str, without: Sequence[str] = ()) -> Any:
        """A section of the recipe as JSON data, ``without`` some of its settings."""
        return {name: value for name, value in self.recipe.to_dict()[section].items() if name not in without}

    def header(self, data_digest: str) -> dict[str, Any]:
        """``run.json`` of a new run."""
        return {
            "parent": {"path": self.source, "identity": self.identity},
            **({} if self.first is None else {"first_parent": self.first}),
            "descriptor": self.descriptor,
            "data": {"source": self.data, "digest": data_digest},
            "budget": Budget(self.limits, self.workload).to_dict(),
            "recipe": self.recipe.to_dict(),
            "seed": self.recipe.seed,
            "versions": versions(),
            "working_directory": str(Path.cwd()),
        }

    # ------------------------------------------------------------------------------------------ stages

    def do(self, stage: Stage[Job, Any]) -> bool:
        """Make a stage if this job has it and it is not finished; returns whether it had to be made."""
        if not ranks.from_first(lambda: stage.is_wanted(self)):
            ranks.on_first(lambda: self.run.forget(stage.name))
            return False
        self._results.pop(stage.name, None)
        meanwhile, timeline = stage.meanwhile, self.progress.timeline
        if timeline is not None:
            timeline.enter(stage.name)
        is_new = self.run.do(
            stage.name,
            ranks.from_first(lambda: stage.inputs(self)),
            lambda making: stage.make(self, making),
            None if meanwhile is None else lambda making: meanwhile(self, making),
            is_shared=stage.is_shared,
            progress=self.progress,
        )
        if timeline is not None:
            timeline.leave()
        return is_new

    def read(self, stage: Stage[Job, T]) -> T:
        """What a finished stage made.

        Raises:
            InputError: A file of the stage is damaged or missing.
        """

        def read() -> T:
            self.run.require(stage.name)
            return stage.read(self, self.run.folder / stage.name)

        return self.once(stage.name, read)

    def made_from(self, stage: Stage[Job, Any]) -> str | None:
        """Digest of a finished stage's inputs and files; stages that depend on the stage have it among their inputs."""
        return self.run.made_from(stage.name)

    def put(self, stage: Stage[Job, T], result: T) -> None:
        """Use another result of a stage in this process, e.g. costs for another budget."""
        self._results[stage.name] = result

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Something that several stages need, made when the first asks for it."""
        if name not in self._results:
            self._results[name] = make()
        result: T = self._results[name]
        return result


def ordinary_of(job: Job, source: str) -> str:
    """A parent as an ordinary checkpoint; the first time all processes ask together."""
    dtype, trusts = job.recipe.checkpoint_dtype, job.trust_remote_code

    def convert() -> str:
        return ordinary_checkpoint(source, dtype, trusts, progress=job.progress)

    return job.once(f"ordinary {source}", lambda: ranks.from_first(convert))


def let_go_of_parents(job: Job) -> None:
    """Free the parents and the results that hold them; they are loaded again when a stage asks for them."""
    inside = vars(job)
    for name in ("parent", "first_parent"):
        inside.pop(name, None)
    results: dict[str, Any] = inside["_results"]
    for name in [n for n, result in results.items() if isinstance(getattr(result, "parent", None), Parent)]:
        del results[name]
    gc.collect()


def ask_together(job: Job) -> None:
    """Find out what all processes have to ask at the same time, before a stage asks in the first alone."""
    _ = job.path, job.is_streamed, ordinary_of(job, job.first or job.source)


def job_of_run(
    folder: str | Path,
    needed: tuple[Stage[Job, Any], ...] = (),
    family: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Job:
    """The job of a run that was made before.

    Args:
        folder: Run folder.
        needed: Stages that must be finished.
        family: Descriptor of the parent's model family; default: inferred.
        progress: Receives steps and notes.
        change: Returns the recipe with other settings for what is made now.
        verify: Hash large files of the run whose size and time of change are as before, too.
        trust_remote_code: Whether code from the folders of parent and child may run.

    Raises:
        InputError: A stage is not finished, or the parent is gone or has changed.
    """
    run = Run.existing(folder, verify)
    header = run.header()
    budget = Budget.from_dict(header["budget"])
    run.require(*(stage.name for stage in needed))
    job = Job(
        run=run,
        source=run.path_as_meant(header["parent"]["path"]),
        data=run.path_as_meant(header["data"]["source"]),
        limits=budget.limits,
        workload=budget.workload,
        recipe=change(Recipe.from_dict(header["recipe"], str(run.folder / "run.json"))),
        family=family,
        progress=progress,
        trust_remote_code=trust_remote_code,
        first=run.path_as_meant(header["first_parent"]) if "first_parent" in header else None,
    )
    progress.note(f"parent: {job.source}")
    if job.identity != header["parent"]["identity"]:
        raise InputError(
            f"{job.source}: not the parent of {run.folder} any more: its weights or config changed. Restore them."
        )
    if job.descriptor != header["descriptor"]:
        names = ["an inferred one" if d is None else d["name"] for d in (header["descriptor"], job.descriptor)]
        raise InputError(
            f"{run.folder}: was made with another descriptor ({names[0]}, now {names[1]}"
            f"{'' if names[0] != names[1] else ', whose source changed'}). Give the same --descriptor."
        )
    return job


def is_streamed(path: str | Path, recipe: Recipe, runtime: Runtime) -> bool:
    """Whether a parent's weights stay on the disk until a layer runs: always, never, or if memory is too small."""
    return recipe.stream == "always" or (recipe.stream == "auto" and is_too_large(path, runtime))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
