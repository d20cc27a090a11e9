"""The first stage: find what can be changed in the parent, and prove it on its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.library.survey import Survey, survey
from layersmith.records import parse, to_data
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.stage import Making, Stage
from layersmith.stages.job import Job

_FILE = "survey.json"


def _inputs(job: Job) -> Any:
    return [job.identity, job.descriptor, job.settings("library"), job.dtype]


def _make(job: Job, making: Making) -> None:
    with making.progress.stage("describe", 1, "parent") as advance:
        found = survey(job.parent, job.recipe.library)
        advance(1)
    if job.is_streamed:
        making.progress.note("the parent's weights stay on the disk; a layer at a time is read.")
    for note in found.notes:
        making.progress.note(note)
    data = {
        "axes": [to_data(axis) for axis in found.axes],
        "alternatives": [to_data(alternative) for alternative in found.alternatives],
        "ffn_ranking": found.ffn_ranking,
        "notes": found.notes,
    }
    write_json(making.folder / _FILE, data)


def _read(job: Job, folder: Path) -> Survey:
    data = read_json(folder / _FILE)
    return Survey(
        axes=[parse(LayerAxes, entry, _FILE) for entry in data["axes"]],
        alternatives=[parse(Alternative, entry, _FILE) for entry in data["alternatives"]],
        ffn_ranking=data["ffn_ranking"],
        notes=data["notes"],
    )


DESCRIBE = Stage(
    name="describe",
    inputs=_inputs,
    make=_make,
    read=_read,
    is_shared=True,
)
