"""Tables that results print: as text, and in notebooks as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from layersmith.errors import printable


@dataclass(frozen=True)
class Table:
    """A title, a heading for each column, and rows of cells; ``is_numeric`` if columns after the first have numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = False

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if self.is_numeric and i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.headings, *self.rows)
        ]
        return "\n".join([*([self.title] if self.title else []), *lines])

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(printable(cell))}</{tag}>" for cell in cells) + "</tr>"

        head, body = row(self.headings, "th"), "".join(row(cells, "td") for cells in self.rows)
        caption = f"<caption>{escape(printable(self.title))}</caption>" if self.title else ""
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


class Shown:
    """Base of results: ``str`` gives their tables as text, and notebooks show them as HTML."""

    def tables(self) -> list[Table]:
        """The tables of this result."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())
