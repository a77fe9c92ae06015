"""Listing view: `tiermem ls` from options to text or JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from tiermem.cli.human import NOTHING, count_text, size_text
from tiermem.cli.screen import terminal_width
from tiermem.cli.store.heading import heading_json, heading_lines
from tiermem.cli.store.listing import (
    Listing,
    Row,
    SortBy,
    list_chains,
    list_pages,
    list_sessions,
)
from tiermem.cli.store.words import (
    age_text,
    key_text,
    root_json,
    root_text,
    tokens_text,
)
from tiermem.cli.table import Align, Table
from tiermem.errors import ConfigError
from tiermem.store_chains import Int64s
from tiermem.store_content import StoreContent
from tiermem.store_reader import StoreReader

LISTS = {"chains": list_chains, "sessions": list_sessions, "pages": list_pages}
NO_LABEL = "(no label)"
NOUNS = {"chains": "chain", "pages": "page"}
FIGURES = ("pages", "size", "age", "used", "hits")


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    with StoreReader(options.store) as reader:
        content = reader.content()
        chosen = _chosen(content, options.label)
        listing = LISTS[options.view](content, chosen, SortBy(options.sort), options.limit)
        view = _View(reader, content, options.view)
        if options.json:
            print(json.dumps(view.to_json(listing), indent=2))
        else:
            print("\n".join(view.lines(listing, terminal_width(sys.stdout))))
    return 0


def _chosen(content: StoreContent, label: str | None) -> Int64s:
    """The rows of the pages asked for."""
    if label is None:
        return content.rows()
    numbers = [number for number, text in content.labels.items() if text == label]
    if not numbers:
        known = sorted(set(content.labels.values()))
        which = ", ".join(repr(text) for text in known[:10]) or "none"
        more = ", ..." if len(known) > 10 else ""
        raise ConfigError(f"--label {label!r}: no session of this store; known are {which}{more}")
    return np.flatnonzero(np.isin(content.entries["label"], numbers)).astype(np.int64)


class _View:
    """A listing of one store as text or JSON."""

    def __init__(self, reader: StoreReader, content: StoreContent, kind: str) -> None:
        self._reader, self._content, self._kind = reader, content, kind
        self._now_s = time.time()

    def to_json(self, listing: Listing) -> dict[str, object]:
        return {
            **heading_json(self._reader, self._content),
            "shown": listing.num_shown,
            "found": listing.num_found,
            self._kind: [self._row_json(row) for row in listing.rows],
        }

    def lines(self, listing: Listing, width: int | None) -> list[str]:
        lines = heading_lines(self._reader, self._content)
        if self._kind == "sessions":
            lines += ["", *self._table(listing.rows).lines(width)]
        else:
            for number in dict.fromkeys(self._root_number(row) for row in listing.rows):
                rows = tuple(row for row in listing.rows if self._root_number(row) == number)
                lines += ["", root_text(self._content.roots.get(number))]
                lines += self._table(rows).lines(width)
        if listing.num_shown < listing.num_found:
            what = f"{self._kind} shown; --limit 0 shows all"
            lines += [
                "",
                f"{count_text(listing.num_shown)} of {count_text(listing.num_found)} {what}",
            ]
        if any(row.is_cut for row in listing.rows):
            lines += ["", "*: a page before these is not stored, so that no prompt finds them"]
        return lines

    def _table(self, rows: tuple[Row, ...]) -> Table:
        cells: list[tuple[str, ...]]
        if self._kind == "sessions":
            cells = [(self._label(row), *self._figures(row)) for row in rows]
            return Table(("session", *FIGURES), tuple(cells))
        cells = [
            (self._outline(row), self._tokens(row), *self._figures(row), self._label(row))
            for row in rows
        ]
        aligns = (Align.LEFT, *[Align.RIGHT] * 6, Align.LEFT)
        return Table((NOUNS[self._kind], "tokens", *FIGURES, "session"), tuple(cells), aligns)

    def _outline(self, row: Row) -> str:
        """The page's key, behind the branches that lead to it."""
        bars = "".join("│ " if goes_on else "  " for goes_on in row.outline[:-1])
        fork = ("├ " if row.outline[-1] else "└ ") if row.outline else ""
        return bars + fork + key_text(self._content.key(row.row)) + "*" * row.is_cut

    def _tokens(self, row: Row) -> str:
        return tokens_text(row.first_page, row.num_pages, self._reader.layout)

    def _figures(self, row: Row) -> tuple[str, str, str, str, str]:
        return (
            count_text(row.num_pages),
            size_text(row.num_pages * self._reader.slot_stride),
            age_text(row.stored_s, self._now_s),
            age_text(row.last_use_s, self._now_s),
            count_text(row.hits),
        )

    def _label(self, row: Row) -> str:
        return self._content.label(row.row) or (NO_LABEL if self._kind == "sessions" else NOTHING)

    def _root_number(self, row: Row) -> int:
        return int(self._content.entries["root"][row.row])

    def _row_json(self, row: Row) -> dict[str, object]:
        layout = self._reader.layout
        figures: dict[str, object] = {
            "session": self._content.label(row.row) or None,
            "pages": row.num_pages,
            "bytes": row.num_pages * self._reader.slot_stride,
            "stored_s": row.stored_s,
            "last_use_s": row.last_use_s,
            "hits": row.hits,
        }
        if self._kind == "sessions":
            return figures
        return {
            "key": self._content.key(row.row).hex(),
            "depth": len(row.outline),
            "first_token": row.first_page * layout.page_tokens,
            "end_token": (row.first_page + row.num_pages) * layout.page_tokens,
            "is_end": row.is_end,
            "is_cut": row.is_cut,
            "tier": "ssd",
            "slot": int(self._content.entries["slot"][row.row]) if self._kind == "pages" else None,
            "root": root_json(self._content.root(row.row)),
            **figures,
        }
