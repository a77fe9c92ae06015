"""Du run: `tiermem du` from options to text or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from tiermem.cli.human import share_text, size_text
from tiermem.cli.screen import terminal_width
from tiermem.cli.store.words import count_of
from tiermem.cli.table import Align, Table
from tiermem.store_reader import StoreReader
from tiermem.store_usage import StoreUsage


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    with StoreReader(options.store) as reader:
        content = reader.content()
        usage = StoreUsage.of(reader, content)
        if options.json:
            document = {**asdict(usage), "total": usage.total, "store": str(reader.path)}
            document |= {"num_pages": len(content), "num_slots": reader.num_slots}
            print(json.dumps(document, indent=2))
        else:
            width = terminal_width(sys.stdout)
            print("\n".join(lines_of(usage, reader, len(content), width)))
    return 0


def lines_of(
    usage: StoreUsage, reader: StoreReader, num_pages: int, width: int | None
) -> list[str]:
    """The usage as text."""
    free = reader.num_slots - num_pages
    parts = (
        (
            "pages",
            usage.pages,
            f"{count_of(num_pages, 'slot')} of {size_text(reader.slot_stride)}",
        ),
        ("free", usage.free, f"{count_of(free, 'slot')} without a page"),
        ("index", usage.index, "which page is in which slot"),
        ("set aside", usage.set_aside, "found damaged or left behind; `tiermem gc` removes it"),
        ("others", usage.others, "header, lock, directories"),
    )
    rows = tuple(
        (name, size_text(size), share_text(size / usage.total), what)
        for name, size, what in parts
        if size or name != "set aside"
    )
    aligns = (Align.LEFT, Align.RIGHT, Align.RIGHT, Align.LEFT)
    share = share_text(usage.total / usage.cap if usage.cap else None)
    of_cap = f"of a cap of {size_text(usage.cap)} ({share})"
    system = f"{size_text(usage.file_system_free)} of {size_text(usage.file_system_total)}"
    return [
        f"{reader.path}: {size_text(usage.total)} on the disk, {of_cap}",
        *Table(("", "", "", ""), rows, aligns).lines(width),
        f"{system} are free on its file system",
    ]
