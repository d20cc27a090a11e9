"""A plot of the report, and what all plots share.

A Vega-Lite specification has no colours but names such as ``theme:ink``, for which the page puts in the colours of the
reader's light or dark scheme. It has no data either, only the name of a data set that the page stores by columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

# Series differ in colour, in the shape of their points, and in the dashes of their lines.
SERIES = ["theme:series-1", "theme:series-2", "theme:series-3", "theme:series-4", "theme:series-5", "theme:series-6"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3]]


@dataclass(frozen=True)
class Table:
    """The data of a plot as text; the first cell of a row is its heading."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: Name of the plot and of its data set, unique in the page.
        title: What the plot shows.
        note: How to read it.
        spec: The Vega-Lite specification.
        data: Records.
        table: The same data as text.
        min_width: Pixels below which the plot scrolls in its box.
    """

    name: str
    title: str
    note: str
    spec: dict[str, Any]
    data: list[dict[str, Any]]
    table: Table
    min_width: int = 0


def columns(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records as columns; a column of strings becomes indices into the list of distinct strings."""
    result: dict[str, Any] = {}
    for name in records[0] if records else ():
        values = [record[name] for record in records]
        if all(isinstance(v, str) for v in values):
            levels = list(dict.fromkeys(values))
            places = {level: i for i, level in enumerate(levels)}
            result[name] = {"levels": levels, "codes": [places[v] for v in values]}
        else:
            result[name] = [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]
    return result


def data_sets(plots: Iterable[Plot]) -> dict[str, Any]:
    """Data sets of plots by name, as columns."""
    return {plot.name: columns(plot.data) for plot in plots}


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a logarithmic axis between two values: decades, or 1, 2, 5 per decade in a narrow range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1,)):
        values = [float(f"{s}e{e}") for e in range(first, last + 1) for s in steps if low <= float(f"{s}e{e}") <= high]
        if len(values) <= most:
            return values if len(values) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]
    return values[:: -(-len(values) // most)]


def subblock_label(name: str) -> str:
    """A subblock's name in plots; joint distillation calls both of a layer ``block``."""
    if name == "block":
        return "attention and FFN jointly"
    return "FFN" if name == "ffn" else name


def dashed(field: str, names: Sequence[str]) -> alt.StrokeDash:
    """Dashes by the names of a field."""
    return alt.StrokeDash(
        f"{field}:N", scale=alt.Scale(domain=names, range=cycled(DASHES, len(names))), title=None, legend=legend()
    )


def cycled(values: Sequence[Any], n: int) -> list[Any]:
    """The first n values, repeated as needed."""
    return [values[i % len(values)] for i in range(n)]


def colours(field: str, names: Sequence[str]) -> alt.Color:
    """Colours of series by the names of a field."""
    scale = alt.Scale(domain=names, range=cycled(SERIES, len(names)))
    return alt.Color(f"{field}:N", title=None, scale=scale, legend=legend())


def legend() -> alt.Legend:
    """The legend above a plot."""
    return alt.Legend(orient="top", columns=2, labelLimit=190, symbolDash=[1, 0], symbolOpacity=1)


def tooltip(**fields: str) -> list[alt.Tooltip]:
    """A tooltip of these fields, with their titles."""
    percent, short = {"fraction", "left"}, {"estimated", "exact", "predicted", "loss"}
    formats: dict[str, Any] = {}
    for field in fields:
        if field in percent | short:
            formats[field] = {"format": ".1%" if field in percent else ".4~g", "type": "quantitative"}
    return [
        alt.Tooltip(field=field, title=title, **formats.get(field, {"type": "nominal"}))
        for field, title in fields.items()
    ]


def make_spec(chart: Any, description: str) -> dict[str, Any]:
    """A chart's specification, as wide as its place, without Altair's configuration and the schema's address."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: dict[str, Any] = chart.properties(width="container", autosize=fit, description=description).to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
