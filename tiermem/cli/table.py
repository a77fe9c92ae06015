"""Table: aligned columns of plain text that fit a width."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

GAP = "  "
ELLIPSIS = "…"
LEAST_WIDTH = 8
"""No column is cut to fewer characters than this."""


class Align(Enum):
    """On which side of a column its texts stand."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under titles; a table without titles has no head. Columns but the first stand on the right."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    aligns: tuple[Align, ...] = ()

    @property
    def width(self) -> int:
        """Columns of the terminal that the table takes when nothing is cut."""
        return max((text_width(line) for line in self.lines()), default=0)

    def turned(self) -> Table:
        """The same table with rows for columns."""
        rows = (self.titles, *self.rows)
        columns = tuple(zip(*rows, strict=True))
        return Table(columns[0], columns[1:])

    def lines(self, width: int | None = None) -> list[str]:
        """The table as lines of at most `width` columns of the terminal; None for as wide as it is."""
        head = [self.titles] if any(self.titles) else []
        body = [tuple(_indented(cell) for cell in row) for row in (*head, *self.rows)]
        if not body:
            return []
        widths = [max(text_width(row[i]) for row in body) for i in range(len(body[0]))]
        if width is not None:
            widths = _fitted(widths, width)
        lines = [self._line(row, widths) for row in body]
        return lines if width is None else [clip(line, width) for line in lines]

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = [
            _padded(clip(cell, width), width, self._align(i))
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return GAP.join(cells).rstrip()

    def _align(self, column: int) -> Align:
        if self.aligns:
            return self.aligns[column]
        return Align.LEFT if column == 0 else Align.RIGHT


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and values, both on the left, without a head."""
    return Table(("", ""), tuple(rows), (Align.LEFT, Align.LEFT))


def text_width(text: str) -> int:
    """Columns of the terminal that `text` takes: two for wide characters, none for combining ones."""
    return sum(_character_width(character) for character in text)


def clip(text: str, width: int) -> str:
    """`text` in at most `width` columns, ending in an ellipsis where it was cut."""
    if text_width(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _character_width(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + ELLIPSIS if width > 0 else ""


def printable(text: str) -> str:
    """`text` on one line and without anything that a terminal would obey rather than show."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in _UNSHOWN else character
        for character in " ".join(text.split())
    )


def _indented(text: str) -> str:
    """`text` as it can be shown, with the spaces that it begins with: what indents a tree."""
    return " " * (len(text) - len(text.lstrip(" "))) + printable(text)


_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def _character_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Me", "Mn", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _padded(text: str, width: int, align: Align) -> str:
    padding = " " * (width - text_width(text))
    return text + padding if align is Align.LEFT else padding + text


def _fitted(widths: list[int], width: int) -> list[int]:
    """`widths` with the widest columns made narrower until all fit, or none is left that may be."""
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0 and max(widths) > LEAST_WIDTH:
        widest = widths.index(max(widths))
        widths[widest] -= 1
        excess -= 1
    return widths
