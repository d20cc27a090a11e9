"""Work that the first process asks the others to do with it, while it alone decides what is next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layersmith.run import ranks


@dataclass
class Crew:
    """All processes, of which the first leads and the others follow.

    Attributes:
        jobs: What they do together, by name; the same in all.
        is_open: Whether they work together now.
    """

    jobs: Mapping[str, Callable[..., Any]]
    is_open: bool = False

    @contextmanager
    def led(self) -> Iterator[None]:
        """While open, the first process asks the others, which :meth:`follow`."""
        self.is_open = ranks.are_several()
        try:
            yield
        finally:
            if self.is_open:
                ranks.from_first(lambda: None)
                self.is_open = False

    def follow(self) -> None:
        """Do what the first process asks for, until it has ended."""
        self.is_open = True
        while (asked := ranks.from_first(lambda: None)) is not None:
            name, arguments = asked
            self._together(name, arguments)

    def do(self, name: str, *arguments: Any) -> Any:
        """Do a job, in all processes if they work together; returns the result of this one.

        Raises:
            Exception: As from :func:`.ranks.together`.
        """
        if not self.is_open:
            return self.jobs[name](*arguments)
        ranks.from_first(lambda: (name, arguments))
        return self._together(name, arguments)

    def in_all(self, name: str, *arguments: Any) -> Any:
        """Do a job in all processes, which all call this with the same arguments; returns the result of this one.

        Raises:
            Exception: As from :func:`.ranks.together`.
        """
        self.is_open = ranks.are_several()
        try:
            return self._together(name, arguments)
        finally:
            self.is_open = False

    def _together(self, name: str, arguments: Any) -> Any:
        try:
            return ranks.together(lambda: self.jobs[name](*arguments))
        except Exception:
            self.is_open = False  # it has failed in all
            raise
