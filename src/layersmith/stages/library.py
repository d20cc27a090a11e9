"""The library: pruned alternatives, refitted and trained one by one (local distillation)."""

from __future__ import annotations

from typing import Any

from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.library.library import Library, read_library, write_library
from layersmith.run.stage import Making, Stage
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.job import Job
from layersmith.stages.statistics import STATISTICS

# Settings of the recipe's section that matter only for the layers of a solution.
AFTER_SEARCH = ("child_refit", "child_refit_sequences", "coupled_tokens", "coupled_on", "coupled_learning_rate")


def _inputs(job: Job) -> Any:
    rows = [digest_of_split(job, split) for split in ("calibration", "training")]
    stages = [job.made_from(stage) for stage in (DESCRIBE, STATISTICS)]
    settings = job.settings("local_distillation", without=AFTER_SEARCH)
    return [*stages, *rows, settings, job.recipe.seed, job.dtype]


def _distilled(job: Job, making: Making) -> Library:
    tokens = job.read(DATA)
    setup = TrainingSetup(
        job.recipe.local_distillation,
        seed=job.recipe.seed,
        folder=making.scratch,
        inputs=making.inputs,
        progress=making.progress,
    )
    return distill_locally(job.read(STATISTICS), tokens.calibration, tokens.training, setup)


LIBRARY = Stage(
    name="library",
    inputs=_inputs,
    make=lambda job, making: write_library(_distilled(job, making), making.folder),
    read=lambda job, folder: read_library(folder, job.parent),
    meanwhile=_distilled,
    is_shared=True,
)
