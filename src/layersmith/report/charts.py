"""The plots of what lies in the layers: what became of them, scores, importance.

They are Vega-Lite specifications made by Altair, each with the table that says the same.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from layersmith.report.plot import Plot, Table, log_ticks, make_spec, tooltip
from layersmith.report.words import metric_label, number, with_noise
from layersmith.units import format_cost

# What can become of a subblock: kind of alternative to its name in the legend and the colour's name in the page.
KINDS = {
    "parent": ("as it was", "kind-same"),
    "smaller": ("fewer or narrower", "kind-smaller"),
    "window": ("sees a window", "kind-window"),
    "linear": ("one linear map", "kind-linear"),
    "no_op": ("removed", "kind-removed"),
}
_HEAT = [f"theme:heat-{i}" for i in range(5)]
_LEAST = 1e-6  # scores below look alike on a logarithmic scale


def mosaic(report: dict[str, Any]) -> Plot:
    """Every subblock of every layer: its bar is as long as the share of parameters that is left."""
    import altair as alt

    data, rows = [], []
    for layer in report["layers"]:
        cells = [str(layer["layer"])]
        for place, subblock in enumerate(("attention", "ffn")):
            own = layer[subblock]
            start, kept = 1.04 * place, min(1.0, max(0.0, own["kept"]))
            there = own["parent_parameters"] > 0 or own["kind"] != "parent"
            kind = KINDS[kind_of(own["kind"])][0]
            data.append(
                {
                    "layer": layer["layer"], "subblock": "attention" if place == 0 else "FFN",
                    "start": start, "left": start + kept if there else start, "end": start + 1.0,
                    "kind": kind, "words": _became(own) if there else "none",
                    "was": own["parent"] if there else "none", "now": own["child"] if there else "none",
                    "parameters": _of(own, "parameters"), "memory": _of(own, "memory_bytes"),
                    "method": own["method"].replace("_", " ") or "nothing to choose", "score": number(own["score"]),
                }
            )  # fmt: skip
            cells += [_became(own) if there else "none", f"{kept:.0%}" if there else "", number(own["score"])]
        rows.append(cells)
    step = 24 if len(rows) <= 40 else 17
    occurring = {d["kind"] for d in data}
    there_are = [own for own in KINDS.values() if own[0] in occurring]
    base = alt.Chart(alt.NamedData("mosaic")).encode(
        y=alt.Y("layer:O", axis=_beside("layer")),
        tooltip=tooltip(
            layer="layer", subblock="subblock", was="was", now="is", kind="what happened",
            parameters="parameters", memory="memory", method="made by", score="score",
        ),
    )  # fmt: skip
    color = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=[n for n, _ in there_are], range=[f"theme:{c}" for _, c in there_are]),
        legend=alt.Legend(
            orient="top",
            columns=3 if len(there_are) <= 3 else 2,
            symbolType="square",
            symbolSize=140,
            symbolOpacity=1,
            labelLimit=160,
        ),
    )
    headings = alt.Axis(
        orient="top", values=[0, 1.04], labelExpr="datum.value == 0 ? 'attention' : 'FFN'", labelAlign="left",
        labelFontWeight=600, ticks=False, domain=False, grid=False, title=None,
    )  # fmt: skip
    scale = alt.Scale(domain=[0, 2.04], nice=False)
    track = base.mark_bar(opacity=0.28, height={"band": 0.86}, cornerRadius=2).encode(
        x=alt.X("start:Q", scale=scale, axis=headings), x2="end:Q", color=color
    )
    bar = base.mark_bar(height={"band": 0.86}, cornerRadius=2).encode(
        x=alt.X("start:Q", scale=scale), x2="left:Q", color=color
    )
    text = base.mark_text(
        align="left", dx=6, limit={"expr": "width / 2.04 - 10"}, fontSize=12 if step > 20 else 11
    ).encode(x=alt.X("start:Q", scale=scale), text="words:N", color=alt.value("theme:ink"))
    return Plot(
        "mosaic",
        "Attention and FFN of every layer",
        "A bar is as long as the share of the parent's parameters that is left; behind it, paler, what there was.",
        make_spec(alt.layer(track, bar, text).properties(height=step * len(rows)), "What each layer became"),
        data,
        Table(
            "What each layer became",
            ["layer", "attention", "left", "score", "FFN", "left", "score"],
            rows,
        ),
    )


def kind_of(kind: str) -> str:
    return kind if kind in KINDS else "smaller"


def _became(cell: dict[str, Any]) -> str:
    return cell["child"] if cell["kind"] == "parent" else shorter(cell["parent"], cell["child"])


def shorter(before: str, after: str) -> str:
    """``"8 heads, 4 KV heads"`` to ``"8 heads, 2 KV heads"`` as ``"8 heads, 4 → 2 KV heads"``."""
    if after == "no-op":
        return f"removed ({before})"
    if after.startswith(f"{before}, "):
        return f"{before} + {after[len(before) + 2 :]}"
    one, other = before.split(), after.split()
    if len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 2:
        return " ".join(a if a == b else f"{a} → {b}" for a, b in zip(one, other, strict=True)).replace(", →", " →")
    return f"{before} → {after}"


def _of(cell: dict[str, Any], cost: str) -> str:
    return f"{format_cost(cost, cell['costs'][cost])} of {format_cost(cost, cell['parent_costs'][cost])}"


# ---------------------------------------------------------------------------------------------- scores


def heat_map(report: dict[str, Any]) -> Plot:
    """The score of every alternative of every layer, on a logarithmic scale."""
    import altair as alt

    scores = report["scores"]
    names = _short_names(scores["columns"])
    data, rows = [], []
    for layer, row in enumerate(scores["rows"]):
        cells = [str(layer)]
        for name, cell in zip(scores["columns"], row, strict=True):
            if cell is None or cell["loss"] is None or not math.isfinite(cell["loss"]):
                cells.append("")
                continue
            value = with_noise(cell["value"], cell["standard_error"])
            cells.append(value + (" ✓" if cell["chosen"] else ""))
            data.append(
                {
                    "layer": layer, "alternative": name, "row": names[name],
                    "shown": max(float(cell["loss"]), _LEAST), "score": value,
                    "how": how_scored(cell), "chosen": cell["chosen"], "in it": "yes" if cell["chosen"] else "no",
                    "parameters": format_cost("parameters", cell["costs"]["parameters"]),
                    "memory": format_cost("memory_bytes", cell["costs"]["memory_bytes"]),
                }
            )  # fmt: skip
        rows.append(cells)
    low = min((d["shown"] for d in data), default=_LEAST)
    high = max((d["shown"] for d in data), default=1.0)
    unit = f"{metric_label(scores['objective'])} ({scores['unit']})"
    base = alt.Chart(alt.NamedData("scores")).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(orient="top", labelAngle=0, ticks=False, domain=False)),
        y=alt.Y(
            "row:N",
            title=None,
            sort=list(names.values()),
            axis=alt.Axis(labelLimit=190, ticks=False, domain=False, labelPadding=6),
        ),
        tooltip=tooltip(
            layer="layer", alternative="alternative", score="score", how="how it is known", parameters="parameters",
            memory="memory", **{"in it": "chosen"},
        ),
    )  # fmt: skip
    cells_plot = base.mark_rect(stroke="theme:paper", strokeWidth=1).encode(
        color=alt.Color(
            "shown:Q",
            title="score",
            scale=alt.Scale(type="log", domain=[low, max(high, low * 1.01)], range=_HEAT, interpolate="lab"),
            legend=alt.Legend(orient="top", gradientLength=130, format="~g", values=log_ticks(low, high, 4)),
        )
    )
    dots = (
        base.transform_filter("datum.chosen")
        .mark_point(filled=True, size=44, strokeWidth=1.2, opacity=1, shape="circle")
        .encode(fill=alt.value("#ffffff"), stroke=alt.value("#000000"))
    )
    return Plot(
        "scores",
        f"Scores: {unit} with one alternative in its place",
        "The scale is logarithmic. A white dot marks the alternative that was chosen; where a subblock has none, it "
        "stayed as it was.",
        make_spec(alt.layer(cells_plot, dots).properties(height=20 * len(names)), f"Heat map of scores: {unit}"),
        data,
        Table(f"{unit} when one alternative replaces its subblock; ✓: chosen", ["layer", *scores["columns"]], rows),
        min_width=210 + 15 * len(scores["rows"]),
    )


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Names that fit beside a plot: how an alternative is made is left out where nothing else is called the same."""

    def short(name: str) -> str:
        name = name.replace("with their query heads", "+ queries").replace("attention", "attn.")
        return name.replace("ffn", "FFN").replace("a token", "/ token")

    bare = {name: re.sub(r" \([a-z]+\)$", "", name) for name in names}
    counts = Counter(bare.values())
    return {name: short(bare[name] if counts[bare[name]] == 1 else name) for name in names}


def how_scored(cell: dict[str, Any]) -> str:
    """How a score came about."""
    exact, rows = cell["exact_rows"], cell["rows"]
    if exact == rows:
        return f"run exactly on {rows} rows"
    return f"estimated, run exactly on {exact} of {rows} rows" if exact else "estimated"


def importance(curves: Sequence[dict[str, Any]]) -> list[Plot]:
    """For each part that was ranked: what is lost of a subblock's output as units are removed, a line a layer."""
    import altair as alt

    found = []
    for number_of, what in enumerate(dict.fromkeys(c["of"] for c in curves)):
        own = [c for c in curves if c["of"] == what]
        name = f"importance-{number_of}"
        data = [
            {"layer": c["layer"], "line": c["name"], "left": p["left"] / c["units"], "lost": p["lost"]}
            for c in own
            for p in c["points"]
        ]
        base = alt.Chart(alt.NamedData(name)).encode(
            x=alt.X("left:Q", title=f"{what} that are left", scale=alt.Scale(domain=[1, 0]), axis=alt.Axis(format="%")),
            y=alt.Y("lost:Q", title="output lost (share of its energy)", axis=alt.Axis(format="%")),
            detail="line:N",
        )
        lines = base.mark_line(strokeWidth=1.6, opacity=0.9).encode(
            color=alt.Color(
                "layer:Q",
                title="layer",
                scale=alt.Scale(range=["theme:depth-0", "theme:depth-1", "theme:depth-2"], interpolate="lab"),
                legend=alt.Legend(orient="top", gradientLength=140, tickMinStep=1, format="d")
                if len({c["layer"] for c in own}) > 1
                else None,
            )
        )
        targets = base.mark_line(strokeWidth=9, opacity=0).encode(tooltip=tooltip(layer="layer"))
        shares = (0.875, 0.75, 0.5, 0.25, 0.125)
        rows = [
            [str(c["layer"]), str(c["units"]), *(f"{_at(c, share):.1%}" for share in shares)]
            for c in own
        ]  # fmt: skip
        title = f"Importance: output lost as {what} are removed"
        found.append(
            Plot(
                name,
                title,
                "The least important go first. A line that stays low for long is of a layer that can be narrowed.",
                make_spec(alt.layer(lines, targets).properties(height=260), title),
                data,
                Table(
                    f"Share of the output's energy that is lost when a share of the {what} is left",
                    ["layer", "units", *(f"{share:.1%} left" for share in shares)],
                    rows,
                ),
            )
        )
    return found


def _at(curve: dict[str, Any], share: float) -> float:
    """A curve's value where a share of its units is left, on the line between its points."""
    points = sorted((p["left"] / curve["units"], p["lost"]) for p in curve["points"])
    for (a, lost_a), (b, lost_b) in itertools.pairwise(points):
        if a <= share <= b:
            return lost_a + (lost_b - lost_a) * (share - a) / ((b - a) or 1.0)
    return points[-1][1]


def _beside(title: str) -> Any:
    """An axis of names with its title above them."""
    import altair as alt

    return alt.Axis(
        title=title, titleAngle=0, titleAlign="right", titleBaseline="bottom", titleX=-6, titleY=-6, ticks=False,
        domain=False, labelPadding=6,
    )  # fmt: skip
