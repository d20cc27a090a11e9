"""Draw README's picture from a run: python docs/images/draw.py runs/demo/report.json > docs/images/layers.svg"""

from __future__ import annotations

import json
import math
import sys
from typing import Any
from xml.sax.saxutils import escape

ROW, TOP, LEFT = 26, 76, 44
BAR, GAP = 150, 14
CELL = 22
LOWEST, HIGHEST = 1e-4, 1.0  # of the colour scale, nats per token
STYLE = """
svg { font: 12px system-ui, sans-serif; }
text { fill: #24292f; } .dim { fill: #57606a; } .track { fill: #afb8c1; opacity: .45; } .bar { fill: #1f883d; }
.changed { fill: #0969da; } .cell { fill: #cf222e; } .empty { fill: #afb8c1; opacity: .2; }
.chosen { fill: none; stroke: #24292f; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .dim { fill: #9198a1; } .bar { fill: #3fb950; } .changed { fill: #58a6ff; }
  .cell { fill: #ff7b72; } .chosen { stroke: #e6edf3; }
}
"""


def drawn(report: dict[str, Any]) -> str:
    """The layers of the child, and next to them the score of every alternative."""
    layers, scores = report["layers"], report["scores"]
    heat = LEFT + 2 * (BAR + GAP) + 30
    columns = len(scores["columns"])
    width, height = heat + columns * CELL + 40, TOP + ROW * len(layers) + 140
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(report['title'])}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="22" font-weight="600" font-size="14">the child: share of parameters kept</text>',
        f'<text x="{heat}" y="22" font-weight="600" font-size="14">score of every alternative (KL, log scale)</text>',
        f'<text x="{heat}" y="40" class="dim">darker is worse; outlined: chosen</text>',
        f'<text x="{LEFT}" y="{TOP - 10}">attention</text>',
        f'<text x="{LEFT + BAR + GAP}" y="{TOP - 10}">FFN</text>',
        f'<text x="{LEFT - 8}" y="{TOP - 10}" text-anchor="end" class="dim">layer</text>',
    ]
    for row, layer in enumerate(layers):
        y = TOP + row * ROW
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end" class="dim">{layer["layer"]}</text>')
        for place, subblock in enumerate(("attention", "ffn")):
            cell, x = layer[subblock], LEFT + place * (BAR + GAP)
            kind = "bar" if cell["kind"] == "parent" else "changed"
            parts += [
                f'<rect class="track" x="{x}" y="{y}" width="{BAR}" height="{ROW - 6}" rx="2"/>',
                f'<rect class="{kind}" opacity=".55" x="{x}" y="{y}" width="{BAR * cell["kept"]:.1f}" '
                f'height="{ROW - 6}" rx="2"/>',
                f'<text x="{x + 6}" y="{y + 14}">{escape(cell["child"])}</text>',
            ]
        for column, score in enumerate(scores["rows"][row]):
            x, box = heat + column * CELL, f'width="{CELL - 2}" height="{ROW - 6}" rx="2"'
            if score is None:
                parts.append(f'<rect class="empty" x="{x}" y="{y}" {box}/>')
                continue
            shade = math.log(max(score["loss"], LOWEST) / LOWEST) / math.log(HIGHEST / LOWEST)
            parts.append(f'<rect class="cell" opacity="{min(1.0, 0.06 + 0.94 * shade):.2f}" x="{x}" y="{y}" {box}/>')
            if score["chosen"]:
                parts.append(f'<rect class="chosen" x="{x}" y="{y}" {box}/>')
    for column, name in enumerate(scores["columns"]):
        x, y = heat + column * CELL + 8, TOP + ROW * len(layers) + 8
        short = name.replace("attention ", "").replace(" with their query heads", " + query heads")
        for method in (" (iterative)", " (contribution)"):
            short = short.replace(method, "")
        parts.append(
            f'<text class="dim" font-size="11" transform="translate({x},{y}) rotate(55)">{escape(short)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(drawn(json.load(file)), end="")
