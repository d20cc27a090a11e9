"""Write the solution as a checkpoint, after its alternatives were trained together layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.execution.parent import Parent
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.report.card import Child, write_card
from layersmith.run.stage import Making, Stage
from layersmith.stages.data import DATA, TOKENIZER_FILES, digest_of_split
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
    solution, tokens = job.read(SOLUTION), job.read(DATA)
    library = distill_jointly(job.read(LIBRARY), solution.alternatives, tokens.calibration, tokens.training, setup)
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


def shards(parent: Parent) -> dict[str, Any]:
    """Size of the child's files: the usual one; small if the parent is streamed, so that few weights are in memory."""
    return {} if parent.stream is None else {"max_shard_size": "500MB"}


def _make(job: Job, making: Making) -> None:
    """Write the child in the parent's dtype, and check that it has the parameters that the search counted."""
    solution, library = job.read(SOLUTION), library_with_pairs(job).with_parent(job.stored_parent)
    with making.progress.stage("child", 1, "child") as advance:
        child = library.compose(solution.alternatives)
        counted = sum(parameter.numel() for parameter in child.parameters())
        if counted != solution.costs["parameters"]:
            raise RuntimeError(f"the child has {counted} parameters, the search counted {solution.costs['parameters']}")
        with quiet_transformers():
            child.save_pretrained(making.folder, **shards(library.parent))
            job.tokenizer.save_pretrained(making.folder)
        write_card(making.folder, Child(job.run, library, solution, job.recipe))
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
