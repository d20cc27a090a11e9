"""Plots by layer: what became of each layer, scores, importance. Each has a table with the same data."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt

from layersmith.report.data import Cell, ImportanceCurve, Layer, Scores, Subblock
from layersmith.report.plot import Plot, Table, log_ticks, make_spec, tooltip
from layersmith.report.words import metric_label, number, with_noise
from layersmith.units import format_cost

# Kind of alternative to its label in the legend and the name of its colour in the page.
KINDS = {
    "parent": ("unchanged", "kind-same"),
    "quantized": ("fewer bits", "kind-bits"),
    "smaller": ("smaller", "kind-smaller"),
    "window": ("sliding window", "kind-window"),
    "linear": ("one linear map", "kind-linear"),
    "no_op": ("removed", "kind-removed"),
}
# How an alternative's weights are made, in plain words.
METHODS = {
    "contribution": "keeps the parts that contribute most",
    "iterative": "removes the least important part repeatedly",
    "pool": "averages neighbouring heads",
}
_HEAT = [f"theme:heat-{i}" for i in range(5)]
_LEAST = 1e-6  # lower scores are drawn like this one
_SHARES = (0.875, 0.75, 0.5, 0.25, 0.125)


# ---------------------------------------------------------------------------------------------- the layers


def mosaic(layers: Sequence[Layer]) -> Plot:
    """Two bars per layer, for attention and FFN, as long as the share of parameters that is left."""
    data = [
        _bar(layer.layer, place, subblock)
        for layer in layers
        for place, subblock in enumerate((layer.attention, layer.ffn))
    ]
    rows = []
    for layer in layers:
        cells = [str(layer.layer)]
        for subblock in (layer.attention, layer.ffn):
            left = f"{_left(subblock):.0%}" if _exists(subblock) else ""
            cells += [_became(subblock), left, _bits(subblock), number(subblock.score)]
        rows.append(cells)
    step = 24 if len(rows) <= 40 else 17
    base = alt.Chart(alt.NamedData("mosaic")).encode(
        y=alt.Y("layer:O", axis=_names_axis("layer")),
        tooltip=tooltip(
            layer="layer", subblock="subblock", was="parent", now="child", kind="change",
            parameters="parameters", memory="memory", bits="bits a weight", method="method", score="score",
        ),
    )  # fmt: skip
    headings = alt.Axis(
        orient="top", values=[0, 1.04], labelExpr="datum.value == 0 ? 'attention' : 'FFN'", labelAlign="left",
        labelFontWeight=600, ticks=False, domain=False, grid=False, title=None,
    )  # fmt: skip
    scale, color = alt.Scale(domain=[0, 2.04], nice=False), _kind_colors({d["kind"] for d in data})
    x = alt.X("start:Q", scale=scale, axis=headings)
    track = base.mark_bar(opacity=0.28, height={"band": 0.86}, cornerRadius=2).encode(x=x, x2="end:Q", color=color)
    bar = base.mark_bar(height={"band": 0.86}, cornerRadius=2).encode(x=x, x2="left:Q", color=color)
    text = base.mark_text(
        align="left", dx=6, limit={"expr": "width / 2.04 - 10"}, fontSize=12 if step > 20 else 11
    ).encode(x=x, text="words:N", color=alt.value("theme:ink"))
    title = "What each layer became"
    return Plot(
        "mosaic",
        "Attention and FFN of every layer",
        "Bar length: the share of parameters kept. Pale background: the parent.",
        make_spec(alt.layer(track, bar, text).properties(height=step * len(rows)), title),
        data,
        Table(title, ["layer", "attention", "left", "bits", "score", "FFN", "left", "bits", "score"], rows),
    )


def _bar(layer: int, place: int, subblock: Subblock) -> dict[str, Any]:
    """The record of one bar; ``place`` is 0 for attention, 1 for the FFN."""
    start, exists = 1.04 * place, _exists(subblock)
    return {
        "layer": layer,
        "subblock": "FFN" if place else "attention",
        "start": start,
        "left": start + _left(subblock) if exists else start,
        "end": start + 1.0,
        "kind": KINDS[kind_of(subblock.kind)][0],
        "words": _became(subblock),
        "was": subblock.parent if exists else "none",
        "now": subblock.child if exists else "none",
        "parameters": _amounts(subblock, "parameters"),
        "memory": _amounts(subblock, "memory_bytes"),
        "bits": _bits(subblock),
        "method": METHODS.get(subblock.method, subblock.method.replace("_", " ")) or "none",
        "score": number(subblock.score),
    }


def _kind_colors(present: set[str]) -> alt.Color:
    kinds = [(label, f"theme:{color}") for label, color in KINDS.values() if label in present]
    return alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=[label for label, _ in kinds], range=[color for _, color in kinds]),
        legend=alt.Legend(
            orient="top",
            columns=3 if len(kinds) <= 3 else 2,
            symbolType="square",
            symbolSize=140,
            symbolOpacity=1,
            labelLimit=160,
        ),
    )


def kind_of(kind: str) -> str:
    """The kind of change, of the keys of ``KINDS``."""
    return kind if kind in KINDS else "smaller"


def _exists(subblock: Subblock) -> bool:
    return subblock.parent_parameters > 0 or subblock.kind != "parent"


def _left(subblock: Subblock) -> float:
    return min(1.0, max(0.0, subblock.kept))


def _bits(subblock: Subblock) -> str:
    """Average bits of a weight, with the scales of its format."""
    weights = subblock.costs["parameters"]
    return number(8 * subblock.costs["weight_bytes"] / weights) if weights else ""


def _became(subblock: Subblock) -> str:
    if not _exists(subblock):
        return "none"
    return "unchanged" if subblock.kind == "parent" else shorter(subblock.parent, subblock.child)


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


def _amounts(subblock: Subblock, cost: str) -> str:
    return f"{format_cost(cost, subblock.costs[cost])} of {format_cost(cost, subblock.parent_costs[cost])}"


# ---------------------------------------------------------------------------------------------- scores


def heat_map(scores: Scores) -> Plot:
    """The score of every alternative of every layer, on a logarithmic scale."""
    names = _short_names(scores.columns)
    data, rows = [], []
    for layer, row in enumerate(scores.rows):
        cells = [str(layer)]
        for name, cell in zip(scores.columns, row, strict=True):
            if cell is None or cell.loss is None or not math.isfinite(cell.loss):
                cells.append("")
                continue
            record = _score_record(layer, name, names[name], cell)
            cells.append(record["score"] + (" ✓" if cell.chosen else ""))
            data.append(record)
        rows.append(cells)
    unit = f"{metric_label(scores.objective)} ({scores.unit})"
    base = alt.Chart(alt.NamedData("scores")).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(orient="top", labelAngle=0, ticks=False, domain=False)),
        y=alt.Y(
            "row:N",
            title=None,
            sort=list(names.values()),
            axis=alt.Axis(labelLimit=190, ticks=False, domain=False, labelPadding=6),
        ),
        tooltip=tooltip(
            layer="layer", alternative="alternative", score="score", how="scored", parameters="parameters",
            memory="memory", **{"in it": "chosen"},
        ),
    )  # fmt: skip
    colored = base.mark_rect(stroke="theme:paper", strokeWidth=1).encode(color=_heat_color([d["shown"] for d in data]))
    dots = (
        base.transform_filter("datum.chosen")
        .mark_point(filled=True, size=44, strokeWidth=1.2, opacity=1, shape="circle")
        .encode(fill=alt.value("#ffffff"), stroke=alt.value("#000000"))
    )
    return Plot(
        "scores",
        f"Scores: {unit} when one alternative replaces its subblock",
        "Lower is better; the colour scale is logarithmic. A white dot marks the chosen alternative; where a "
        "subblock has none, it is unchanged. "
        + " ".join(
            f"({m}): {words}." for m, words in METHODS.items() if any(f"({m})" in name for name in scores.columns)
        ),
        make_spec(alt.layer(colored, dots).properties(height=20 * len(names)), f"Heat map of scores: {unit}"),
        data,
        Table(f"{unit} when one alternative replaces its subblock; ✓: chosen", ["layer", *scores.columns], rows),
        min_width=210 + 15 * len(scores.rows),
    )


def _score_record(layer: int, name: str, row: str, cell: Cell) -> dict[str, Any]:
    return {
        "layer": layer,
        "alternative": name,
        "row": row,
        "shown": max(float(cell.loss or 0.0), _LEAST),
        "score": with_noise(cell.value, cell.standard_error),
        "how": how_scored(cell),
        "chosen": cell.chosen,
        "in it": "yes" if cell.chosen else "no",
        "parameters": format_cost("parameters", cell.costs["parameters"]),
        "memory": format_cost("memory_bytes", cell.costs["memory_bytes"]),
    }


def _heat_color(shown: Sequence[float]) -> alt.Color:
    low, high = min(shown, default=_LEAST), max(shown, default=1.0)
    return alt.Color(
        "shown:Q",
        title="score",
        scale=alt.Scale(type="log", domain=[low, max(high, low * 1.01)], range=_HEAT, interpolate="lab"),
        legend=alt.Legend(
            orient="top",
            gradientLength=220,
            labelExpr="datum.value < 0.001 ? format(datum.value, '.0e') : format(datum.value, '~g')",
            values=log_ticks(low, high, 4),
        ),
    )


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Names that fit next to a plot: the method is left out unless two alternatives differ in it alone."""

    def short(name: str) -> str:
        name = name.replace("with their query heads", "+ queries").replace("attention", "attn.")
        return name.replace("ffn", "FFN").replace("a token", "/ token")

    bare = {name: re.sub(r" \([a-z]+\)$", "", name) for name in names}
    counts = Counter(bare.values())
    return {name: short(bare[name] if counts[bare[name]] == 1 else name) for name in names}


def how_scored(cell: Cell) -> str:
    """Whether a score is exact or estimated."""
    if cell.exact_rows == cell.rows:
        return f"exactly, on {cell.rows} rows"
    return f"estimated; exactly on {cell.exact_rows} of {cell.rows} rows" if cell.exact_rows else "estimated"


# ---------------------------------------------------------------------------------------------- importance


def importance(curves: Sequence[ImportanceCurve]) -> list[Plot]:
    """For each ranked part: the output that is lost as units are removed, one line per layer."""
    removed = list(dict.fromkeys(c.of for c in curves))
    return [_importance(f"importance-{i}", of, [c for c in curves if c.of == of]) for i, of in enumerate(removed)]


def _importance(name: str, removed: str, curves: Sequence[ImportanceCurve]) -> Plot:
    data = [
        {"layer": c.layer, "line": c.name, "left": p.left / c.units, "lost": p.lost, "share": f"{p.lost:.1%}"}
        for c in curves
        for p in c.points
    ]
    base = alt.Chart(alt.NamedData(name)).encode(
        x=alt.X("left:Q", title=f"{removed} left", scale=alt.Scale(domain=[1, 0]), axis=alt.Axis(format="%")),
        y=alt.Y("lost:Q", title="output lost (share of its energy)", axis=alt.Axis(format="%")),
        detail="line:N",
    )
    depth = alt.Scale(range=["theme:depth-0", "theme:depth-1", "theme:depth-2"], interpolate="lab")
    gradient = alt.Legend(orient="top", gradientLength=140, tickMinStep=1, format="d")
    several = len({c.layer for c in curves}) > 1
    lines = base.mark_line(strokeWidth=1.6, opacity=0.9).encode(
        color=alt.Color("layer:Q", title="layer", scale=depth, legend=gradient if several else None)
    )
    # Invisible points that are easier to hit than the lines.
    targets = base.mark_point(size=220, opacity=0, filled=True).encode(
        tooltip=tooltip(layer="layer", left=f"{removed} left", share="output lost")
    )
    title = f"Importance: output lost as {removed} are removed"
    rows = [[str(c.layer), str(c.units), *(f"{c.at(share):.1%}" for share in _SHARES)] for c in curves]
    caption = f"Share of the output's energy that is lost when a share of the {removed} is left"
    return Plot(
        name,
        title,
        "The least important are removed first. Layers whose line stays low can be narrowed cheaply.",
        make_spec(alt.layer(lines, targets).properties(height=260), title),
        data,
        Table(caption, ["layer", "units", *(f"{share:.1%} left" for share in _SHARES)], rows),
    )


def _names_axis(title: str) -> alt.Axis:
    """An axis of names with its title above them."""
    return alt.Axis(
        title=title, titleAngle=0, titleAlign="right", titleBaseline="bottom", titleX=-6, titleY=-6, ticks=False,
        domain=False, labelPadding=6,
    )  # fmt: skip
