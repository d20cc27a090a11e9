"""Everything that a report shows, as JSON data, from what the stages gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layersmith.library.alternative import Alternative, in_words
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.scoring.metrics import METRICS
from layersmith.scoring.score import Score
from layersmith.search.budget import format_bytes, format_count
from layersmith.search.choose import Choice

_UNITS = {
    "kl_divergence": "nats a token",
    "lm_loss": "nats a token",
    "hidden_distance": "1 - cosine",
}


def collect(
    header: dict[str, Any],
    library: Library,
    scores: list[Score],
    choice: Choice,
    costs: Mapping[str, Mapping[str, int]],
    evaluation: dict[str, Any],
    recipe: Recipe,
) -> dict[str, Any]:
    """The report's data; :mod:`layersmith.report.html` says what is in it."""
    before, after = choice.parent_costs, choice.costs
    name = str(header["parent"]["path"]).rstrip("/").rsplit("/", 1)[-1]
    objective = recipe.scoring.objective
    return {
        "title": f"{name}: {format_count(before['parameters'])} to {format_count(after['parameters'])} parameters",
        "parent": {"name": name, **before},
        "child": {"name": f"{name}, child", **after},
        "batch": choice.budget.batch,
        "context": choice.budget.context,
        "budget": [
            {
                "label": cost,
                "limit": limit,
                "unit": "bytes" if cost.endswith("bytes") else "count",
                "used": after[cost],
                "parent": before[cost],
            }
            for cost, limit in choice.limits.items()
        ],
        "evaluation": {
            "tokens": evaluation["tokens"],
            "sequences": evaluation["sequences"],
            "rows": evaluation["rows"],
        },
        "layers": _layers(library, scores, choice, costs, objective),
        "scores": _heat_map(scores, choice, objective),
        "search": {"score": choice.score, "proven_optimal": choice.proven_optimal},
        "samples": evaluation["samples"],
        "recipe": recipe.to_dict(),
        "environment": header["versions"]
        | {"device": str(library.parent.runtime.device.type), "dtype": str(library.parent.runtime.dtype)},
        "warnings": [*header["data"].get("warnings", []), *library.notes],
    }


def describe_subblock(library: Library, alternative: Alternative) -> str:
    """What a subblock is with this alternative, in a word or two."""
    return in_words(alternative.subblock_config(library.parent.blocks[alternative.layer]))


def _layers(
    library: Library,
    scores: list[Score],
    choice: Choice,
    costs: Mapping[str, Mapping[str, int]],
    objective: str,
) -> list[dict[str, Any]]:
    by_key = {score.alternative.key: score for score in scores}
    rows: list[dict[str, Any]] = [{"layer": i} for i in range(len(library.parent.blocks))]
    for alternative in choice.alternatives:
        parent = Alternative(alternative.layer, alternative.subblock, "parent")
        own, full = costs[alternative.key]["parameters"], costs[parent.key]["parameters"]
        rows[alternative.layer][alternative.subblock] = {
            "parent": describe_subblock(library, parent),
            "child": describe_subblock(library, alternative),
            "kind": alternative.kind,
            "method": alternative.method,
            "kept": own / full if full else 1.0,
            "parameters": own,
            "parent_parameters": full,
            "score": by_key[alternative.key].mean(objective),
        }
    return rows


def _heat_map(scores: list[Score], choice: Choice, objective: str) -> dict[str, Any]:
    chosen = {a.key for a in choice.alternatives}
    names = list(dict.fromkeys(s.alternative.name for s in scores if s.alternative.kind != "parent"))
    columns = sorted(names, key=lambda name: not name.startswith("attention"))
    layers = sorted({s.alternative.layer for s in scores})
    cells = {(s.alternative.layer, s.alternative.name): s for s in scores}
    rows = []
    for layer in layers:
        row: list[dict[str, Any] | None] = []
        for column in columns:
            score = cells.get((layer, column))
            row.append(
                None
                if score is None
                else {
                    "value": score.mean(objective),
                    "standard_error": score.standard_error(objective),
                    "chosen": score.alternative.key in chosen,
                    "metrics": {metric: score.mean(metric) for metric in METRICS if metric in score.rows},
                    "exact_rows": score.exact_rows,
                    "rows": len(score.rows[objective]),
                }
            )
        rows.append(row)
    return {"objective": objective, "unit": _UNITS.get(objective, "share of tokens"), "columns": columns, "rows": rows}


def format_cost(name: str, value: int) -> str:
    """A cost for people: ``4.77M`` or ``9.10 MiB``."""
    return format_bytes(value) if name.endswith("bytes") else format_count(value)
