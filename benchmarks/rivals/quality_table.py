"""The table and the plot of ``benchmarks/quality.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rivals.judge import difference, mean

TEXTS = {"inside": "inside", "outside": "outside"}
TASKS = {"arc_easy/acc": "ARC easy", "lambada_openai/acc": "LAMBADA", "copa/acc": "COPA"}
CHANCE = {"arc_easy/acc": 0.25, "copa/acc": 0.5}
COLOURS = ("#1b6ca8", "#c4472c", "#3a8f4d", "#8a5bb5", "#b8860b", "#4f6d7a", "#b0418a", "#6b8e23", "#222222", "#888888")


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """The table as ``.md`` and the plot as ``.svg``, once the parent's row is there."""
    if not any(row["method"] == "parent" for row in rows):
        return
    out.with_suffix(".md").write_text("\n".join(page(rows, out.stem)) + "\n", encoding="utf-8")
    out.with_suffix(".svg").write_text(plot(rows), encoding="utf-8")


def page(rows: list[dict[str, Any]], stem: str) -> Iterator[str]:
    parent = next(row for row in rows if row["method"] == "parent")
    yield f"# Methods of pruning without training, on {parent['parent']}\n"
    yield (
        "Written by `benchmarks/quality.py`. The share is that of the parameters in the decoder layers. All methods "
        "have the same rows, those of layersmith's run. KL (nats a token) and perplexity are on "
        f"{parent['rows']} rows of other documents of the same sources (inside), and on the starts of {parent['rows']} "
        f"documents of other sources (outside). Accuracies are on the first {parent.get('items', 0)} "
        "items of each task. ± is one standard error: of KL over rows, of perplexity from the loss above the parent's "
        "over the same rows, of accuracies from the difference to the parent on the same items. Tokens are in forward "
        "passes of the parent, a backward pass counting as two. *Refit* is layersmith's closed-form refit, without the "
        "method's own weight updates; for layersmith it is the one on the child's inputs. CPU seconds are those of "
        "one thread on a shared machine; layersmith's are its run's stages by the clock.\n"
    )
    yield f"![KL on held-out text by share of the parameters]({stem}.svg)\n"
    heads = ["method", "refit", "share", *(f"KL, {t}" for t in TEXTS.values())]
    heads += [*(f"perplexity, {t}" for t in TEXTS.values()), *TASKS.values(), "tokens", "CPU s", "commit"]
    for share in sorted({row["share"] for row in rows} - {1.0}, reverse=True):
        yield f"## {share:.1%} of the parameters in the layers\n"
        yield f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
        yield _line(parent, parent)
        of_share = [row for row in rows if row["share"] == share]
        for row in sorted(of_share, key=lambda row: mean(row["text"]["inside"]["kl"])):
            yield _line(row, parent)
        yield ""
        yield from (f"{row['method']}: {row['note']}\n" for row in [parent, *of_share] if "note" in row)
        yield from _verdict(of_share)


def _line(row: dict[str, Any], parent: dict[str, Any]) -> str:
    cells = [row["method"], "yes" if row["refit"] else "", f"{row['parameters'] / row['of']:.3f}"]
    for text in TEXTS:
        kl = row["text"][text]["kl"]
        cells.append("" if row is parent else f"{mean(kl):.3f} ± {difference(kl, [0.0] * len(kl))[1]:.3f}")
    for text in TEXTS:
        loss = row["text"][text]["loss"]
        error = difference(loss, parent["text"][text]["loss"])[1]
        perplexity = math.exp(mean(loss))
        cells.append(f"{perplexity:.1f}" + ("" if row is parent else f" ± {perplexity * error:.1f}"))
    for task in TASKS:
        values = row.get("tasks", {}).get(task)
        if values is None:
            cells.append("")
            continue
        error = difference(values, parent["tasks"][task])[1]
        cells.append(f"{mean(values):.3f}" + ("" if row is parent else f" ± {error:.3f}"))
    tokens = f"{row['tokens'] / 1000:,.0f}k" if row["tokens"] else ""  # layersmith's run does not count them so
    cells += [tokens, f"{row['seconds']:.0f}" if row["seconds"] else "", row["commit"]]
    return f"| {' | '.join(cells)} |"


def _verdict(rows: list[dict[str, Any]]) -> Iterator[str]:
    """layersmith's difference to each other row, in pairs, and in units of its standard error."""
    ours = next((row for row in rows if row["method"] == "layersmith" and row["refit"]), None)
    if ours is None:
        return
    yield "layersmith's KL and accuracy less those of each other row, and how many standard errors that is.\n"
    yield f"| | refit | {' | '.join(f'KL, {t}' for t in TEXTS.values())} | {' | '.join(TASKS.values())} |"
    yield "|" + " --- |" * (2 + len(TEXTS) + len(TASKS))
    for row in rows:
        if row is ours:
            continue
        pairs = [difference(ours["text"][t]["kl"], row["text"][t]["kl"]) for t in TEXTS]
        both = ours.get("tasks", {}).keys() & row.get("tasks", {}).keys()
        pairs += [difference(ours["tasks"][t], row["tasks"][t]) if t in both else None for t in TASKS]
        cells = ["" if p is None else f"{p[0]:+.3f} ({p[0] / p[1] if p[1] else 0:+.1f})" for p in pairs]
        yield f"| {row['method']} | {'yes' if row['refit'] else ''} | {' | '.join(cells)} |"
    yield ""


def plot(rows: list[dict[str, Any]]) -> str:
    """KL on held-out text by share, on a logarithmic scale; dashed with the refit."""
    rows = [row for row in rows if row["method"] != "parent"]
    if not rows:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>'
    width, height, left, top, right = 760, 460, 60, 20, 250
    kls = [mean(row["text"]["inside"]["kl"]) for row in rows]
    low, high = math.floor(math.log10(min(kls)) * 2) / 2, math.ceil(math.log10(max(kls)) * 2) / 2

    def x(share: float) -> float:
        return left + (0.9 - share) / 0.45 * (width - left - right)

    def y(kl: float) -> float:
        return top + (high - math.log10(kl)) / (high - low) * (height - top - 50)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for kl in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10):
        if low <= math.log10(kl) <= high:
            parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(kl):.1f}" y2="{y(kl):.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y(kl) + 4:.1f}" text-anchor="end">{kl:g}</text>')
    for share in (0.875, 0.75, 0.625, 0.5):
        parts.append(f'<text x="{x(share):.1f}" y="{height - 30}" text-anchor="middle">{share:.1%}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}">share of the parameters in the layers; KL in nats a token</text>')
    series = sorted({(row["method"], row["refit"]) for row in rows})
    methods = list(dict.fromkeys(method for method, _ in series))
    for number, (method, refit) in enumerate(series):
        colour = COLOURS[methods.index(method) % len(COLOURS)]
        points = sorted(
            (x(row["share"]), y(mean(row["text"]["inside"]["kl"])))
            for row in rows
            if (row["method"], row["refit"]) == (method, refit)
        )
        path, dash = " ".join(f"{a:.1f},{b:.1f}" for a, b in points), ' stroke-dasharray="5 3"' if refit else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        fill = "white" if refit else colour
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{fill}" stroke="{colour}"/>' for a, b in points]
        at = top + 14 + 17 * number
        parts.append(f'<circle cx="{width - right + 20}" cy="{at - 4}" r="3.5" fill="{fill}" stroke="{colour}"/>')
        label = f"{method}{', refit' if refit else ''}"
        parts.append(f'<text x="{width - right + 30}" y="{at}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
