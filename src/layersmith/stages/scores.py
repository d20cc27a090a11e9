"""Score every alternative: the loss increase when it replaces its parent subblock."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from layersmith.errors import InputError, some_of
from layersmith.run.artifacts import fingerprint, read_json, write_json
from layersmith.run.journal import Recording
from layersmith.run.stage import Making, Stage
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.regret import Axis
from layersmith.scoring.score import Score, ScoreData
from layersmith.search.frontier import axes_of
from layersmith.stages.costs import COSTS
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY

_FILE = "scores.json"


def _axes(job: Job) -> list[Axis]:
    """The costs by which the search will choose: they decide which scores have to be exact."""
    alternatives = job.read(DESCRIBE).alternatives
    return axes_of(alternatives, job.read(COSTS).table(alternatives), job.limits)


def _inputs(job: Job) -> Any:
    axes = fingerprint([dataclasses.asdict(axis) for axis in _axes(job)])
    rows = digest_of_split(job, "scoring")
    return [job.made_from(LIBRARY), rows, job.settings("scoring"), axes, job.recipe.seed, job.dtype]


def _scored(job: Job, recording: Recording) -> list[Score]:
    """The scores; all processes work on them together."""
    return score_library(
        job.read(LIBRARY),
        job.read(DATA).scoring,
        job.recipe.scoring,
        axes=_axes(job),
        seed=job.recipe.seed,
        recording=recording,
    )


def _make(job: Job, making: Making) -> None:
    scores = _scored(job, making.recording)
    write_json(making.folder / _FILE, [score.to_dict() for score in scores])


def _read(job: Job, folder: Path) -> list[Score]:
    records = {record["of"]: record for record in read_json(folder / _FILE, list[ScoreData])}
    alternatives = job.read(DESCRIBE).alternatives
    if missing := [a.key for a in alternatives if a.key not in records]:
        raise InputError(f"{folder / _FILE}: no score of {some_of(missing)}.")
    return [Score.from_dict(a, records[a.key]) for a in alternatives]


SCORES = Stage(
    name="scores",
    inputs=_inputs,
    make=_make,
    read=_read,
    meanwhile=lambda job, making: _scored(job, dataclasses.replace(making.recording, is_kept=False)),
    is_shared=True,
)
