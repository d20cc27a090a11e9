"""The frontier: loss against cost, for the search, for baselines and for the run's child."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import altair as alt

from layersmith.report.data import THIS_CHILD, Frontier, FrontierPoint, Report, Series
from layersmith.report.plot import (
    DASHES,
    SERIES,
    SHAPES,
    Plot,
    Table,
    cycled,
    legend,
    log_ticks,
    make_spec,
    tooltip,
)
from layersmith.report.words import cost_label, metric_label, metric_unit, number, with_noise
from layersmith.units import format_cost

_KINDS = ("predicted", "measured")


@dataclass(frozen=True)
class _Drawing:
    """The frontier with the records that are drawn of it, and the run's child if it was measured."""

    report: Report
    frontier: Frontier
    records: list[dict[str, Any]]
    child: dict[str, Any] | None

    @property
    def title(self) -> str:
        return f"{metric_label(self.frontier.objective)} ({metric_unit(self.frontier.objective)})"

    def extent(self) -> tuple[float, float]:
        """The range of the loss axis."""
        shown = [d["value"] for d in self.records] + ([self.child["value"]] if self.child else [])
        return min(shown, default=0.1) / 1.6, max([d["high"] for d in self.records] + shown, default=1.0) * 1.2


def frontier_plot(report: Report, frontier: Frontier) -> Plot:
    """Loss against cost; hovering anywhere shows all series at that cost."""
    records = [
        record
        for series in frontier.series()
        for point in series.points
        for record in _records(frontier, series, point)
    ]
    drawing = _Drawing(report, frontier, records, _this_child(report, frontier))
    low, _ = drawing.extent()
    for record in records:
        record["low"] = max(record["low"], low)  # a logarithmic axis cannot show an interval that reaches 0
    cost = cost_label(frontier.cost)
    budget = ""
    if frontier.budget.limit is not None and (whole := report.parent.costs.get(frontier.cost)):
        amount = format_cost(frontier.cost, frontier.budget.limit)
        budget = (
            f" The dashed vertical line is the budget: {amount}, {frontier.budget.limit / whole:.0%} of the parent."
        )
    return Plot(
        "frontier",
        f"Loss for every budget of {cost}",
        "Lines are predicted: sums of scores. Points are measured on whole models, with one standard error. Lower is "
        "better. The parent, with a loss increase of 0, cannot be shown on a logarithmic axis." + budget,
        make_spec(_chart(drawing).properties(height=360), f"Frontier: {drawing.title} against {cost}"),
        records,
        _table(drawing),
        min_width=460,
    )


def _records(frontier: Frontier, series: Series, point: FrontierPoint) -> list[dict[str, Any]]:
    """The predicted and the measured loss of a point, as far as they are positive."""
    measured = point.measured
    values = ((point.score, None), (measured.mean, measured.error) if measured else (None, None))
    return [
        {
            "series": series.name,
            "what": what,
            "label": f"{series.name}, {what}",
            "fraction": point.fraction,
            "value": float(value),
            "low": float(value - (error or 0)),
            "high": float(value + (error or 0)),
            "cost": format_cost(frontier.cost, point.cost),
            "text": with_noise(value, error),
        }
        for what, (value, error) in zip(_KINDS, values, strict=True)
        if value is not None and math.isfinite(value) and value > 0
    ]


def _this_child(report: Report, frontier: Frontier) -> dict[str, Any] | None:
    """The run's child in the plane of the frontier; None if it was not measured by the frontier's objective."""
    check = next((s for s in report.checks.sums if s.what == THIS_CHILD), None)
    before, after = report.parent.costs.get(frontier.cost), report.child.costs.get(frontier.cost)
    if check is None or not before or after is None or frontier.objective != report.scores.objective:
        return None
    if not (check.measured or 0) > 0:
        return None
    return {
        "series": THIS_CHILD,
        "label": f"{THIS_CHILD}, measured",
        "fraction": after / before,
        "value": check.measured,
        "cost": format_cost(frontier.cost, after),
        "text": with_noise(check.measured, check.error),
    }


def _table(drawing: _Drawing) -> Table:
    cost = drawing.frontier.cost
    rows = [
        [
            series.name,
            format_cost(cost, p.cost),
            f"{p.fraction:.1%}",
            number(p.score),
            with_noise(p.measured.mean, p.measured.error) if p.measured else "",
        ]
        for series in drawing.frontier.series()
        for p in sorted(series.points, key=lambda p: p.fraction)
    ]
    if child := drawing.child:
        rows.append([THIS_CHILD, child["cost"], f"{child['fraction']:.1%}", "", child["text"]])
    headings = ["series", cost_label(cost), "of the parent", "predicted (sum of scores)", "measured"]
    return Table(f"The frontier: {drawing.title}", headings, rows)


# ---------------------------------------------------------------------------------------------- drawing


def _chart(drawing: _Drawing) -> Any:
    """Lines, points with errors, the budget, the child, and on top an invisible layer for the tooltip."""
    names = [series.name for series in drawing.frontier.series()]
    labels = [f"{name}, {what}" for what in _KINDS for name in names]
    present = [label for label in labels if any(d["label"] == label for d in drawing.records)]
    places = [names.index(label.rsplit(", ", 1)[0]) for label in present]

    def scale(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=present, range=[cycled(values, len(names))[i] for i in places])

    low, high = drawing.extent()
    y_scale = alt.Scale(type="log", domain=[low, high])
    y = alt.Y("value:Q", title=drawing.title, scale=y_scale, axis=alt.Axis(format="~g", values=log_ticks(low, high)))
    x = alt.X(
        "fraction:Q",
        title=f"{cost_label(drawing.frontier.cost)}, share of the parent's",
        scale=alt.Scale(zero=False, nice=True),
        axis=alt.Axis(format="%"),
    )
    color = alt.Color("label:N", title=None, scale=scale(SERIES), legend=legend())
    base = alt.Chart(alt.NamedData("frontier")).encode(x=x, color=color)
    layers: list[Any] = []
    if any(d["what"] == "predicted" for d in drawing.records):
        dashes = alt.StrokeDash("label:N", scale=scale(DASHES), title=None, legend=legend())
        predicted = base.transform_filter("datum.what == 'predicted'")
        layers.append(predicted.mark_line(strokeWidth=2).encode(y=y, strokeDash=dashes))
    if any(d["what"] == "measured" for d in drawing.records):
        measured = base.transform_filter("datum.what == 'measured'")
        shape = alt.Shape("label:N", title=None, scale=scale(SHAPES), legend=legend())
        error = measured.mark_rule(strokeWidth=1.5)
        layers.append(error.encode(y=alt.Y("low:Q", scale=y_scale, title=drawing.title), y2="high:Q"))
        layers.append(measured.mark_point(filled=True, size=70, opacity=1).encode(y=y, shape=shape))
    return alt.layer(*(layers or [base.mark_point()]), *_budget(drawing), *_child(drawing, y), *_hover(drawing))


def _budget(drawing: _Drawing) -> list[alt.Chart]:
    limit, whole = drawing.frontier.budget.limit, drawing.report.parent.costs.get(drawing.frontier.cost)
    if limit is None or not whole:
        return []
    rule = alt.Chart(alt.InlineData(values=[{"at": limit / whole, "label": "budget"}])).encode(x="at:Q")
    text = rule.mark_text(align="right", dx=-5, y=8, color="theme:ink", fontWeight=600).encode(text="label:N")
    return [rule.mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color="theme:ink"), text]


def _child(drawing: _Drawing, y: alt.Y) -> list[alt.Chart]:
    if drawing.child is None:
        return []
    mark = alt.Chart(alt.InlineData(values=[drawing.child])).encode(x="fraction:Q", y=y)
    diamond = mark.mark_point(
        shape="diamond", size=170, strokeWidth=2.5, stroke="theme:ink", fill="theme:paper", opacity=1
    )
    text = mark.mark_text(align="left", dx=12, color="theme:ink", fontWeight=600).encode(text="label:N")
    return [diamond, text]


def _hover(drawing: _Drawing) -> list[alt.Chart]:
    """Invisible columns over the whole plot, whose tooltips give the best model of every series within that cost."""
    series = drawing.frontier.series()
    grid = sorted(
        {p.fraction for s in series for p in s.points} | ({drawing.child["fraction"]} if drawing.child else set())
    )
    if len(grid) < 2:
        return []
    edges = [grid[0], *((a + b) / 2 for a, b in itertools.pairwise(grid)), grid[-1]]
    columns = []
    for at, start, end in zip(grid, edges[:-1], edges[1:], strict=True):
        column: dict[str, Any] = {"start": start, "end": end, "fraction": at}
        for i, one in enumerate(series):
            column[f"s{i}"] = _best_within(one, at)
        if drawing.child and drawing.child["fraction"] <= at:
            column["child"] = f"{drawing.child['text']} measured"
        columns.append({"child": "costs more"} | column)
    fields = {f"s{i}": one.name for i, one in enumerate(series)}
    tips = tooltip(fraction=f"{cost_label(drawing.frontier.cost)}, at most", **fields, child=THIS_CHILD)
    chart = alt.Chart(alt.InlineData(values=columns)).mark_rect(fill="theme:soft", fillOpacity=0)
    return [chart.encode(x="start:Q", x2="end:Q", tooltip=tips)]


def _best_within(series: Series, fraction: float) -> str:
    """The loss of a series' best model that costs at most this share, in words."""
    scored = [p for p in series.points if p.fraction <= fraction + 1e-9 and p.score is not None]
    if not scored:
        return "none"
    best = min(scored, key=lambda p: p.score or 0.0)
    text = f"{number(best.score)} predicted"
    return text + (f", {with_noise(best.measured.mean, best.measured.error)} measured" if best.measured else "")
