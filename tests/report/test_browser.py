"""The report in a real browser: offline, at the width of a phone and of a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import layersmith
from layersmith.report.html import render
from tests.conformance.tiny import tiny_config, tiny_model
from tests.conftest import SIZES, TINY_RECIPE
from tests.report.browser import BROWSER, Page, browser
from tests.report.sample import full_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
PLOTS = 11
# What is outside the window and not in a box that scrolls.
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
MARKS = """[...document.querySelectorAll('[data-plot]')].map(
    p => [p.dataset.plot, p.querySelectorAll('.mark-rect path, .mark-symbol path, .mark-line path').length])"""
# The middle of a mark of the mosaic, scrolled to.
MIDDLE = """(() => { const mark = document.querySelector('[data-plot=mosaic] svg .mark-rect path');
    mark.scrollIntoView({block: 'center', behavior: 'instant'});
    const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
FRONTIER = """(() => { const plot = document.querySelector('[data-plot=frontier] svg .background');
    plot.scrollIntoView({block: 'center', behavior: 'instant'});
    const box = plot.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"""
CONTRASTS = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c; } };
  return [...document.querySelectorAll('h1, h2, p, th, td, dt, dd, a, summary, caption, figcaption, pre')]
    .filter(e => e.textContent.trim() && e.checkVisibility() && !e.matches('.skip')).map(e => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.tagName, e.textContent.slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5);
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = full_report(24)
    data["layers"][0]["attention"]["parent"] = "<img src=x onerror=alert(1)>"
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_all_of_it_is_drawn_and_fits(page: Page, report: Path, width: int, dark: bool) -> None:
    page.open(report, width=width, dark=dark)
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    marks = dict(page.js(MARKS))
    assert len(marks) == PLOTS
    assert all(marks.values()), marks
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js(TOO_WIDE) == []
    assert page.js("[...document.querySelectorAll('details.data')].every(d => !d.open && d.querySelector('tbody tr'))")
    assert page.js(CONTRASTS) == []
    background = page.js("getComputedStyle(document.body).backgroundColor")
    ink = page.js("document.querySelector('[data-plot=mosaic] .mark-text text').getAttribute('fill')")
    assert (background, ink) == (("rgb(15, 19, 24)", "#e8edf2") if dark else ("rgb(255, 255, 255)", "#171c22"))


def test_a_real_run_of_experts_scored_exactly(
    page: Page, text_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = tiny_config("mixtral")
    config.vocab_size = SIZES["vocab_size"]
    tiny_model(config).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    recipe = TINY_RECIPE | {
        "library": {"ffn_fractions": [0.5], "expert_fractions": [0.5]}, "completion_tokens": 0,
        "scoring": {"mode": "exact", "objective": "top_5_agreement"},
    }  # fmt: skip
    result = layersmith.compress(tmp_path / "parent", tmp_path / "run", data=text_folder, budget=0.7, recipe=recipe)
    page.open(result.report, width=375)
    assert page.complaints == []
    assert page.requests == [result.report.as_uri()]
    assert page.js("document.documentElement.scrollWidth") <= 375
    assert page.js(TOO_WIDE) == []
    marks = dict(page.js(MARKS))
    assert {"mosaic", "scores", "importance-0"} <= marks.keys()
    assert "estimates" not in marks
    assert all(marks.values()), marks
    assert not page.js("!!document.querySelector('#samples')")
    assert "experts" in page.js("document.querySelector('#table-mosaic').textContent")


def test_hovering_over_a_layer_tells_what_it_became(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    page.hover(*page.js(MIDDLE))
    page.wait_for("document.querySelector('#vg-tooltip-element.visible')", 5)
    tooltip = page.js("document.querySelector('#vg-tooltip-element').innerText")
    for expected in ("layer", "attention", "parameters", "memory", "score", "0.2500", "<img src=x onerror=alert(1)>"):
        assert expected in tooltip, tooltip
    assert page.js("document.querySelectorAll('#vg-tooltip-element img').length") == 0
    assert page.complaints == []


def test_all_series_of_the_frontier_are_shown_wherever_the_pointer_is(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    left, top, width, height = page.js(FRONTIER)
    for share in (0.3, 0.5, 0.7, 0.9):
        page.hover(left + share * width, top + 0.5 * height)
        page.wait_for("document.querySelector('#vg-tooltip-element.visible')", 5)
        shown = page.js("document.querySelector('#vg-tooltip-element').innerText")
        for series in ("search", "uniform narrowing", "layers dropped", "random", "this child"):
            assert series in shown, shown
    assert page.complaints == []


def test_commands_name_the_folder_and_tables_can_be_saved(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    assert f"layersmith distill {report.parent} --tokens" in page.js("document.querySelector('#next').textContent")
    assert page.js("document.querySelectorAll('.copy button').length") == 4
    words = page.js("[...document.querySelectorAll('.tools button')].map(b => b.textContent)")
    assert words == ["CSV", "SVG", "PNG"] * PLOTS
    assert page.complaints == []


def test_colours_follow_the_scheme_when_it_changes(page: Page, report: Path) -> None:
    page.open(report, width=1280, dark=False)
    page.js("delete document.documentElement.dataset.ready")
    page.scheme(True)
    page.wait_for("document.documentElement.dataset.ready === 'yes'")
    assert page.js("document.querySelector('[data-plot=mosaic] .mark-text text').getAttribute('fill')") == "#e8edf2"
    assert page.js("document.querySelectorAll('[data-plot] svg.marks').length") == PLOTS


def test_keyboard_and_screen_reader_find_the_data(page: Page, report: Path) -> None:
    page.open(report, width=375)
    named = page.js("[...document.querySelectorAll('[role=graphics-document]')].map(s => s.getAttribute('aria-label'))")
    assert len(named) == PLOTS
    assert all(len(name) > 10 for name in named)
    stops: list[str] = []
    while len(stops) < 200 and (not stops or stops[-1] != stops[0] or len(stops) == 1):
        page.press("Tab")
        stops.append(page.js("document.activeElement.textContent.trim().slice(0, 24)"))
    assert stops[0] == stops[-1] == "Skip to the content"
    assert stops.count("Data as a table") == PLOTS
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in tree]
    assert roles.count("main") == roles.count("navigation") == 1
    assert "table" in roles


def test_without_scripts_the_tables_stand_open(page: Page, report: Path) -> None:
    page.open(report, width=375, scripts=False)
    try:
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        names = {n["name"]["value"] for n in tree if n.get("role", {}).get("value") == "table" and "name" in n}
        assert "What each layer became" in names
        assert any("The frontier" in name for name in names)
        assert page.complaints == []
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
