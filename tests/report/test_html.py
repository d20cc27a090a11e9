import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from layersmith.report.charts import shorter
from layersmith.report.data import Report
from layersmith.report.html import plots, render
from layersmith.report.plot import columns, log_ticks
from layersmith.report.words import cost_label
from layersmith.units import format_cost, format_seconds
from tests.report.sample import full_report, sample_report


class Page(HTMLParser):
    """Tags, and the words outside scripts and styles."""

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
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def embedded(text: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_the_page_is_whole_and_says_the_numbers() -> None:
    text = render(sample_report())
    page = Page(text)
    assert page.open == []
    words = " ".join(page.words)
    for expected in ("3.34M of 4.77M parameters (70%)", "2.6000 ± 0.0100", "+0.1000 ± 0.0020", "4 → 2 KV heads",
                     "4 KV heads → linear", "16,384 tokens", "3,340,000 of 3,341,000", '"seed": 0',
                     "Refined by evaluating 7 whole children",
                     "from 0.2500 (minimum sum of scores) to 0.1250 for this child (-0.1250 ± 0.0050)",
                     "1 h 25 min in total", "1 min 12 s", "1 h 24 min"):  # fmt: skip
        assert expected in words, expected
    assert "nan" not in words
    assert "None" not in words
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    places = {a["href"] for tag, a in page.tags if tag == "a"}
    assert places <= {f"#{a['id']}" for _, a in page.tags if a.get("id")}


def test_every_plot_has_a_table_with_a_caption() -> None:
    text = render(full_report())
    page = Page(text)
    drawn = {a["data-plot"] for _, a in page.tags if a.get("data-plot")}
    tables = {a["id"] for tag, a in page.tags if tag == "details" and a.get("class") == "data"}
    assert tables == {f"table-{name}" for name in drawn}
    assert drawn == {"frontier", "mosaic", "scores", "importance-0", "importance-1", "estimates", "sums", "times",
                     "training", "locally", "on_the_way"}  # fmt: skip
    count = [tag for tag, _ in page.tags].count
    assert count("caption") == count("table")
    specs, data = embedded(text, "specs"), embedded(text, "data")
    assert specs.keys() == data.keys() == drawn
    assert all(spec["description"] for spec in specs.values())


def test_the_tables_hold_what_the_plots_do() -> None:
    report = Report.from_json(full_report(4))
    for section in plots(report).values():
        for plot in section:
            assert all(len(row) == len(plot.table.headings) for row in plot.table.rows)
    (heat,) = plots(report)["scores"]
    cells = [cell for row in heat.table.rows for cell in row[1:] if cell]
    assert cells == [d["score"] + (" ✓" if d["chosen"] else "") for d in heat.data]
    (front,) = plots(report)["frontier"]
    assert {d["text"] for d in front.data if d["what"] == "measured"} <= {row[-1] for row in front.table.rows}
    assert front.table.rows[-1][0] == "this child"


def test_nothing_from_outside_and_nothing_unescaped() -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    report = sample_report(title=hostile, notes=[hostile], warnings=["something <b>odd</b>"])
    report["parent"]["name"] = hostile
    report["layers"][0]["attention"]["parent"] = hostile
    report["scores"]["columns"][0] = hostile
    text = render(report)
    page = Page(text)
    assert page.open == []
    assert not {"img", "iframe", "link", "b", "object"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if a.get("src") or any(name.startswith("on") for name in a)]
    assert all(a["href"].startswith("#") for _, a in page.tags if a.get("href"))
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert hostile in " ".join(page.words)
    assert any(hostile in str(level) for level in embedded(text, "data")["mosaic"]["was"]["levels"])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "eval" not in policy


def test_many_layers_of_many_alternatives_stay_small() -> None:
    names = tuple(f"{s} {n} of something (contribution)" for s in ("attention", "ffn") for n in range(27))
    scores = sample_report(80, names)["scores"]
    text = render(full_report(80, scores=scores))
    assert len(text.encode()) <= 3_000_000


def test_deterministic() -> None:
    assert render(full_report()) == render(full_report())


def test_a_run_without_most_things() -> None:
    report = sample_report(1, ("ffn no-op",), samples=[], timings=[], warnings=[], notes=[])
    report["scores"]["rows"] = [[None]]
    words = " ".join(Page(render(report)).words)
    for absent in ("Frontier", "Distillation", "Importance", "Predicted", "Sample", "Notes", "Time of each stage"):
        assert absent not in words


@pytest.mark.parametrize("objective", ["lm_loss", "top_1_agreement", "hidden_distance", "something_new"])
def test_other_objectives(objective: str) -> None:
    report = full_report()
    report["scores"]["objective"] = objective
    assert "this child" not in {row[0] for row in plots(Report.from_json(report))["frontier"][0].table.rows}
    assert Page(render(report)).open == []


def test_words() -> None:
    assert shorter("8 heads, 4 KV heads", "8 heads, 2 KV heads") == "8 heads, 4 → 2 KV heads"
    assert shorter("4 KV heads", "4 KV heads, window") == "4 KV heads + window"
    assert shorter("8 experts of 64, 2 a token", "4 experts of 64, 2 a token") == "8 → 4 experts of 64, 2 a token"
    assert shorter("4 KV heads", "no-op") == "removed (4 KV heads)"
    assert shorter("width 64", "linear") == "width 64 → linear"
    assert [format_seconds(s) for s in (0, 2e-6, 0.00342, 1.25, 75, 5025)] == [
        "0.0 s", "2 µs", "3.42 ms", "1.2 s", "1 min 15 s", "1 h 24 min",
    ]  # fmt: skip
    assert cost_label("decode_seconds") == "time per token"
    assert cost_label("draft_seconds") == "draft"
    assert format_cost("decode_seconds", 0.012) == "12 ms"
    assert format_cost("token_seconds", 1 / 1234) == "1,234 tokens/s"
    assert columns([{"a": "x", "n": 1 / 3}, {"a": "x", "n": None}]) == {
        "a": {"levels": ["x"], "codes": [0, 0]}, "n": [0.333333, None],
    }  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(1e-6, 12.0), (0.9, 1.1), (0.03, 0.4), (5.0, 5.0001), (2e-9, 3e9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(low * 0.98 <= t <= high * 1.02 for t in ticks)
