"""Everything that a report shows, as JSON data, from what the stages gave. docs/report.md says what is in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from layersmith.library.alternative import Alternative, in_words
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.report.words import cost_unit, metric_unit
from layersmith.scoring.metrics import METRICS
from layersmith.scoring.score import Score, losses
from layersmith.search.problem import Solution
from layersmith.units import format_cost

SCHEMA = 1


def collect(
    header: dict[str, Any],
    library: Library,
    scores: list[Score],
    solution: Solution,
    costs: Mapping[str, Mapping[str, int]],
    evaluation: dict[str, Any],
    recipe: Recipe,
    optional: Mapping[str, Any],
) -> dict[str, Any]:
    """The report's data.

    Args:
        header: of the run: parent, versions, data.
        library: the alternatives.
        scores: of all of them.
        solution: the solution.
        costs: key of an alternative to its costs.
        evaluation: as in ``evaluation/evaluation.json``.
        recipe: of the run.
        optional: as :func:`layersmith.report.optional.read_optional` gives it.
    """
    before, after = solution.parent_costs, solution.costs
    times = optional.get("clock")
    if times:  # what the clock says goes before what was predicted
        before, after = before | times["parent"], after | times["child"]
    # A fraction of a time is one of the time that the parent took beside the child.
    timed = {
        cost: limit for cost, limit in solution.budget.resolve(before).items() if times and cost in times["parent"]
    }
    limits = solution.limits | timed
    frontier = optional.get("frontier")
    if frontier is not None and frontier["cost"] in timed:
        frontier = frontier | {"budget": {"limit": timed[frontier["cost"]]}}
    name = parent_name(header)
    objective = recipe.scoring.objective
    kept, own = format_cost("parameters", before["parameters"]), format_cost("parameters", after["parameters"])
    return {
        "schema": SCHEMA,
        "title": f"{name}: {kept} to {own} parameters",
        "parent": {"name": name, **before},
        "child": {"name": f"{name}, child", **after},
        "batch": solution.budget.batch,
        "context": solution.budget.context,
        "budget": [
            {"label": cost, "limit": limit, "unit": cost_unit(cost), "used": after[cost], "parent": before[cost]}
            for cost, limit in limits.items()
        ],
        "evaluation": {
            "tokens": evaluation["tokens"],
            "sequences": evaluation["sequences"],
            "rows": evaluation["rows"],
        },
        "layers": _layers(library, scores, solution, costs, objective),
        "scores": _heat_map(scores, solution, costs, objective),
        "importance": importance(library),
        "checks": {
            "scores": _checked_scores(scores),
            "sums": _checked_sums(solution, optional.get("as_cut") or evaluation, objective, frontier),
            "times": _checked_times(solution, times, optional.get("times")),
        },
        "times": times,
        "search": {
            "score": solution.score,
            "proven_optimal": solution.proven_optimal,
            "bound": solution.bound,
            "refined": optional.get("refined"),
        },
        "frontier": frontier,
        "distillation": optional.get("distillation"),
        "samples": evaluation["samples"],
        "recipe": recipe.to_dict(),
        "environment": header["versions"]
        | {"device": str(library.parent.runtime.device.type), "dtype": str(library.parent.runtime.dtype)},
        "timings": list(optional.get("timings", ())),
        "warnings": list(header["data"].get("warnings", ())),
        "notes": list(library.notes),
    }


def parent_name(header: dict[str, Any]) -> str:
    """The last part of the parent's path or hub name."""
    return str(header["parent"]["path"]).rstrip("/").rsplit("/", 1)[-1]


def described(library: Library, alternative: Alternative) -> tuple[str, str]:
    """What a subblock was and what it is with this alternative.

    A config may leave the number of query heads to the model's own; where the alternative has another, both are said.
    """
    was: Any = Alternative(alternative.layer, alternative.subblock, "parent").subblock_config(
        library.parent.blocks[alternative.layer]
    )
    now: Any = alternative.subblock_config(library.parent.blocks[alternative.layer])
    heads = library.axes[alternative.layer].kv
    unsaid = alternative.subblock == "attention" and was.num_attention_heads is None
    if unsaid and heads is not None and now.num_attention_heads is not None:
        was = dataclasses.replace(was, num_attention_heads=heads.num_heads * heads.together)
    return in_words(was), in_words(now)


def _layers(
    library: Library,
    scores: list[Score],
    solution: Solution,
    costs: Mapping[str, Mapping[str, int]],
    objective: str,
) -> list[dict[str, Any]]:
    loss = losses(scores, objective)
    rows: list[dict[str, Any]] = [{"layer": i} for i in range(len(library.parent.blocks))]
    for alternative in solution.alternatives:
        parent = Alternative(alternative.layer, alternative.subblock, "parent")
        own, full = costs[alternative.key], costs[parent.key]
        was, now = described(library, alternative)
        rows[alternative.layer][alternative.subblock] = {
            "parent": was,
            "child": now,
            "kind": alternative.kind,
            "method": alternative.method,
            "kept": own["parameters"] / full["parameters"] if full["parameters"] else 1.0,
            "parameters": own["parameters"],
            "parent_parameters": full["parameters"],
            "costs": dict(own),
            "parent_costs": dict(full),
            "score": loss[alternative.key],
        }
    return rows


def _heat_map(
    scores: list[Score], solution: Solution, costs: Mapping[str, Mapping[str, int]], objective: str
) -> dict[str, Any]:
    chosen, loss = {a.key for a in solution.alternatives}, losses(scores, objective)
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
                    "loss": loss[score.alternative.key],
                    "chosen": score.alternative.key in chosen,
                    "metrics": {metric: score.mean(metric) for metric in METRICS if metric in score.rows},
                    "exact_rows": score.exact_rows,
                    "rows": len(score.rows[objective]),
                    "costs": dict(costs[score.alternative.key]),
                }
            )
        rows.append(row)
    return {"objective": objective, "unit": metric_unit(objective), "columns": columns, "rows": rows}


# What the curves of a library are of, by the part of their names that follows the layer.
_PARTS = {
    "ffn": ("ffn", "FFN channels"),
    "shared": ("ffn", "channels of shared experts"),
    "experts": ("ffn", "experts"),
    "attention": ("attention", "KV heads"),
    "mixer": ("attention", "groups of mixer heads"),
}


def importance(library: Library) -> list[dict[str, Any]]:
    """A curve for each part of each layer: units left, and the share of the output's energy that is lost."""
    curves = []
    for name, points in library.importance.items():
        found = re.fullmatch(r"(\d+)\.([a-z]+)(?:\.\d+)?", name)
        if found is None or found[2] not in _PARTS or len(points) < 3:
            continue
        subblock, what = _PARTS[found[2]]
        own = {"layer": int(found[1]), "subblock": subblock, "of": what, "name": name, "units": points[0][0]}
        curves.append(own | {"points": [{"left": left, "lost": lost} for left, lost in points]})
    return sorted(curves, key=lambda c: (list(_PARTS).index(c["name"].split(".")[1]), c["layer"], c["name"]))


def _checked_scores(scores: list[Score]) -> list[dict[str, Any]]:
    """Second-order estimates, as they were before any correction, against exact runs on the same rows."""
    return [
        {
            "layer": s.alternative.layer,
            "subblock": s.alternative.subblock,
            "alternative": s.alternative.name,
            "estimated": s.checked[0],
            "exact": s.checked[1],
            "rows": s.exact_rows,
        }
        for s in scores
        if s.checked is not None
    ]


def _checked_sums(
    solution: Solution, evaluation: dict[str, Any], objective: str, frontier: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Sums of scores against what whole models measured: this child, and those of the frontier that were run."""
    found = []
    measured = measured_loss(evaluation, objective)
    if measured is not None:
        found.append({"what": "this child", "predicted": solution.score, **measured})
    if frontier is not None and frontier["objective"] == objective:
        series = [("frontier", frontier["points"]), *((b["name"], b["points"]) for b in frontier["baselines"])]
        found += [
            {"what": name, "predicted": p["score"], "measured": p["measured"]["mean"], "error": p["measured"]["error"]}
            for name, points in series
            for p in points
            if p["measured"] and p["score"] is not None
        ]
    return found


def _checked_times(
    solution: Solution, measured: dict[str, Any] | None, times: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Times of whole children as fractions of the parent's: by the sums of their parts, and by the clock."""
    found: list[dict[str, Any]] = []
    if times is not None:
        found += [
            {
                "what": check["what"],
                "phase": phase,
                "fraction": check["fraction"],
                "predicted": check["parts"][phase] / times["parent"][phase],
                "measured": check["whole"][phase] / check["parent"][phase],
            }
            for check in times["checks"]
            for phase in ("prefill", "decode")
        ]
    if measured is not None and "prefill_seconds" in solution.costs:
        found += [
            {
                "what": "this child",
                "phase": phase,
                "fraction": solution.costs["parameters"] / solution.parent_costs["parameters"],
                "predicted": solution.costs[f"{phase}_seconds"] / solution.parent_costs[f"{phase}_seconds"],
                "measured": measured["child"][f"{phase}_seconds"] / measured["parent"][f"{phase}_seconds"],
            }
            for phase in ("prefill", "decode")
        ]
    return found


def measured_loss(evaluation: dict[str, Any], objective: str) -> dict[str, float | None] | None:
    """How much worse the child is than its parent under an objective, and the error of that."""
    rows = {row["metric"]: row for row in evaluation["rows"]}
    row = rows.get("loss" if objective == "lm_loss" else objective)
    if row is None:
        return None
    if objective == "lm_loss":
        return {"measured": row["difference"], "error": row["difference_standard_error"]}
    value = 1 - row["child"] if objective.endswith("agreement") else row["child"]
    return {"measured": value, "error": row["child_standard_error"]}
