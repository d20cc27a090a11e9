"""What some runs have and others have not: the frontier, distillation, the times of stages.

What a child was before any distillation is what scores predict, so its evaluation is read here too.

Each is read from where its stage writes it; what is not there is None or empty, and the report leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.artifacts import read_json
from layersmith.run import Run

_POINT = ("cost", "fraction", "score", "measured")


def read_optional(run: Run) -> dict[str, Any]:
    """The parts of the report's data that come from files which not every run has."""
    as_cut = run.folder / "evaluation" / "evaluation.json"
    return {
        "as_cut": read_json(as_cut) if as_cut.is_file() else None,
        "frontier": read_frontier(run.folder / "frontier" / "frontier.json"),
        "distillation": read_distillation(run.folder),
        "timings": run.times(),
    }


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


def _point(point: dict[str, Any]) -> dict[str, Any]:
    return {name: point.get(name) for name in _POINT}


def read_distillation(folder: Path) -> dict[str, Any] | None:
    """Curves of training, and what local distillation did to each alternative; None if there was neither."""
    logs = sorted((folder / "distillation").rglob("log.json"))
    curves = [
        {"name": log["name"], "x": log["x"], "points": log["points"]}
        for log in map(read_json, logs)
        if log.get("points")
    ]
    local = folder / "library" / "distilled.json"
    blocks = read_json(local) if local.is_file() else []
    return {"curves": curves, "alternatives": blocks} if curves or blocks else None
