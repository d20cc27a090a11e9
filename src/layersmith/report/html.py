"""The report's data as one self-contained HTML page.

The page loads nothing: Vega, which draws the plots, lies in it. Every plot has a table behind it that says the same,
for those who cannot see it and for browsers without scripts, where the tables stand open. The data is what
:func:`layersmith.report.collect.collect` gives.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from layersmith.costs.budget import is_throughput
from layersmith.report.charts import heat_map, importance, mosaic
from layersmith.report.comparisons import checked_scores, checked_sums, checked_times, frontier_plot, locally, training
from layersmith.report.plot import Plot, data_sets
from layersmith.report.words import (
    cost_label,
    cost_unit,
    load_in_words,
    metric_label,
    number,
    ordered_costs,
    ratio,
    share,
    with_noise,
)
from layersmith.units import format_cost, format_seconds

_NOT_COSTS = ("name",)


def render(report: dict[str, Any]) -> str:
    """The page; equal data give equal text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "noise": with_noise, "metric": metric_label}
    found = plots(report)
    every = [plot for section in found.values() for plot in section]
    return environment.from_string(_own("template.html.jinja")).render(
        report=report,
        answer=answer(report),
        cards=_cards(report),
        costs=_cost_rows(report),
        load=f"; timed on {load_in_words(report['times'])}" if report["times"] else "",
        budget=[_budget_row(row) for row in report["budget"]],
        plots=found,
        objective=metric_label(report["scores"]["objective"]),
        timings=_timings(report["timings"]),
        recipe=json.dumps(report["recipe"], indent=2),
        style=_own("style.css"),
        script=_own("draw.js"),
        vega=vega() if every else "",
        specs=for_script({plot.name: plot.spec for plot in every}),
        data=for_script(data_sets(every)),
    )


def plots(report: dict[str, Any]) -> dict[str, list[Plot]]:
    """The plots of each section of the page; none where there is nothing to show."""
    frontier, distillation = report["frontier"], report["distillation"]
    return {
        "frontier": [frontier_plot(report)] if frontier and frontier["points"] else [],
        "layers": [mosaic(report)],
        "scores": [heat_map(report)] if any(c is not None for row in report["scores"]["rows"] for c in row) else [],
        "importance": importance(report["importance"]),
        "checks": [*checked_scores(report["checks"]["scores"]), *checked_sums(report), *checked_times(report)],
        "distillation": [*training(distillation["curves"]), *locally(distillation["alternatives"])]
        if distillation
        else [],
    }


def _own(name: str) -> str:
    return files("layersmith.report").joinpath(name).read_text(encoding="utf-8")


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, for the specifications that this Altair writes."""
    import vl_convert

    names = "window.vegaEmbed = vegaEmbed;"
    return vl_convert.javascript_bundle(names)


def for_script(data: Any) -> str:
    """JSON that can stand in a script element whatever is in it: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def answer(report: dict[str, Any]) -> str:
    """What came out, in one sentence."""
    parent, child = report["parent"], report["child"]
    rows = {row["metric"]: row for row in report["evaluation"]["rows"]}
    loss = rows["loss"]
    words = [
        f"{format_cost('parameters', child['parameters'])} of {format_cost('parameters', parent['parameters'])} "
        f"parameters ({share(child['parameters'], parent['parameters'])})",
        f"{share(child['memory_bytes'], parent['memory_bytes'])} of the memory",
    ]
    words += [
        f"{share(child[name], parent[name])} of the {cost_label(name)}"
        for name in _cost_names(report)
        if cost_unit(name) == "seconds"
    ]
    costs = " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{costs}, for a loss of {number(loss['child'], 3)} instead of {number(loss['parent'], 3)} nats a token."


def _cost_names(report: dict[str, Any]) -> list[str]:
    return ordered_costs(name for name in report["parent"] if name not in _NOT_COSTS)


def _cards(report: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers that people look for first."""
    parent, child = report["parent"], report["child"]
    wanted = ["parameters", "memory_bytes", *(n for n in _cost_names(report) if cost_unit(n) in _MEASURED)]
    cards = [
        {
            "label": cost_label(name),
            "value": format_cost(name, child[name]),
            "was": f"parent {format_cost(name, parent[name])}",
            "change": change(1.0, ratio(name, parent[name], child[name]) or 0.0) if parent[name] else "",
        }
        for name in wanted
    ]
    rows = {row["metric"]: row for row in report["evaluation"]["rows"]}
    for name, digits in (("loss", 3), ("kl_divergence", 4)):
        row = rows.get(name)
        if row is not None:
            before = f"parent {number(row['parent'], digits)}" if row["parent"] is not None else "parent 0"
            error = row["child_standard_error"] if row["difference"] is None else row["difference_standard_error"]
            cards.append(
                {
                    "label": "LM loss, nats a token" if name == "loss" else "KL to the parent, nats a token",
                    "value": number(row["child"], digits),
                    "was": before,
                    "change": f"{with_noise(row['difference'], error, True, digits)}"
                    if row["difference"] is not None
                    else ("" if error is None else f"± {number(error)}"),
                }
            )
    if (row := rows.get("top_1_agreement")) is not None:
        error = row["child_standard_error"]
        cards.append(
            {
                "label": "same next token",
                "value": f"{row['child']:.1%}",
                "was": "of the parent's first choices",
                "change": "" if error is None else f"± {error:.1%}",
            }
        )
    return cards


_MEASURED = ("seconds", "tokens a second")


def change(before: float, after: float) -> str:
    """``10`` to ``7`` as ``−30%``."""
    if not before:
        return ""
    percent = round(100 * (after / before - 1))
    return "±0%" if percent == 0 else f"{'+' if percent > 0 else '−'}{abs(percent)}%"


def _cost_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name in _cost_names(report):
        before, after = report["parent"][name], report["child"][name]
        rows.append(
            {
                "label": cost_label(name),
                "parent": format_cost(name, before),
                "child": format_cost(name, after),
                "share": share(after, before) if not is_throughput(name) else share(before, after),
            }
        )
    return rows


def _budget_row(row: dict[str, Any]) -> dict[str, Any]:
    name, whole = row["label"], row["parent"]
    counted = row["unit"] in ("bytes", "count")
    return {
        "label": cost_label(name),
        "limit": format_cost(name, row["limit"]),
        "used": format_cost(name, row["used"]),
        "exact": f"{row['used']:,} of {row['limit']:,}" if counted else "",
        "of_parent": share(whole, row["limit"]) if is_throughput(name) else share(row["limit"], whole),
        "percent": min(100.0, 100.0 * row["used"] / row["limit"]) if row["limit"] else 0.0,
    }


def _timings(timings: list[dict[str, Any]]) -> dict[str, Any]:
    whole = sum(t["seconds"] for t in timings)
    longest = max((t["seconds"] for t in timings), default=0.0)
    return {
        "total": format_seconds(whole),
        "rows": [
            {
                "stage": t["stage"],
                "time": format_seconds(t["seconds"]),
                "share": share(t["seconds"], whole),
                "percent": 100.0 * t["seconds"] / longest if longest else 0.0,
                "interruptions": t["interruptions"],
            }
            for t in timings
        ],
    }
