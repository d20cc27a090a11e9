"""The plots of whole models and of training: the frontier, predicted against measured, distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layersmith.report.plot import (
    SERIES,
    SHAPES,
    Plot,
    Table,
    cycled,
    dashed,
    legend,
    log_ticks,
    make_spec,
    subblock_label,
    tooltip,
)
from layersmith.report.words import cost_label, metric_label, metric_unit, number, with_noise
from layersmith.units import format_cost

# ---------------------------------------------------------------------------------------------- the frontier


def frontier_plot(report: dict[str, Any]) -> Plot:
    """Score against cost, for the search and for the baselines; what was measured has points with errors."""
    import altair as alt

    frontier = report["frontier"]
    cost, objective = frontier["cost"], frontier["objective"]
    series = [("search", frontier["points"]), *((b["name"], b["points"]) for b in frontier["baselines"])]
    names = [name for name, _ in series]
    data = [record for name, points in series for p in points for record in _frontier_records(cost, name, p)]
    rows = [
        [
            name, format_cost(cost, p["cost"]), f"{p['fraction']:.1%}", number(p["score"]),
            with_noise(p["measured"]["mean"], p["measured"]["error"]) if p["measured"] else "",
        ]
        for name, points in series
        for p in sorted(points, key=lambda p: float(p["fraction"]))
    ]  # fmt: skip
    child = _this_child(report)
    if child is not None:
        rows.append(["this child", child["cost"], f"{child['fraction']:.1%}", "", child["text"]])
    shown = [d["value"] for d in data] + ([child["value"]] if child else [])
    low, high = min(shown, default=0.1) / 1.6, max([d["high"] for d in data] + shown, default=1.0) * 1.2
    for d in data:
        d["low"] = max(d["low"], low)  # what reaches below nothing has no end on a logarithmic scale
    title = f"{metric_label(objective)} ({metric_unit(objective)})"
    y_scale, y_axis = alt.Scale(type="log", domain=[low, high]), alt.Axis(format="~g", values=log_ticks(low, high))
    y = alt.Y("value:Q", title=title, scale=y_scale, axis=y_axis)
    tips = tooltip(series="series", what="what", cost=cost_label(cost), fraction="share", text="value")
    base = alt.Chart(alt.NamedData("frontier")).encode(
        x=alt.X(
            "fraction:Q",
            title=f"{cost_label(cost)}, share of the parent's",
            scale=alt.Scale(zero=False, nice=True),
            axis=alt.Axis(format="%"),
        ),
        color=alt.Color(
            "series:N", title=None, scale=alt.Scale(domain=names, range=cycled(SERIES, len(names))), legend=legend()
        ),
        tooltip=tips,
    )
    sums = base.transform_filter("datum.what == 'sum of scores'").mark_line(strokeWidth=2)
    measured = base.transform_filter("datum.what == 'measured'")
    shape = alt.Shape("series:N", title=None, scale=alt.Scale(domain=names, range=cycled(SHAPES, len(names))))
    there = {d["what"] for d in data}  # a layer without data has no extent
    layers: list[Any] = []
    if "sum of scores" in there:
        layers.append(sums.encode(y=y, strokeDash=dashed("series", names)))
    if "measured" in there:
        layers += [
            measured.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=y_scale, title=title), y2="high:Q"),
            measured.mark_point(filled=True, size=70, opacity=1).encode(y=y, shape=shape),
        ]
    budget = ""
    limit, whole = frontier["budget"]["limit"], report["parent"].get(cost)
    if limit is not None and whole:
        budget = f" The dashed line is the budget: {format_cost(cost, limit)}, {limit / whole:.0%} of the parent."
        rule = alt.Chart(alt.InlineData(values=[{"at": limit / whole, "label": "budget"}])).encode(x="at:Q")
        layers += [
            rule.mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color="theme:ink"),
            rule.mark_text(align="right", dx=-5, y=8, color="theme:ink", fontWeight=600).encode(text="label:N"),
        ]
    if child is not None:
        mark = alt.Chart(alt.InlineData(values=[child])).encode(x="fraction:Q", y=y, tooltip=tips)
        layers += [
            mark.mark_point(shape="diamond", size=170, strokeWidth=2.5, stroke="theme:ink", fill="theme:paper",
                            opacity=1),
            mark.mark_text(align="left", dx=12, color="theme:ink", fontWeight=600).encode(text="series:N"),
        ]  # fmt: skip
    return Plot(
        "frontier",
        f"What each share of {cost_label(cost)} loses",
        "Lines are sums of scores; points are whole models that were run, with one standard error. Lower is better; "
        "the parent itself loses nothing, for which a logarithmic scale has no place." + budget,
        make_spec(
            alt.layer(*layers or [base.mark_point()]).properties(height=360),
            f"Frontier: {title} against {cost_label(cost)}",
        ),
        data,
        Table(f"The frontier: {title}", ["series", cost_label(cost), "share", "sum of scores", "measured"], rows),
    )


def _frontier_records(cost: str, series: str, point: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of a point: its sum of scores, and what was measured; where there is any."""
    measured = point["measured"] or {"mean": None, "error": None}
    found = []
    for what, value, error in (
        ("sum of scores", point["score"], None), ("measured", measured["mean"], measured["error"]),
    ):  # fmt: skip
        if value is not None and math.isfinite(value) and value > 0:
            found.append(
                {
                    "series": series, "what": what, "fraction": point["fraction"], "value": float(value),
                    "low": float(value - (error or 0)), "high": float(value + (error or 0)),
                    "cost": format_cost(cost, point["cost"]), "text": with_noise(value, error),
                }
            )  # fmt: skip
    return found


def _this_child(report: dict[str, Any]) -> dict[str, Any] | None:
    """The run's own child in the plane of its frontier."""
    cost, objective = report["frontier"]["cost"], report["frontier"]["objective"]
    own = next((s for s in report["checks"]["sums"] if s["what"] == "this child"), None)
    before, after = report["parent"].get(cost), report["child"].get(cost)
    if own is None or not before or objective != report["scores"]["objective"] or not (own["measured"] or 0) > 0:
        return None
    return {
        "series": "this child", "what": "measured", "fraction": after / before, "value": own["measured"],
        "cost": format_cost(cost, after), "text": with_noise(own["measured"], own["error"]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- checks


def checked_scores(checks: Sequence[dict[str, Any]]) -> list[Plot]:
    """Estimates against exact runs on the same rows."""
    import altair as alt

    shown = [c for c in checks if c["estimated"] > 0 and c["exact"] > 0]
    if not shown:
        return []
    data = [
        {
            "estimated": c["estimated"], "exact": c["exact"], "subblock": subblock_label(c["subblock"]),
            "alternative": f"layer {c['layer']}: {c['alternative']}", "rows": c["rows"],
        }
        for c in shown
    ]  # fmt: skip
    rows = [
        [d["alternative"], number(c["estimated"]), number(c["exact"]), f"{c['exact'] / c['estimated']:.2f}",
         str(c["rows"])]
        for c, d in zip(shown, data, strict=True)
    ]  # fmt: skip
    values = [float(c[k]) for c in shown for k in ("estimated", "exact")]
    spec = _against(
        "estimates", "estimated", "exact", "second-order estimate (nats a token)", "run exactly (nats a token)",
        min(values), max(values), "subblock",
        tooltip(alternative="alternative", estimated="estimated", exact="exact", rows="rows"), alt,
    )  # fmt: skip
    return [
        Plot(
            "estimates",
            "Scores: estimated against run",
            "On the line the estimate was right. These are estimates before correction; what the exact runs showed "
            "was then used to correct all.",
            spec,
            data,
            Table(
                "Second-order estimates of KL divergence against exact runs on the same rows (nats a token)",
                ["alternative", "estimated", "exact", "exact / estimated", "rows"],
                rows,
            ),
        )
    ]


def checked_sums(report: dict[str, Any]) -> list[Plot]:
    """Sums of scores against what whole models measured."""
    import altair as alt

    objective, sums = report["scores"]["objective"], report["checks"]["sums"]
    shown = [s for s in sums if s["predicted"] > 0 and s["measured"] is not None and s["measured"] > 0]
    if not shown:
        return []
    data = [
        {
            "predicted": s["predicted"], "measured": s["measured"], "what": s["what"],
            "text": with_noise(s["measured"], s["error"]),
        }
        for s in shown
    ]  # fmt: skip
    rows = [
        [s["what"], number(s["predicted"]), d["text"], f"{s['measured'] / s['predicted']:.2f}"]
        for s, d in zip(shown, data, strict=True)
    ]
    values = [float(s[k]) for s in shown for k in ("predicted", "measured")]
    label, unit = metric_label(objective), metric_unit(objective)
    spec = _against(
        "sums", "predicted", "measured", f"sum of scores ({unit})", f"measured ({unit})", min(values), max(values),
        "what", tooltip(what="model", predicted="sum of scores", text="measured"), alt,
    )  # fmt: skip
    return [
        Plot(
            "sums",
            "Whole models: sum of scores against measured",
            "Scores are of one exchange at a time; on the line their sum would be what all exchanges together do. "
            "What a run measures here is on other text than the scores are.",
            spec,
            data,
            Table(f"{label} ({unit})", ["model", "sum of scores", "measured", "measured / sum"], rows),
        )
    ]


_PHASES = {"prefill": "time to first token", "decode": "time per token"}


def checked_times(report: dict[str, Any]) -> list[Plot]:
    """Times of whole children against the sums of their parts."""
    import altair as alt

    checks = [c for c in report["checks"]["times"] if c["predicted"] > 0 and c["measured"] > 0]
    if not checks:
        return []
    data = [
        {
            "predicted": c["predicted"], "measured": c["measured"], "what": c["what"], "phase": _PHASES[c["phase"]],
            "text": f"{c['measured']:.3f}x",
        }
        for c in checks
    ]  # fmt: skip
    rows = [
        [c["what"], _PHASES[c["phase"]], f"{c['predicted']:.3f}x", f"{c['measured']:.3f}x", _off(c)] for c in checks
    ]
    values = [float(c[k]) for c in checks for k in ("predicted", "measured")]
    title = "of the parent's"
    spec = _against(
        "times", "predicted", "measured", f"sum of parts, {title}", f"by the clock, {title}", min(values), max(values),
        "phase", tooltip(what="model", phase="", predicted="sum of parts", text="by the clock"), alt,
    )  # fmt: skip
    return [
        Plot(
            "times",
            "Whole models: times of parts against the clock",
            "Parts are timed in models in which all layers have them. What made-up choices and the solution took as a "
            "whole corrects their sums; this child's is corrected already.",
            spec,
            data,
            Table("Times, of the parent's", ["model", "", "sum of parts", "by the clock", "off by"], rows),
        )
    ]


def _off(check: dict[str, Any]) -> str:
    return f"{check['predicted'] / check['measured'] - 1:+.1%}".replace("-", "\u2212")


def _against(
    name: str, x: str, y: str, x_title: str, y_title: str, low: float, high: float, by: str, tooltip: Any, alt: Any
) -> dict[str, Any]:
    """Points on logarithmic axes of the same range, with the line on which both agree."""
    widen = 1.3 if high > 4 * low else 4.0
    domain = [low / widen, high * widen]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    axis = alt.Axis(format="~g", values=log_ticks(low / widen, high * widen))
    line = (
        alt.Chart(alt.InlineData(values=[{"at": v} for v in domain]))
        .mark_line(strokeDash=[5, 4], strokeWidth=1.2, color="theme:soft")
        .encode(
            x=alt.X("at:Q", scale=scale, axis=axis, title=x_title),
            y=alt.Y("at:Q", scale=scale, axis=axis, title=y_title),
        )
    )
    points = (
        alt.Chart(alt.NamedData(name))
        .mark_point(filled=True, size=60, opacity=0.85)
        .encode(
            x=alt.X(f"{x}:Q", scale=scale, axis=axis, title=x_title),
            y=alt.Y(f"{y}:Q", scale=scale, axis=axis, title=y_title),
            color=alt.Color(f"{by}:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
            shape=alt.Shape(f"{by}:N", title=None, scale=alt.Scale(range=SHAPES), legend=legend()),
            tooltip=tooltip,
        )
    )
    return make_spec(alt.layer(line, points).properties(height=300), f"{y_title} against {x_title}")


# ---------------------------------------------------------------------------------------------- distillation


def training(curves: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss against tokens."""
    import altair as alt

    data = [
        {"name": c["name"], "tokens": p["tokens"], "loss": float(p["loss"])}
        for c in curves
        for p in c["points"]
        if p.get("loss") is not None and math.isfinite(p["loss"])
    ]
    if not data:
        return []
    names = list(dict.fromkeys(d["name"] for d in data))
    base = alt.Chart(alt.NamedData("training")).encode(
        x=alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(format="~s")),
        y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        color=alt.Color("name:N", title=None, scale=alt.Scale(domain=names, range=cycled(SERIES, len(names))),
                        legend=legend()),
        tooltip=tooltip(name="curve", tokens="tokens", loss="loss"),
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=2).encode(strokeDash=dashed("name", names))
    chart = alt.layer(lines, base.mark_point(filled=True, size=25, opacity=1)).properties(height=280)
    rows = [[d["name"], f"{d['tokens']:,}", number(d["loss"])] for d in data]
    title = "Distillation: loss while the child learns from its parent"
    return [Plot("training", title, "", make_spec(chart, title), data, Table(title, ["curve", "tokens", "loss"], rows))]


def locally(alternatives: Sequence[dict[str, Any]]) -> list[Plot]:
    """How much of each alternative's error local distillation left."""
    import altair as alt

    shown = [a for a in alternatives if a["before"] > 0]
    if not shown:
        return []
    data = [
        {
            "layer": a["layer"], "subblock": subblock_label(a["subblock"]), "alternative": a["of"],
            "left": a["after"] / a["before"], "before": number(a["before"]), "after": number(a["after"]),
            "tokens": f"{a['tokens']:,}",
        }
        for a in shown
    ]  # fmt: skip
    base = alt.Chart(alt.NamedData("locally")).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("left:Q", title="error that is left", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)),
        color=alt.Color("subblock:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
        shape=alt.Shape("subblock:N", title=None, scale=alt.Scale(range=SHAPES), legend=legend()),
        xOffset="subblock:N",
        tooltip=tooltip(
            alternative="alternative", before="error before", after="error after", left="left", tokens="tokens"
        ),
    )
    title = "Local distillation: error of each alternative, after against before"
    rows = [[d["alternative"], d["before"], d["after"], f"{d['left']:.0%}", d["tokens"]] for d in data]
    return [
        Plot(
            "locally",
            title,
            "Each point is one alternative: at 100% training it against the parent's subblock changed nothing.",
            make_spec(base.mark_point(filled=True, size=40, opacity=0.8).properties(height=260), title),
            data,
            Table(title, ["alternative", "before", "after", "left", "tokens"], rows),
            min_width=60 + 14 * len({d["layer"] for d in data}),
        ),
        *_on_the_way(shown),
    ]


def _on_the_way(alternatives: Sequence[dict[str, Any]]) -> list[Plot]:
    """Error on held-out rows against the tokens that an alternative has seen."""
    import altair as alt

    data = [
        {"alternative": a["of"], "subblock": subblock_label(a["subblock"]), "tokens": tokens, "left": error / first}
        for a in alternatives
        for first in [a["curve"][0][1] if a["curve"] else 0.0]
        if first > 0
        for tokens, error in a["curve"]
    ]
    if not data:
        return []
    base = alt.Chart(alt.NamedData("on_the_way")).encode(
        x=alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(format="~s")),
        y=alt.Y("left:Q", title="error that is left", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        color=alt.Color("subblock:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
        detail="alternative:N",
        tooltip=tooltip(alternative="alternative", tokens="tokens", left="left"),
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.6)
    chart = alt.layer(lines, base.mark_point(filled=True, size=14, opacity=0.8)).properties(height=260)
    title = "Local distillation: error on held-out rows while alternatives learn"
    note = "A line is an alternative, or what was chosen for a layer, trained together. Training begins at 100%."
    rows = [[d["alternative"], f"{d['tokens']:,}", f"{d['left']:.1%}"] for d in data]
    table = Table(title, ["alternative", "tokens", "left"], rows)
    return [Plot("on_the_way", title, note, make_spec(chart, title), data, table)]
