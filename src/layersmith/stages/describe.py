"""The first stage: find what can be changed in the parent, and prove it on its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.library.library import LibraryData, parse_alternatives
from layersmith.library.survey import Survey, survey
from layersmith.records import check, to_data
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.stage import Making, Stage
from layersmith.stages.job import Job

_FILE = "survey.json"


def _inputs(job: Job) -> Any:
    return [job.identity, job.descriptor, job.settings("library"), job.dtype]


def _make(job: Job, making: Making) -> None:
    with making.progress.stage("describe", 1, "parent") as advance:
        surveyed = survey(job.parent, job.recipe.library)
        advance(1)
    if job.is_streamed:
        making.progress.note("the parent's weights stay on the disk; a layer at a time is read.")
    for note in surveyed.notes:
        making.progress.note(note)
    data = {
        "axes": [to_data(axis) for axis in surveyed.axes],
        "alternatives": [alternative.to_data() for alternative in surveyed.alternatives],
        "ffn_ranking": surveyed.ffn_ranking,
        "notes": surveyed.notes,
    }
    write_json(making.folder / _FILE, data)


def _read(job: Job, folder: Path) -> Survey:
    data = read_json(folder / _FILE, LibraryData)
    axes, alternatives = parse_alternatives(data, folder / _FILE)
    return Survey(
        axes=axes,
        alternatives=alternatives,
        ffn_ranking=check(data.get("ffn_ranking"), str, f"{folder / _FILE}: ffn_ranking"),
        notes=data["notes"],
    )


DESCRIBE = Stage(
    name="describe",
    inputs=_inputs,
    make=_make,
    read=_read,
    is_shared=True,
)
