"""Plots of distillation: the child's training, and what local distillation gained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt

from layersmith.report.data import Curve, Distillation, Trained
from layersmith.report.plot import (
    SERIES,
    Plot,
    Table,
    colours,
    dashed,
    legend,
    make_spec,
    subblock_label,
    tooltip,
)
from layersmith.report.words import number


def distillation_plots(distillation: Distillation | None) -> list[Plot]:
    """All plots of the section on distillation."""
    if distillation is None:
        return []
    shown = [a for a in distillation.alternatives if a.before > 0]
    return [*training(distillation.curves), *locally(shown), *while_training(shown)]


def training(curves: Sequence[Curve]) -> list[Plot]:
    """Loss of global distillation against tokens."""
    data = [
        {"name": c.name, "tokens": p.tokens, "loss": float(p.loss)}
        for c in curves
        for p in c.points
        if p.loss is not None and math.isfinite(p.loss)
    ]
    if not data:
        return []
    names = list(dict.fromkeys(str(d["name"]) for d in data))
    base = alt.Chart(alt.NamedData("training")).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
        y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        color=colours("name", names),
        tooltip=tooltip(name="curve", tokens="tokens", loss="loss"),
    )
    lines = base.mark_line(strokeWidth=2).encode(strokeDash=dashed("name", names))
    chart = alt.layer(lines, base.mark_point(filled=True, size=25, opacity=1)).properties(height=280)
    rows = [[str(d["name"]), f"{d['tokens']:,}", number(float(d["loss"]))] for d in data]
    title = "Global distillation: training loss"
    return [Plot("training", title, "", make_spec(chart, title), data, Table(title, ["curve", "tokens", "loss"], rows))]


def locally(alternatives: Sequence[Trained]) -> list[Plot]:
    """The error that local distillation left of each alternative's error."""
    if not alternatives:
        return []
    data = [
        {
            "layer": a.layer,
            "subblock": subblock_label(a.subblock),
            "alternative": a.of,
            "left": a.after / a.before,
            "before": number(a.before),
            "after": number(a.after),
            "tokens": f"{a.tokens:,}",
        }
        for a in alternatives
    ]
    chart = (
        alt.Chart(alt.NamedData("locally"))
        .mark_point(filled=True, size=40, opacity=0.8)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("left:Q", title="remaining error", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
            color=alt.Color("subblock:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
            tooltip=tooltip(
                alternative="alternative", before="error before", after="error after", left="remaining", tokens="tokens"
            ),
        )
        .properties(height=260)
    )
    title = "Local distillation: error after training, relative to before"
    note = (
        "One point per trained alternative, or per layer whose attention and FFN were trained jointly. 100% is no gain."
    )
    rows = [
        [a.of, number(a.before), number(a.after), f"{a.after / a.before:.0%}", f"{a.tokens:,}"] for a in alternatives
    ]
    table = Table(title, ["alternative", "before", "after", "remaining", "tokens"], rows)
    width = 60 + 14 * len({a.layer for a in alternatives})
    return [Plot("locally", title, note, make_spec(chart, title), data, table, min_width=width)]


def while_training(alternatives: Sequence[Trained]) -> list[Plot]:
    """Error on held-out rows against training tokens."""
    data = [
        {"alternative": a.of, "subblock": subblock_label(a.subblock), "tokens": tokens, "left": error / a.curve[0][1]}
        for a in alternatives
        if a.curve and a.curve[0][1] > 0
        for tokens, error in a.curve
    ]
    if not data:
        return []
    base = alt.Chart(alt.NamedData("on_the_way")).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
        y=alt.Y("left:Q", title="remaining error", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        color=alt.Color("subblock:N", title=None, scale=alt.Scale(range=SERIES), legend=legend()),
        detail="alternative:N",
        tooltip=tooltip(alternative="alternative", tokens="tokens", left="remaining"),
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.6)
    chart = alt.layer(lines, base.mark_point(filled=True, size=14, opacity=0.8)).properties(height=260)
    title = "Local distillation: error on held-out rows during training"
    note = "One line per trained alternative or layer. Errors are relative to the start; the best weights are kept."
    rows = [[str(d["alternative"]), f"{d['tokens']:,}", f"{d['left']:.1%}"] for d in data]
    table = Table(title, ["alternative", "tokens", "remaining"], rows)
    return [Plot("on_the_way", title, note, make_spec(chart, title), data, table)]
