"""What the command line shows while it works, on terminals of all kinds."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersmith.run.progress import SILENT, Bars, CommandConsole, Lines, open_console, progress_on
from layersmith.terminal import print_layers


def console(width: int = 80, terminal: bool = True) -> Console:
    kind = {"TERM": "xterm-256color"} if terminal else {}
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=25, _environ=kind)


def written(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def run_two_stages(screen: Console) -> str:
    progress = progress_on(screen)
    with progress.stage("score", 10, "sequences") as advance:
        advance(4)
        progress.note("[b]as typed[/b]")
        with progress.stage("rescore", 3, "passes") as inner:
            inner(3)
        advance(6)
    with progress.stage("realize", 1, "child") as advance:
        advance(1)
    return written(screen)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_live_bar_and_a_line_for_what_is_done(width: int) -> None:
    screen = console(width)
    assert isinstance(progress_on(screen), Bars)
    text = run_two_stages(screen)
    assert "\x1b[2K" in text  # the bar was taken away again
    lines = [line for line in text.split("\n") if "✓" in line]
    assert [name for name in ("rescore", "score", "realize") if any(f" {name} " in line for line in lines)] == [
        "rescore", "score", "realize",
    ]  # fmt: skip
    assert all(" s" in line for line in lines)
    assert "note: [b]as typed[/b]" in text
    assert "40%" in text


def test_plain_lines_elsewhere() -> None:
    text = run_two_stages(console(terminal=False))
    assert "\x1b" not in text
    assert text == "note: [b]as typed[/b]\nrescore: done in 0.0 s\nscore: done in 0.0 s\nrealize: done in 0.0 s\n"


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersmith.run.progress._SECONDS_BETWEEN_LINES", 0.0)
    screen = console(terminal=False)
    with progress_on(screen).stage("score", 10, "sequences") as advance:
        advance(4)
        advance(6)
    assert written(screen).startswith("score: 40% of 10 sequences, about 0.0 s left\nscore: done in")


def test_the_remaining_time_that_a_stage_reports_overrides_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersmith.run.progress._SECONDS_BETWEEN_LINES", 0.0)
    screen = console(terminal=False)
    with progress_on(screen).stage("score", 10, "alternatives") as advance:
        advance(4, 200.0, "3 scored, 9 tokens/s")
    assert written(screen).startswith("score: 40% of 10 alternatives (3 scored, 9 tokens/s), about 3 min 20 s left\n")
    for width, said in ((140, True), (100, False)):
        live = console(width)
        progress = progress_on(live)
        with progress.stage("score", 10, "alternatives") as advance:
            time.sleep(0.6)  # rich keeps what it drew of a time for half a second
            advance(4, 200.9, "3 scored, 9 tokens/s")
            assert isinstance(progress, Bars)
            assert progress._live is not None
            progress._live.refresh()
        text = written(live)
        assert "3 min 2" in text
        assert ("(3 scored, 9 tokens/s)" in text) == said
        assert "of 10 alternatives" in text


def test_a_stage_that_fails_leaves_no_bar_and_is_not_done() -> None:
    screen = console()
    progress = progress_on(screen)
    with pytest.raises(KeyboardInterrupt), progress.stage("score", 10, "sequences"):
        raise KeyboardInterrupt
    assert "✓" not in written(screen)
    with progress.stage("evaluate", 10, "sequences") as advance:
        advance(10)
    assert "✓" in written(screen)


def test_who_speaks_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_on(open_console()), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_on(open_console()), Lines)
    assert not isinstance(progress_on(open_console()), Bars)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(progress_on(open_console()), Bars)  # without colours, but with a bar
    assert open_console().no_color
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("RANK", "1")
    assert progress_on(open_console()) is SILENT
    assert open_console().quiet
    monkeypatch.setenv("RANK", "0")
    assert isinstance(progress_on(open_console()), Bars)


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_solution_fits_the_terminal(width: int) -> None:
    attention = ("32 heads, 8 KV heads", "16 heads, 4 KV heads")
    ffn = ("64 experts of 1408, 6 a token, shared 2816", "no-op")
    screen = console(width, terminal=False)
    print_layers(screen, [[attention, ffn]] * 12 + [[(attention[0], None), ffn]])
    text = written(screen)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.replace("│", " ").split())
    assert words.count("=>") == 25
    assert words.count("unchanged") == 1
    assert "no-op" in words


def test_foreign_text_cannot_control_the_terminal() -> None:
    """Names of models and alternatives, also in tables and in styled text."""
    hostile = "a\x1b]0;title\x07\x1b[2J\u202eb"
    table = Table(hostile)
    table.add_row(Text(hostile, style="bold"))
    for terminal in (False, True):
        out = io.StringIO()
        console = CommandConsole(file=out, force_terminal=terminal, width=100)
        console.print(hostile, markup=False)
        console.print(table)
        assert not set(re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())) & set("\x1b\x07\u202e")
        assert "b" in out.getvalue()
