"""The report's data as one self-contained HTML page.

The page loads nothing: Vega, which draws the plots, is in it. Every plot has a table with the same data, for readers
who cannot see it and for browsers without scripts.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined

from layersmith.costs.budget import is_throughput
from layersmith.report.charts import heat_map, importance, mosaic
from layersmith.report.comparisons import checked_scores, checked_sums, checked_times
from layersmith.report.data import BudgetRow, Evaluation, Report, StageTime
from layersmith.report.frontier import frontier_plot
from layersmith.report.plot import Plot, data_sets
from layersmith.report.training import distillation_plots
from layersmith.report.words import (
    cost_label,
    cost_unit,
    metric_label,
    number,
    ordered_costs,
    ratio,
    share,
    with_noise,
    workload_in_words,
)
from layersmith.units import format_cost, format_seconds

_MEASURED = ("seconds", "tokens a second")


def render(data: dict[str, Any]) -> str:
    """The page for the data of ``report.json``; equal data give equal text."""
    report = Report.from_json(data)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "noise": with_noise, "metric": metric_label}
    sections = plots(report)
    every = [plot for section in sections.values() for plot in section]
    return environment.from_string(_file("template.html.jinja")).render(
        report=report,
        answer=answer(report),
        cards=_cards(report),
        child="distilled" if report.distillation and report.distillation.curves else "child",
        costs=_cost_rows(report),
        workload=f"; {workload_in_words(report.times)}" if report.times else "",
        budget=[_budget_row(row) for row in report.budget],
        plots=sections,
        objective=metric_label(report.scores.objective),
        timings=_timings(report.timings),
        recipe=json.dumps(report.recipe, indent=2),
        style=_file("style.css"),
        script=_file("draw.js"),
        vega=vega() if every else "",
        specs=for_script({plot.name: plot.spec for plot in every}),
        data=for_script(data_sets(every)),
    )


def plots(report: Report) -> dict[str, list[Plot]]:
    """The plots of each section of the page."""
    frontier, checks = report.frontier, report.checks
    return {
        "frontier": [frontier_plot(report, frontier)] if frontier and frontier.points else [],
        "layers": [mosaic(report.layers)],
        "scores": [] if report.scores.is_empty else [heat_map(report.scores)],
        "importance": importance(report.importance),
        "checks": [*checked_scores(checks.scores), *checked_sums(report), *checked_times(report)],
        "distillation": distillation_plots(report.distillation),
    }


def _file(name: str) -> str:
    return files("layersmith.report").joinpath(name).read_text(encoding="utf-8")


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the versions that Altair's specifications need."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script


def for_script(data: Any) -> str:
    """JSON that is safe in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------------------------------------- numbers


def answer(report: Report) -> str:
    """The result in one sentence."""
    parent, child = report.parent.costs, report.child.costs
    was, now = (format_cost("parameters", costs["parameters"]) for costs in (parent, child))
    words = [
        f"{now} of {was} parameters ({share(child['parameters'], parent['parameters'])})",
        f"{share(child['memory_bytes'], parent['memory_bytes'])} of the memory",
    ]
    timed = [name for name in ordered_costs(parent) if cost_unit(name) == "seconds" and not _is_uncertain(report, name)]
    words += [f"{share(child[name], parent[name])} of the {cost_label(name)}" for name in timed]
    costs = " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
    loss = report.evaluation.row("loss")
    if loss is None:
        return f"{costs}."
    return f"{costs}, for a loss of {number(loss.child, 3)} instead of {number(loss.parent, 3)} nats a token."


def _is_uncertain(report: Report, name: str) -> bool:
    """Whether a cost is a time that was measured while the machine was busy."""
    return report.times is not None and report.times.is_busy and name in report.times.child


def _cards(report: Report) -> list[dict[str, str]]:
    """The numbers that readers look for first."""
    parent, child = report.parent.costs, report.child.costs
    names = ["parameters", "memory_bytes", *(n for n in ordered_costs(parent) if cost_unit(n) in _MEASURED)]
    return [
        {
            "label": cost_label(name),
            "value": format_cost(name, child[name]),
            "was": f"parent {format_cost(name, parent[name])}",
            "change": ""
            if not parent[name] or _is_uncertain(report, name)
            else change(1.0, ratio(name, parent[name], child[name]) or 0.0),
            "better": "yes" if child[name] <= parent[name] else "no",
        }
        for name in names
    ] + _quality_cards(report.evaluation)


def _quality_cards(evaluation: Evaluation) -> list[dict[str, str]]:
    cards = []
    loss, perplexity = evaluation.row("loss"), evaluation.row("perplexity")
    if loss is not None and loss.parent is not None:
        was = f"parent {number(loss.parent, 3)}"
        if perplexity is not None:
            was += f"; perplexity {number(perplexity.parent, 2)} → {number(perplexity.child, 2)}"
        cards.append(
            {
                "label": "LM loss, nats a token",
                "value": number(loss.child, 3),
                "was": was,
                "change": change(loss.parent, loss.child, digits=1),
                "better": "yes" if loss.child <= loss.parent else "no",
            }
        )
    if kl := evaluation.row("kl_divergence"):
        error = "" if kl.child_standard_error is None else f"± {number(kl.child_standard_error)} "
        card = {"label": "KL divergence to the parent", "value": number(kl.child), "was": f"{error}nats a token"}
        cards.append(card | {"change": "", "better": ""})
    if top := evaluation.row("top_1_agreement"):
        error = "" if top.child_standard_error is None else f"± {top.child_standard_error:.1%}"
        card = {"label": "top-1 agreement with the parent", "value": f"{top.child:.1%}", "was": error}
        cards.append(card | {"change": "", "better": ""})
    return cards


def change(before: float, after: float, digits: int = 0) -> str:
    """``10`` to ``7`` as ``−30%``."""
    if not before:
        return ""
    percent = round(100 * (after / before - 1), digits)
    return "±0%" if percent == 0 else f"{'+' if percent > 0 else '−'}{abs(percent):.{digits}f}%"


def _cost_rows(report: Report) -> list[dict[str, str]]:
    parent, child = report.parent.costs, report.child.costs
    return [
        {
            "label": cost_label(name),
            "parent": format_cost(name, parent[name]),
            "child": format_cost(name, child[name]),
            "share": share(parent[name], child[name]) if is_throughput(name) else share(child[name], parent[name]),
        }
        for name in ordered_costs(parent)
    ]


def _budget_row(row: BudgetRow) -> dict[str, Any]:
    counted = row.unit in ("bytes", "count")
    return {
        "label": cost_label(row.label),
        "limit": format_cost(row.label, row.limit),
        "used": format_cost(row.label, row.used),
        "exact": f"{row.used:,} of {row.limit:,}" if counted else "",
        "of_parent": share(row.parent, row.limit) if is_throughput(row.label) else share(row.limit, row.parent),
        "percent": min(100.0, 100.0 * row.used / row.limit) if row.limit else 0.0,
    }


def _timings(timings: tuple[StageTime, ...]) -> dict[str, Any]:
    whole = sum(t.seconds for t in timings)
    longest = max((t.seconds for t in timings), default=0.0)
    return {
        "total": format_seconds(whole),
        "rows": [
            {
                "stage": t.stage,
                "time": format_seconds(t.seconds),
                "share": share(t.seconds, whole),
                "percent": 100.0 * t.seconds / longest if longest else 0.0,
                "interruptions": t.interruptions,
            }
            for t in timings
        ],
    }
