"""What a plot of the report is, and what its plots share.

A specification holds no colours but names such as ``theme:ink``: the page puts in the colours of the reader's scheme,
light or dark. It holds no data either, but the name of a data set that the page has as columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

# Series are told apart by colour, by the shape of their points, and by the dashes of their lines.
SERIES = ["theme:series-1", "theme:series-2", "theme:series-3", "theme:series-4", "theme:series-5", "theme:series-6"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3]]


@dataclass(frozen=True)
class Table:
    """What a plot shows, in words and numbers.

    Attributes:
        caption: what it is.
        headings: one a column.
        rows: as many cells each; the first is the row's heading.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: unique in the page; also of its data set.
        title: says what is seen.
        note: how it is to be read, for everyone.
        spec: the Vega-Lite specification.
        data: records.
        table: the same as text.
        min_width: pixels; where the window has fewer, the plot scrolls in its box.
    """

    name: str
    title: str
    note: str
    spec: dict[str, Any]
    data: list[dict[str, Any]]
    table: Table
    min_width: int = 0


def columns(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records as columns; a column of words is numbers into the list of those that occur."""
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


def data_sets(found: Iterable[Plot]) -> dict[str, Any]:
    """The data of plots, by name, as columns."""
    return {plot.name: columns(plot.data) for plot in found}


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values between two others for a logarithmic axis: decades, or steps of 1, 2 and 5 in a narrow range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1,)):
        values = [float(f"{s}e{e}") for e in range(first, last + 1) for s in steps if low <= float(f"{s}e{e}") <= high]
        if len(values) <= most:
            return values if len(values) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]
    return values[:: -(-len(values) // most)]


def subblock_label(name: str) -> str:
    return "FFN" if name == "ffn" else name


def dashed(field: str, names: Sequence[str]) -> Any:
    import altair as alt

    return alt.StrokeDash(
        f"{field}:N", scale=alt.Scale(domain=names, range=cycled(DASHES, len(names))), title=None, legend=legend()
    )


def cycled(values: Sequence[Any], n: int) -> list[Any]:
    return [values[i % len(values)] for i in range(n)]


def legend() -> Any:
    import altair as alt

    return alt.Legend(orient="top", columns=2, labelLimit=150, symbolDash=[1, 0], symbolOpacity=1)


def tooltip(**fields: str) -> list[alt.Tooltip]:
    import altair as alt

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
    """A chart as wide as its place, without Altair's own configuration and without a schema's address."""
    import altair as alt

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: dict[str, Any] = chart.properties(width="container", autosize=fit, description=description).to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
