"""Progress of long steps: stages report to a :class:`Progress`, and only the command line draws it.

On a terminal the running stage has a live bar, and every finished one keeps a line with its time. Elsewhere, and where
colours or cursor movements are unwanted, there are plain lines. Progress and notes go to standard error, so that
standard output holds results alone.
"""

from __future__ import annotations

import html
import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as LiveDisplay
from rich.segment import Segment
from rich.text import Text

from layersmith.errors import printable
from layersmith.run.timeline import Timeline
from layersmith.units import format_seconds

# Seconds between two lines about the same stage where there is no live bar.
_SECONDS_BETWEEN_LINES = 15.0
# Seconds between two drawings of a bar in a notebook.
_SECONDS_BETWEEN_DRAWINGS = 0.3
# Exit code of a process whose reader has gone: 128 and the number of SIGPIPE.
BROKEN_PIPE = 141
# A table in a pipe is not wrapped to the 80 columns that a console without a terminal is assumed to have.
_COLUMNS_OF_A_PIPE = 200


class Advance(Protocol):
    """Reports steps of a stage that are done."""

    def __call__(self, steps: float, left: float | None = None, said: str = "") -> None:
        """Report.

        Args:
            steps: Number of steps done since the last report.
            left: Seconds that the stage will still take. By default each remaining step takes the mean time so far.
            said: A detail to show with the bar.
        """


class Progress:
    """Progress that nobody sees; the base of those that are drawn.

    Attributes:
        clock: Time in seconds.
        timeline: Where the run is among its stages; None for a command that has none.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)
    timeline: Timeline | None = None

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        """A stage of ``total`` steps; call the yielded function with the number of steps just done."""
        yield lambda steps, left=None, said="": None

    def note(self, text: str) -> None:
        """Show a line that stays on the screen."""


SILENT = Progress()


@dataclass(frozen=True)
class Event:
    """Something that a stage reports.

    Attributes:
        kind: ``begin``, ``step``, ``end`` or ``note``.
        stage: Name of the stage, and after a colon what it is doing, e.g. ``scores: score``; empty for a note.
        done, total: Steps that are done, and all steps.
        unit: What the steps are.
        text: The note.
    """

    kind: str
    stage: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    text: str = ""


Callback = Callable[[Event], None]


class WithCallback(Progress):
    """Another progress, and a function that is called with every event; what it raises interrupts the run."""

    def __init__(self, shown: Progress, callback: Callback):
        self.shown, self.callback, self.clock = shown, callback, shown.clock

    def note(self, text: str) -> None:
        self.shown.note(text)
        self.callback(Event("note", text=text))

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        done = 0.0
        with self.shown.stage(name, total, unit) as shown:
            self.callback(Event("begin", name, done, total, unit))

            def advance(steps: float, left: float | None = None, said: str = "") -> None:
                nonlocal done
                done += steps
                shown(steps, left, said)
                self.callback(Event("step", name, done, total, unit))

            yield advance
        self.callback(Event("end", name, done, total, unit))


def progress_of(progress: Progress | bool, callback: Callback | None = None) -> Progress:
    """The progress that a caller of the Python API asks for.

    Args:
        progress: True for a bar in a notebook or a terminal, and lines elsewhere; False for nothing; or a progress.
        callback: Called with every :class:`Event`.
    """
    if isinstance(progress, bool):
        progress = progress_on(open_console(stderr=True)) if progress else SILENT
    return progress if callback is None else WithCallback(progress, callback)


class CommandConsole(Console):
    """A console whose process ends as a shell expects when the reader of a pipe has gone.

    Text that it prints cannot control the terminal: names and texts of others may hold anything.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(BROKEN_PIPE) from None


def open_console(*, stderr: bool = False) -> Console:
    """The console of the command line; only the first of several processes that a launcher started writes.

    ``NO_COLOR`` (https://no-color.org) takes colours away, and a terminal that calls itself dumb gets plain text.
    """
    if int(os.environ.get("RANK") or 0) > 0:
        return CommandConsole(quiet=True, stderr=stderr)
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    console = CommandConsole(stderr=stderr, force_terminal=False if dumb else None)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = CommandConsole(stderr=stderr, force_terminal=False, width=_COLUMNS_OF_A_PIPE)
    return console


def progress_on(console: Console) -> Progress:
    """A live bar in a notebook or on a terminal, plain lines elsewhere, nothing on a console that is quiet."""
    if console.quiet:
        return SILENT
    if console.is_jupyter:
        return NotebookBars()
    return Bars(console) if console.is_terminal else Lines(console)


class Lines(Progress):
    """A line when a stage ends, and one now and then while a long stage runs."""

    def __init__(self, console: Console):
        self.console = console

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started = last = time.monotonic()
        done = 0.0

        def advance(steps: float, left: float | None = None, said: str = "") -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if now - last > _SECONDS_BETWEEN_LINES and done < total:
                left = (now - started) * (total - done) / max(done, 1e-9) if left is None else left
                detail = f" ({said})" if said else ""
                remaining = format_seconds(round(left, 1))
                steps_done = f"{done / total:.0%} of {total:,.0f} {unit}{detail}"
                self._say(f"{self._stage}{name}: {steps_done}, about {remaining} left{self._left_in_all()}")
                last = now

        yield advance
        self._say(f"{self._stage}{name}: done in {_since(started)}{self._left_in_all()}")

    @property
    def _stage(self) -> str:
        return self._place("stage {} of {}, ")

    def _place(self, words: str) -> str:
        """The number of the stage and of all stages in these words; nothing outside a run."""
        return "" if self.timeline is None or not self.timeline.place[0] else words.format(*self.timeline.place)

    def _left_in_all(self) -> str:
        left = None if self.timeline is None else self.timeline.left()
        return "" if left is None else f"; {format_seconds(round(left))} left in all"

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


class NotebookBars(Progress):
    """In a notebook, a bar for each stage that becomes a line when the stage ends. It needs no widgets."""

    def __init__(self) -> None:
        self._display = importlib.import_module("IPython.display")  # a notebook has it

    def note(self, text: str) -> None:
        self._display.display(self._html(f"note: {text}"))

    def _html(self, text: str, bar: str = "") -> Any:
        return self._display.HTML(f"<div>{bar} {html.escape(printable(text))}</div>")

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started = drawn = time.monotonic()
        done = 0.0
        handle = self._display.display(self._html(name), display_id=True)

        def advance(steps: float, left: float | None = None, said: str = "") -> None:
            nonlocal done, drawn
            done += steps
            now = time.monotonic()
            if now - drawn > _SECONDS_BETWEEN_DRAWINGS and total > 1:
                left = (now - started) * (total - done) / max(done, 1e-9) if left is None else left
                words = (
                    f"{name}: {done / total:.0%} of {total:,.0f} {unit}, about {format_seconds(round(left, 1))} left"
                )
                handle.update(self._html(words, f'<progress value="{done / total:.3f}" max="1"></progress>'))
                drawn = now

        yield advance
        handle.update(self._html(f"{name}: done in {_since(started)}"))


class Bars(Lines):
    """One live bar for the running stage, below the lines of the finished ones."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._live: LiveDisplay | None = None
        self._tasks: list[TaskID] = []

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started = time.monotonic()
        if self._live is None:
            with _live_display(self.console, self._in_all) as live:
                self._live = live
                try:
                    with self._task(live, name, total, unit) as advance:
                        yield advance
                finally:
                    self._live = None
        else:  # a stage within a stage has the bar while it lasts
            with self._task(self._live, name, total, unit) as advance:
                yield advance
        line = f"[green]{self._tick}[/green] {self._place('{}/{} ')}{name:<12}[dim]{_since(started):>11}[/dim]"
        self.console.print(line, highlight=False)

    @contextmanager
    def _task(self, live: LiveDisplay, name: str, total: float, unit: str) -> Iterator[Advance]:
        unit = f"of {total:,.0f} {unit}" if total > 1 and self.console.width >= 100 else ""
        task = live.add_task(self._place("{}/{} ") + name, total=total if total > 1 else None, steps=unit, ends=None)

        def advance(steps: float, left: float | None = None, said: str = "") -> None:
            words = f"{unit} ({said})" if said and self.console.width >= 120 else unit
            live.update(task, advance=steps, ends=None if left is None else live.get_time() + left, steps=words)

        for outer in self._tasks:
            live.update(outer, visible=False)
        self._tasks.append(task)
        try:
            yield advance
        finally:
            self._tasks.remove(task)
            live.remove_task(task)
            if self._tasks:
                live.update(self._tasks[-1], visible=True)

    def _in_all(self) -> str:
        """The remaining time of the run, where there is room for it."""
        return self._left_in_all().removeprefix("; ") if self.console.width >= 80 else ""

    @property
    def _tick(self) -> str:
        return "✓" if self.console.encoding.lower().startswith("utf") else "*"


def _since(started: float) -> str:
    return format_seconds(round(time.monotonic() - started, 1))


class _TimeLeft(TimeRemainingColumn):
    """The remaining time that a stage reported, else rich's own estimate; nothing for a stage without steps."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        ends: Any = task.fields["ends"]
        left = task.time_remaining if ends is None else ends - task.get_time()
        text = "" if left is None else format_seconds(max(0, round(left)))
        return Text.assemble((text, "progress.remaining"), (" left", "dim"))


class _ShareDone(TextColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class _InAll(ProgressColumn):
    """The remaining time of the whole run, as it is when it is drawn."""

    def __init__(self, text: Callable[[], str]):
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(), style="dim")


def _live_display(console: Console, in_all: Callable[[], str]) -> LiveDisplay:
    """A bar that vanishes when its stage ends."""
    return LiveDisplay(
        TextColumn("  {task.description:<12}"),
        BarColumn(bar_width=max(6, min(40, console.width - 70))),
        _ShareDone("{task.percentage:>3.0f}%"),
        TextColumn("[dim]{task.fields[steps]}"),
        TimeElapsedColumn(),
        _TimeLeft(compact=True),
        _InAll(in_all),
        console=console,
        transient=True,
    )
