"""Rank the units of every layer by importance, from statistics of the parent's activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.library.build import build_library
from layersmith.library.library import CURVES, Library
from layersmith.library.statistics import Calibration
from layersmith.records import to_data
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, read_tensors, write_json, write_tensors
from layersmith.run.stage import Making, Stage
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.job import Job


def _inputs(job: Job) -> Any:
    """What is gathered depends on the axes and on the kinds of alternatives, not on the sizes of these."""
    survey, library = job.read(DESCRIBE), job.recipe.library
    return [
        job.identity,
        [to_data(axis) for axis in survey.axes],
        sorted({(a.layer, a.subblock, a.kind) for a in survey.alternatives if a.method != "pool"}),
        survey.ffn_ranking,
        library.statistics_gib,
        job.recipe.scoring.batch_tokens,
        digest_of_split(job, "calibration"),
        job.dtype,
    ]


def _calibration(job: Job, making: Making) -> Calibration:
    """The rows, with a place of each process's own for its unfinished sums."""
    tokens, checkpoint = job.read(DATA).calibration, making.unfinished
    if ranks.count() > 1:
        checkpoint = making.scratch / f"sums-{ranks.number()}-of-{ranks.count()}"
        making.scratch.mkdir(exist_ok=True)
    return Calibration(
        tokens=tokens,
        batch_sequences=job.recipe.scoring.rows_at_once(tokens.shape[1]),
        checkpoint=checkpoint,
        inputs=making.inputs,
        progress=making.progress,
    )


def _ranked(job: Job, making: Making) -> Library:
    """The library with its rankings; all processes work on them together."""
    return build_library(job.parent, job.recipe.library, job.read(DESCRIBE), _calibration(job, making))


def _make(job: Job, making: Making) -> None:
    library = _ranked(job, making)
    tensors = {f"order.{name}": order for name, order in library.orders.items()}
    tensors |= {f"map.{name}": weight for name, weight in library.maps.items()}
    write_tensors(making.folder / "tensors.safetensors", tensors)
    write_json(making.folder / "importance.json", {k: [list(p) for p in v] for k, v in library.importance.items()})


def _read(job: Job, folder: Path) -> Library:
    """The library as it was pruned, before anything was trained."""
    survey, tensors = job.read(DESCRIBE), read_tensors(folder / "tensors.safetensors")
    return Library(
        parent=job.parent,
        axes=survey.axes,
        alternatives=survey.alternatives,
        orders={k.removeprefix("order."): v for k, v in tensors.items() if k.startswith("order.")},
        maps={k.removeprefix("map."): v for k, v in tensors.items() if k.startswith("map.")},
        notes=survey.notes,
        importance=read_json(folder / "importance.json", CURVES),
    )


STATISTICS = Stage(
    name="statistics",
    inputs=_inputs,
    make=_make,
    read=_read,
    meanwhile=_ranked,
    is_shared=True,
)
