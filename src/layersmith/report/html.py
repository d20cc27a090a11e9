"""The report's data as one self-contained HTML page.

The page needs no network and no script. What colour shows, text says too: the mosaic and the heat map are tables.
The data is what :func:`layersmith.report.collect.collect` gives.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from layersmith.search.budget import format_bytes, format_count

_COSTS = (
    ("parameters", "Parameters", "count"),
    ("active_parameters", "Active parameters", "count"),
    ("weight_bytes", "Weight memory", "bytes"),
    ("kv_cache_bytes", "KV cache", "bytes"),
    ("memory_bytes", "Memory together", "bytes"),
)
_DASH = "\N{EM DASH}"
# Light to dark; each stop is a colour in sRGB.
_HEAT = ((255, 247, 236), (253, 212, 158), (252, 141, 89), (215, 48, 31), (127, 0, 0))
_KEPT = ((107, 114, 128), (147, 183, 224), (59, 130, 196), (23, 78, 134))


def render(report: dict[str, Any]) -> str:
    """The page; equal data give equal text."""
    from jinja2 import Environment, StrictUndefined

    source = files("layersmith.report").joinpath("template.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "noise": with_noise}
    return environment.from_string(source).render(
        report=report,
        answer=_answer(report),
        costs=[_cost_row(report, *cost) for cost in _COSTS],
        budget=[_budget_row(row) for row in report["budget"]],
        layers=[
            {"layer": row["layer"], "cells": [_mosaic_cell(row[s]) for s in ("attention", "ffn")]}
            for row in report["layers"]
        ],
        heat=_heat_map(report["scores"]),
        recipe=json.dumps(report["recipe"], indent=2),
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return _DASH
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def with_noise(value: float | None, error: float | None, signed: bool = False) -> str:
    """A number and its standard error."""
    if value is None or not math.isfinite(value):
        return _DASH
    text = ("+" if signed and value >= 0 else "") + number(value)
    return text if error is None else f"{text} ± {number(error)}"


def amount(value: int, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else format_count(value)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else _DASH


def _answer(report: dict[str, Any]) -> str:
    parent, child = report["parent"], report["child"]
    rows = {row["metric"]: row for row in report["evaluation"]["rows"]}
    loss = rows["loss"]
    memory = share(child["memory_bytes"], parent["memory_bytes"])
    return (
        f"{amount(child['parameters'], 'count')} of {amount(parent['parameters'], 'count')} parameters "
        f"({share(child['parameters'], parent['parameters'])}) and {memory} "
        f"of the memory, for a loss of {number(loss['child'], 3)} instead of {number(loss['parent'], 3)} nats a token."
    )


def _cost_row(report: dict[str, Any], key: str, label: str, unit: str) -> dict[str, str]:
    before, after = report["parent"][key], report["child"][key]
    return {"label": label, "parent": amount(before, unit), "child": amount(after, unit), "share": share(after, before)}


def _budget_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": row["label"].replace("_", " "),
        "limit": amount(row["limit"], row["unit"]),
        "used": amount(row["used"], row["unit"]),
        "exact": f"{row['used']:,} of {row['limit']:,}",
        "percent": min(100.0, 100.0 * row["used"] / row["limit"]) if row["limit"] else 0.0,
    }


def _mosaic_cell(cell: dict[str, Any]) -> dict[str, str]:
    changed = cell["kind"] != "parent"
    words = f"{cell['parent']} → {cell['child']}" if changed else cell["child"]
    method = f" ({cell['method']})" if cell.get("method") else ""
    size = f"{cell['parameters']:,} of {cell['parent_parameters']:,} parameters"
    detail = f"{size}{method}; score {number(cell['score'])}"
    kept = min(1.0, max(0.0, cell["kept"]))
    background = _mix(_KEPT, kept)
    return {"words": words, "detail": detail, "kept": f"{kept:.0%}", "style": _style(background), "kind": cell["kind"]}


def _heat_map(scores: dict[str, Any]) -> dict[str, Any]:
    """Cells on a logarithmic scale between the smallest and the largest score."""
    bigger_is_better = scores["objective"].endswith("agreement")

    def badness(value: float) -> float:
        return max(1 - value if bigger_is_better else value, 1e-6)

    values = [
        badness(cell["value"])
        for row in scores["rows"]
        for cell in row
        if cell is not None and cell["value"] is not None and math.isfinite(cell["value"])
    ]
    low, high = math.log(min(values, default=1e-6)), math.log(max(values, default=1.0))
    rows = []
    for layer, row in enumerate(scores["rows"]):
        cells: list[dict[str, Any] | None] = []
        for column, cell in zip(scores["columns"], row, strict=True):
            if cell is None or cell["value"] is None or not math.isfinite(cell["value"]):
                cells.append(None)
                continue
            value = with_noise(cell["value"], cell.get("standard_error"))
            place = (math.log(badness(cell["value"])) - low) / ((high - low) or 1.0)
            cells.append(
                {
                    "text": _short(cell["value"]),
                    "title": f"layer {layer}, {column}: {value}{_how(cell)}",
                    "style": _style(_mix(_HEAT, place)),
                    "chosen": cell["chosen"],
                }
            )
        rows.append({"layer": layer, "cells": cells})
    return {"columns": scores["columns"], "rows": rows, "objective": scores["objective"], "unit": scores["unit"]}


def _how(cell: dict[str, Any]) -> str:
    """How a score came about, in brackets."""
    exact, rows = cell.get("exact_rows"), cell.get("rows")
    if exact is None or exact == rows:
        return ""
    return f" (estimated; run exactly on {exact} of {rows} rows)" if exact else " (estimated)"


def _short(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def _mix(stops: tuple[tuple[int, int, int], ...], place: float) -> tuple[int, int, int]:
    position = min(max(place, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(position), len(stops) - 2)
    part = position - i
    r, g, b = (round(a + (b - a) * part) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return r, g, b


def _style(background: tuple[int, int, int]) -> str:
    """Background, and black or white on it, whichever has the greater contrast (WCAG 2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    colour = "#000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#fff"
    return f"background:rgb{background};color:{colour}".replace(" ", "")
