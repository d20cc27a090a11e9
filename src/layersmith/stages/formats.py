"""Score number formats: the loss increase of every subblock of the parent in each of the recipe's formats."""

from __future__ import annotations

from typing import Any

import torch

from layersmith.distillation.quantize import layerwise_of
from layersmith.errors import UsageError
from layersmith.library.formats import kv_key
from layersmith.run.artifacts import read_json, read_tensors, write_json, write_tensors
from layersmith.run.journal import shared_work_folder
from layersmith.run.stage import Making, Stage
from layersmith.scoring.formats import FormatScores, FormatTask, score_formats
from layersmith.scoring.task import row_order
from layersmith.stages.costs import COSTS, smaller_caches
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY

_FILE = "formats.json"
_HEAD = "head.safetensors"
# One row in four: rounding errors differ little from row to row, and with all rows eight formats would more than double
# the cost of scoring.
_SHARE = 4


def _inputs(job: Job) -> Any:
    rows = [digest_of_split(job, split) for split in ("calibration", "scoring")]
    formats = [*job.formats, *map(kv_key, job.kv_formats)]
    return [job.made_from(DESCRIBE), *rows, formats, job.settings("scoring"), job.recipe.seed, job.dtype]


def _scored(job: Job, making: Making) -> tuple[FormatScores, torch.Tensor | None]:
    """What :func:`score_formats` returns; all processes work on it together."""
    tokens = job.read(DATA)
    few = [
        rows[sorted(row_order(len(rows))[: -(-len(rows) // _SHARE)])] for rows in (tokens.calibration, tokens.scoring)
    ]
    library = job.read(LIBRARY)
    task = FormatTask(
        library=library,
        layerwise=layerwise_of(library.parent, library),
        formats=job.formats,
        kv_alternatives=smaller_caches(library.alternatives, job.read(COSTS).counted, job.kv_formats),
        calibration=few[0],
        scoring=few[1],
        recipe=job.recipe.scoring,
        seed=job.recipe.seed,
        folder=shared_work_folder(making.scratch, making.inputs),
        progress=making.progress,
    )
    return score_formats(task)


def _make(job: Job, making: Making) -> None:
    scores, head_moment = _scored(job, making)
    write_json(making.folder / _FILE, scores)
    if head_moment is not None:
        write_tensors(making.folder / _HEAD, {"moment": head_moment.cpu()})


FORMATS: Stage[Job, FormatScores] = Stage(
    name="formats",
    inputs=_inputs,
    make=_make,
    read=lambda job, folder: read_json(folder / _FILE, FormatScores),
    is_wanted=lambda job: bool(job.formats or job.kv_formats),
    meanwhile=_scored,
    is_shared=True,
)


def head_moment(job: Job) -> torch.Tensor | None:
    """The mean product ``[D, D]`` of the head's inputs, if the run has formats of embeddings and head."""

    def read() -> torch.Tensor | None:
        if job.made_from(FORMATS) is None:
            return None
        job.run.require(FORMATS.name)
        file = job.run.folder / FORMATS.name / _HEAD
        return read_tensors(file)["moment"] if file.is_file() else None

    moment: torch.Tensor | None = job.once(f"{FORMATS.name}: inputs of the head", read)
    return moment


def scores_of_formats(job: Job) -> FormatScores:
    """Scores of the formats that the job offers; none if it offers none.

    Raises:
        UsageError: The run has no scores of one of them.
    """
    wanted = {*job.formats, *map(kv_key, job.kv_formats)}
    if not wanted:
        return {}
    scores = job.read(FORMATS) if job.made_from(FORMATS) else {}
    result = {name: of_format for name, of_format in scores.items() if name in wanted}
    if missing := sorted(wanted - result.keys()):
        raise UsageError(
            f"formats: the run has no scores of {', '.join(missing)}, but of {', '.join(scores) or 'none'}. Run "
            "compress again with these formats."
        )
    return result
