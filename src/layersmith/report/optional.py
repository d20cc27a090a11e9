"""What some runs have and others have not: the frontier, distillation, the times of stages.

What a child was before any distillation is what scores predict, so its evaluation is read here too.

Each is read from where its stage writes it; what is not there is None or empty, and the report leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.costs.times import kept_in
from layersmith.run.artifacts import read_json
from layersmith.run.folder import Run

_POINT = ("cost", "fraction", "score", "measured")


def read_optional(run: Run) -> dict[str, Any]:
    """The parts of the report's data that come from files which not every run has."""
    as_cut = run.folder / "evaluation" / "evaluation.json"
    return {
        "as_cut": read_json(as_cut) if as_cut.is_file() else None,
        "times": read_times(run.folder),
        "clock": read_clock(run.folder),
        "frontier": read_frontier(run.folder / "frontier" / "frontier.json"),
        "distillation": read_distillation(run.folder),
        "refined": read_refined(run.folder / "refine" / "refine.json"),
        "timings": run.log.times(),
    }


def read_refined(path: Path) -> dict[str, Any] | None:
    """What refinement tried and gained; None if there was none."""
    if not path.is_file():
        return None
    data = read_json(path)
    return {"tried": data["tried"], "passes": data["passes"], **data["measured"]}


def read_frontier(path: Path) -> dict[str, Any] | None:
    """The frontier without its solutions; None if there is no such file."""
    if not path.is_file():
        return None
    data = read_json(path)
    return {
        "cost": data["cost"],
        "objective": data["objective"],
        "points": [_point(p) for p in data["points"]],
        "baselines": [
            {"name": b["name"], "points": [_point(p) for p in b["points"]]} for b in data.get("baselines", ())
        ],
        "budget": {"limit": data["budget"]["limit"]},
    }


def read_times(folder: Path) -> dict[str, Any] | None:
    """Times of alternatives as they were known last; None where the budget has no limit of time."""
    data = kept_in(folder)
    if data is None:
        return None
    return {name: data[name] for name in ("source", "device", "parent", "checks", "curves")}


def read_clock(folder: Path) -> dict[str, Any] | None:
    """What parent and child took of the clock; None if they were not timed."""
    path = folder / "clock" / "times.json"
    return read_json(path) if path.is_file() else None


def _point(point: dict[str, Any]) -> dict[str, Any]:
    return {name: point.get(name) for name in _POINT}


def read_distillation(folder: Path) -> dict[str, Any] | None:
    """Curves of training, and what local distillation did to each alternative; None if there was neither."""
    curves = []
    for log in map(read_json, sorted((folder / "distillation").rglob("log.json"))):
        for name, points in ((log["name"], log["points"]), (f"{log['name']}, held out", log.get("validation", ()))):
            if points:
                curves.append({"name": name, "x": log["x"], "points": points})
    trained = trained_alternatives(folder)
    return {"curves": curves, "alternatives": trained} if curves or trained else None


def trained_alternatives(folder: Path) -> list[dict[str, Any]]:
    """What local distillation trained, alternatives and pairs: error as they were cut, after, and on the way."""
    names = ("of", "layer", "subblock", "before", "after", "tokens", "curve")
    found = []
    for stage in ("library", "pairs"):
        path = folder / stage / "distilled.json"
        for record in read_json(path) if path.is_file() else ():
            cut = record.get("pruned")
            record = {"curve": []} | record | {"before": record["before"] if cut is None else cut}
            if record["tokens"] and record["before"] is not None and record["after"] is not None:
                found.append({name: record[name] for name in names})
    return found
