"""Write the solution as a checkpoint, after its alternatives were trained together layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.quantize import quantize_child
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.quantized import write_quantized
from layersmith.library.formats import as_written, embeddings_in, quantized_embeddings
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.quantization.rounding import Rounded
from layersmith.report.card import Child, write_card
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.search.solution import Solution
from layersmith.stages.data import DATA, TOKENIZER_FILES, digest_of_split
from layersmith.stages.formats import head_moment
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.refine import SOLUTION


def _pairs_inputs(job: Job) -> Any:
    made = [job.made_from(stage) for stage in (LIBRARY, SOLUTION)]
    rows = [digest_of_split(job, split) for split in ("calibration", "training")]
    return [*made, *rows, job.settings("local_distillation"), job.recipe.seed]


def _pairs(job: Job, making: Making) -> Kept:
    setup = TrainingSetup(
        job.recipe.local_distillation,
        seed=job.recipe.seed,
        folder=making.scratch,
        inputs=making.inputs,
        progress=making.progress,
    )
    shapes, tokens = [a.shape for a in job.read(SOLUTION).alternatives], job.read(DATA)
    library = distill_jointly(job.read(LIBRARY), shapes, tokens.calibration, tokens.training, setup)
    return library.pairs


PAIRS = Stage(
    name="pairs",
    inputs=_pairs_inputs,
    make=lambda job, making: _pairs(job, making).write(making.folder),
    read=lambda job, folder: Kept.read(folder),
    meanwhile=_pairs,
)


def library_with_pairs(job: Job) -> Library:
    """The library with the jointly trained weights of the solution, which other solutions may have in part."""
    library = job.read(LIBRARY)
    return library.with_kept(library.kept, job.read(PAIRS))


@contextmanager
def composed(job: Job, solution: Solution, progress: Progress) -> Iterator[tuple[PreTrainedModel, dict[str, Rounded]]]:
    """The child of a solution in the parent's data type, with jointly trained weights, and those that are rounded."""
    tokens, batch_tokens = job.read(DATA).calibration, job.recipe.scoring.batch_tokens
    library, rounded = quantize_child(library_with_pairs(job), solution.alternatives, tokens, batch_tokens, progress)
    child = library.with_parent(job.stored_parent).compose(solution.alternatives)
    more = quantized_embeddings(child, solution.embeddings, head_moment(job) if solution.embeddings else None)
    with embeddings_in(child, more):
        yield child, {**rounded, **more}


def write_formats(folder: Path, child: PreTrainedModel, rounded: Mapping[str, Rounded]) -> None:
    """Give the weights in a child's folder their formats."""
    written = as_written(child, rounded)
    write_quantized(folder, {name: weight.format for name, weight in written.items()}, written.__getitem__)


def shards(parent: Parent) -> dict[str, Any]:
    """Size of the child's files: the usual one; small if the parent is streamed, so that few weights are in memory."""
    return {} if parent.stream is None else {"max_shard_size": "500MB"}


def _make(job: Job, making: Making) -> None:
    """Write the child in the parent's dtype, and check that it has the parameters that the search counted."""
    solution = job.read(SOLUTION)
    with (
        composed(job, solution, making.progress) as (child, rounded),
        making.progress.stage("child", 1, "child") as advance,
    ):
        counted = sum(parameter.numel() for parameter in child.parameters())
        if counted != solution.costs["parameters"]:
            raise RuntimeError(f"the child has {counted} parameters, the search counted {solution.costs['parameters']}")
        with quiet_transformers():
            child.save_pretrained(making.folder, **shards(job.parent))
            job.tokenizer.save_pretrained(making.folder)
        write_formats(making.folder, child, rounded)
        write_card(making.folder, Child(job.run, job.read(LIBRARY), solution, job.recipe))
        advance(1)


def _inputs(job: Job) -> Any:
    """Tokenizer, chat template and generation config are the parent's."""
    made = [job.made_from(stage) for stage in (SOLUTION, PAIRS)]
    return [*made, job.files_besides_weights(*TOKENIZER_FILES, "generation_config.json")]


CHILD: Stage[Job, Path] = Stage(
    name="child",
    inputs=_inputs,
    make=_make,
    read=lambda job, folder: folder,
)
