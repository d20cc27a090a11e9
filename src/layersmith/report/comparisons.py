"""Plots of predictions against measurements: scores, sums of scores, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from layersmith.report.data import CheckedScore, Report
from layersmith.report.plot import SERIES, SHAPES, Plot, Table, legend, log_ticks, make_spec, subblock_label, tooltip
from layersmith.report.words import metric_label, metric_unit, number, with_noise

_PHASES = {"prefill": "time to first token", "decode": "time per token"}


@dataclass(frozen=True)
class _Axis:
    """A field of the records and its title."""

    field: str
    title: str


def checked_scores(checks: Sequence[CheckedScore]) -> list[Plot]:
    """Second-order estimates against exact runs on the same rows."""
    shown = [c for c in checks if c.estimated > 0 and c.exact > 0]
    if not shown:
        return []
    data = [
        {
            "estimated": c.estimated,
            "exact": c.exact,
            "subblock": subblock_label(c.subblock),
            "alternative": f"layer {c.layer}: {c.alternative}",
            "rows": c.rows,
        }
        for c in shown
    ]
    rows = [
        [f"layer {c.layer}: {c.alternative}", number(c.estimated), number(c.exact), f"{c.exact / c.estimated:.2f}",
         str(c.rows)]
        for c in shown
    ]  # fmt: skip
    x = _Axis("estimated", "second-order estimate (nats a token)")
    y = _Axis("exact", "exact (nats a token)")
    tips = tooltip(alternative="alternative", estimated="estimated", exact="exact", rows="rows")
    note = "On the dashed line, the estimate equals the exact score. Estimates are shown before they are corrected."
    caption = "Second-order estimates of the KL divergence against exact runs on the same rows (nats a token)"
    headings = ["alternative", "estimated", "exact", "exact / estimated", "rows"]
    spec = _against("estimates", data, x, y, "subblock", tips)
    return [Plot("estimates", "Scores: estimated and exact", note, spec, data, Table(caption, headings, rows))]


def checked_sums(report: Report) -> list[Plot]:
    """Sums of scores against measured losses of whole models."""
    objective = report.scores.objective
    shown = [s for s in report.checks.sums if s.predicted > 0 and s.measured is not None and s.measured > 0]
    if not shown:
        return []
    data = [
        {"predicted": s.predicted, "measured": s.measured, "what": s.what, "text": with_noise(s.measured, s.error)}
        for s in shown
    ]
    rows = [
        [s.what, number(s.predicted), with_noise(s.measured, s.error), f"{(s.measured or 0.0) / s.predicted:.2f}"]
        for s in shown
    ]
    label, unit = metric_label(objective), metric_unit(objective)
    x, y = _Axis("predicted", f"predicted: sum of scores ({unit})"), _Axis("measured", f"measured ({unit})")
    tips = tooltip(what="model", predicted="predicted", text="measured")
    note = (
        "The sum of single-replacement scores against the loss of the whole model, measured on different text. On the "
        "dashed line, effects add up exactly."
    )
    headings = ["model", "predicted (sum of scores)", "measured", "measured / predicted"]
    spec = _against("sums", data, x, y, "what", tips)
    title = "Whole models: predicted and measured loss"
    return [Plot("sums", title, note, spec, data, Table(f"{label} ({unit})", headings, rows))]


def checked_times(report: Report) -> list[Plot]:
    """Times of whole children against the sums of the times of their parts."""
    shown = [c for c in report.checks.times if c.predicted > 0 and c.measured > 0]
    if not shown:
        return []
    data = [
        {
            "predicted": c.predicted,
            "measured": c.measured,
            "what": c.what,
            "phase": _PHASES[c.phase],
            "text": f"{c.measured:.3f}x",
        }
        for c in shown
    ]
    rows = [
        [c.what, _PHASES[c.phase], f"{c.predicted:.3f}x", f"{c.measured:.3f}x", _error(c.predicted / c.measured)]
        for c in shown
    ]
    x, y = _Axis("predicted", "sum of parts / parent"), _Axis("measured", "measured / parent")
    tips = tooltip(what="model", phase="", predicted="sum of parts", text="measured")
    note = (
        "Parts are timed in models in which all layers have them. Whole models that were timed before the search "
        "correct the sums of parts. The sum for this child is shown after that correction."
    )
    table = Table("Times relative to the parent's", ["model", "", "sum of parts", "measured", "error"], rows)
    spec = _against("times", data, x, y, "phase", tips)
    return [Plot("times", "Whole models: predicted and measured times", note, spec, data, table)]


def _error(ratio: float) -> str:
    return f"{ratio - 1:+.1%}".replace("-", "\u2212")


def _against(
    name: str, data: Sequence[dict[str, Any]], x: _Axis, y: _Axis, by: str, tips: list[alt.Tooltip]
) -> dict[str, Any]:
    """Points on two logarithmic axes of the same range, with the line of equality; colours by a field."""
    values = [float(d[axis.field]) for d in data for axis in (x, y)]
    low, high = min(values), max(values)
    widen = 1.3 if high > 4 * low else 4.0
    domain = [low / widen, high * widen]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    ticks = alt.Axis(format="~g", values=log_ticks(domain[0], domain[1]))

    def at(x_field: str, y_field: str) -> dict[str, Any]:
        return {
            "x": alt.X(f"{x_field}:Q", scale=scale, axis=ticks, title=x.title),
            "y": alt.Y(f"{y_field}:Q", scale=scale, axis=ticks, title=y.title),
        }

    line = (
        alt.Chart(alt.InlineData(values=[{"at": v} for v in domain]))
        .mark_line(strokeDash=[5, 4], strokeWidth=1.2, color="theme:soft")
        .encode(**at("at", "at"))
    )
    points = (
        alt.Chart(alt.NamedData(name))
        .mark_point(filled=True, size=60, opacity=0.85)
        .encode(
            **at(x.field, y.field),
            color=alt.Color(f"{by}:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
            shape=alt.Shape(f"{by}:N", title=None, scale=alt.Scale(range=SHAPES), legend=legend()),
            tooltip=tips,
        )
    )
    return make_spec(alt.layer(line, points).properties(height=300), f"{y.title} against {x.title}")
