import re
from html.parser import HTMLParser
from typing import Any

import pytest

from layersmith.report.html import _style, render


def sample_report(**changes: Any) -> dict[str, Any]:
    """What a run gives, in the shape of ``collect``."""
    layers = [
        {
            "layer": i,
            "attention": {
                "parent": "4 KV heads", "child": "no-op" if i == 1 else "2 KV heads",
                "kind": "no_op" if i == 1 else "kv_heads",
                "method": "" if i == 1 else "pool", "kept": 0.0 if i == 1 else 0.8, "parameters": 0 if i == 1 else 800,
                "parent_parameters": 1000, "score": 0.25,
            },
            "ffn": {
                "parent": "width 64", "child": "width 64", "kind": "parent", "method": "", "kept": 1.0,
                "parameters": 2000, "parent_parameters": 2000, "score": 0.0,
            },
        }
        for i in range(3)
    ]  # fmt: skip
    costs = {
        "parameters": 4_771_392, "active_parameters": 4_771_392, "weight_bytes": 9_542_784, "kv_cache_bytes": 0,
        "memory_bytes": 9_542_784,
    }  # fmt: skip
    cell = {"value": 0.123456, "standard_error": 0.01, "chosen": True, "metrics": {}}
    report = {
        "title": "demo: 4.77M to 3.34M parameters",
        "parent": {"name": "demo", **costs},
        "child": {"name": "child", **costs, "parameters": 3_340_000},
        "batch": 1,
        "context": 4096,
        "budget": [
            {"label": "parameters", "limit": 3_341_000, "unit": "count", "used": 3_340_000, "parent": 4_771_392},
        ],
        "evaluation": {
            "tokens": 16384,
            "sequences": 64,
            "rows": [
                {"metric": "loss", "label": "LM loss", "parent": 2.5, "child": 2.6, "child_standard_error": 0.01,
                 "difference": 0.1, "difference_standard_error": 0.002, "lower_is_better": True},
                {"metric": "kl_divergence", "label": "KL", "parent": None, "child": float("nan"),
                 "child_standard_error": None, "difference": None, "difference_standard_error": None,
                 "lower_is_better": True},
            ],
        },
        "layers": layers,
        "scores": {
            "objective": "kl_divergence", "unit": "nats a token", "columns": ["attention 2 KV heads (pool)", "ffn 32"],
            "rows": [[cell, None], [{**cell, "value": 1e-5, "chosen": False}, cell], [cell, {**cell, "value": None}]],
        },
        "search": {"score": 0.5, "proven_optimal": True},
        "samples": [{"prompt": "def f():", "parent": "</pre><script>alert(1)</script>", "child": "pass"}],
        "recipe": {"seed": 0, "data": {"sequence_length": 32}},
        "environment": {"torch": "2.13.0"},
        "warnings": ["something <b>odd</b>"],
    }  # fmt: skip
    return report | changes


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_says_the_numbers() -> None:
    text = render(sample_report())
    page = Page(text)
    assert page.open == []
    words = " ".join(page.words)
    for expected in ("3.34M of 4.77M parameters (70%)", "2.6000 ± 0.0100", "+0.1000 ± 0.0020", "0.123", "1.0e-05",
                     "4 KV heads → no-op", "16,384 tokens", "3,340,000 of 3,341,000", '"seed": 0'):  # fmt: skip
        assert expected in words, expected
    assert "nan" not in text
    assert "None" not in text
    assert [tag for tag, _ in page.tags].count("caption") == 4
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_nothing_from_outside_and_nothing_unescaped() -> None:
    text = render(sample_report())
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>odd" not in text
    assert len(text) < 1_000_000


def test_deterministic() -> None:
    assert render(sample_report()) == render(sample_report())


@pytest.mark.parametrize("grey", range(0, 256, 5))
def test_text_can_be_read_on_every_colour(grey: int) -> None:
    style = _style((grey, 255 - grey, grey // 2))
    background, ink = re.match(r"background:rgb\((.*)\);color:(.*)", style).groups()  # type: ignore[union-attr]

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    one, other = luminance([int(c) / 255 for c in background.split(",")]), 0.0 if ink == "#000" else 1.0
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5
