"""How a long step tells where it is. Stages report to a :class:`Progress`; only the command line shows anything.

On a terminal the stage at work has a live bar, and those that are done stay as a line each with their time. Where
there is no terminal, or one that cannot move its cursor or is to stay plain, there are lines alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from layersmith.units import format_seconds

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

_SAY_EVERY_SECONDS = 15.0


class Advance(Protocol):
    """Tells of steps just done."""

    def __call__(self, steps: float, left: float | None = None, said: str = "") -> None:
        """Tell.

        Args:
            steps: how many.
            left: seconds that the stage will still take; default: as if every step took as long as those before.
            said: what else is worth saying.
        """


class Progress:
    """Silent.

    Attributes:
        clock: in seconds.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        """A stage of ``total`` steps; call what it yields with the number of steps just done."""
        yield lambda steps, left=None, said="": None

    def note(self, text: str) -> None:
        """A line worth keeping on the screen."""


SILENT = Progress()


def open_console() -> Console:
    """Where the command line writes: of several processes that a launcher started the first alone.

    Nothing but text is written where ``NO_COLOR`` is set (https://no-color.org), or to a terminal that knows no more.
    """
    from rich.console import Console

    if int(os.environ.get("RANK") or 0) > 0:
        return Console(quiet=True)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return Console(force_terminal=False) if plain else Console()


def shown_on(console: Console) -> Progress:
    """Progress as a live bar on a terminal, as plain lines elsewhere, and not at all where nothing is written."""
    if console.quiet:
        return SILENT
    return Bars(console) if console.is_terminal else Lines(console)


class Lines(Progress):
    """A line when a stage is done, and now and then one that says how far a long one is."""

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
            if now - last > _SAY_EVERY_SECONDS and done < total:
                left = (now - started) * (total - done) / max(done, 1e-9) if left is None else left
                more = f" ({said})" if said else ""
                until = format_seconds(round(left, 1))
                self._say(f"{name}: {done / total:.0%} of {total:,.0f} {unit}{more}, about {until} left")
                last = now

        yield advance
        self._say(f"{name}: done in {_since(started)}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars(Lines):
    """One live bar, below the lines of what is done."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._live: rich.progress.Progress | None = None
        self._tasks: list[rich.progress.TaskID] = []

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started = time.monotonic()
        if self._live is None:
            with _live(self.console) as live:
                self._live = live
                try:
                    with self._task(live, name, total, unit) as advance:
                        yield advance
                finally:
                    self._live = None
        else:  # a stage within a stage has the bar while it lasts
            with self._task(self._live, name, total, unit) as advance:
                yield advance
        line = f"[green]{self._tick}[/green] {name:<12}[dim]{_since(started):>11}[/dim]"
        self.console.print(line, highlight=False)

    @contextmanager
    def _task(self, live: rich.progress.Progress, name: str, total: float, unit: str) -> Iterator[Advance]:
        unit = f"of {total:,.0f} {unit}" if total > 1 and self.console.width >= 100 else ""
        task = live.add_task(name, total=total if total > 1 else None, steps=unit, ends=None)

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

    @property
    def _tick(self) -> str:
        return "✓" if self.console.encoding.lower().startswith("utf") else "*"


def _since(started: float) -> str:
    return format_seconds(round(time.monotonic() - started, 1))


def _live(console: Console) -> rich.progress.Progress:
    """A bar that is gone when its stage is; of a stage without steps it only says that it is at work."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Live
    from rich.text import Text

    class Left(TimeRemainingColumn):
        def render(self, task: Any) -> Text:
            if task.total is None:
                return Text("")
            ends = task.fields["ends"]
            left = task.time_remaining if ends is None else ends - task.get_time()
            text = "" if left is None else format_seconds(max(0, round(left)))
            return Text.assemble((text, "progress.remaining"), (" left", "dim"))

    class Share(TextColumn):
        def render(self, task: Any) -> Text:
            return Text("") if task.total is None else super().render(task)

    return Live(
        TextColumn("  {task.description:<12}"),
        BarColumn(bar_width=max(6, min(40, console.width - 48))),
        Share("{task.percentage:>3.0f}%"),
        TextColumn("[dim]{task.fields[steps]}"),
        TimeElapsedColumn(),
        Left(compact=True),
        console=console,
        transient=True,
    )
