"""Show run: `tiermem show` from options to text or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.cli.human import NOTHING, count_text, size_text
from tiermem.cli.screen import terminal_width
from tiermem.cli.store.verify_run import report_text
from tiermem.cli.store.words import (
    GONE_TEXTS,
    age_text,
    count_of,
    key_text,
    model_text,
    root_json,
    salt_text,
    tokens_text,
    when_text,
)
from tiermem.cli.table import Align, Table, pairs
from tiermem.errors import ConfigError, TransferError
from tiermem.slot_scan import read_slot
from tiermem.store_chains import Forest
from tiermem.store_check import PageReport, Verdict, check_page
from tiermem.store_content import StoreContent
from tiermem.store_format import sound_trailers
from tiermem.store_reader import StoreReader

MOST_CANDIDATES = 10
MOST_CHAIN_ROWS = 200
SECOND_NS = 10**9


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """One page of a store and what was found of it.

    row: in `content`. report: None where the page is intact. trailer: the record behind it, None where it cannot
    be read or is damaged. chain: rows from the first page that is stored to this one.
    """

    reader: StoreReader
    content: StoreContent
    forest: Forest
    row: int
    report: PageReport | None
    trailer: np.void | None

    @property
    def chain(self) -> list[int]:
        return self.forest.chain_to(self.row)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    with StoreReader(options.store) as reader:
        content = reader.content()
        row = _find(content, options.key)
        report = check_page(reader, content, row)
        trailer = _trailer(reader, int(content.slots[row]))
        page = Page(reader, content, content.forest(), row, report, trailer)
        if options.json:
            print(json.dumps(to_json(page, options.chain), indent=2))
        else:
            width = terminal_width(sys.stdout)
            print(
                "\n".join(
                    [*lines_of(page, width), *(_chain_lines(page, width) if options.chain else ())]
                )
            )
    is_lost = report is not None and (
        report.verdict.is_damage or report.verdict is Verdict.UNSETTLED
    )
    return 1 if is_lost else 0


def _find(content: StoreContent, digits: str) -> int:
    """The row of the one page whose key begins so."""
    rows = content.find(digits)
    if len(rows) == 1:
        return int(rows[0])
    if len(rows) > 1:
        keys = ", ".join(content.key(int(row)).hex()[:16] for row in rows[:MOST_CANDIDATES])
        more = ", ..." if len(rows) > MOST_CANDIDATES else ""
        raise ConfigError(
            f"{digits}: the keys of {len(rows)} pages begin so: {keys}{more}; give more digits"
        )
    gone = [item for item in content.gone.values() if item.key.hex().startswith(digits)]
    if gone:
        item = max(gone, key=lambda item: item.when_ns)
        raise ConfigError(
            f"{digits}: not stored any more: {GONE_TEXTS[item.why]}, {when_text(item.when_ns / SECOND_NS)}"
        )
    raise ConfigError(
        f"{digits}: no page of this store has a key that begins so; see `tiermem ls --pages`"
    )


def _trailer(reader: StoreReader, slot: int) -> np.void | None:
    if slot >= reader.num_slots:
        return None
    try:
        _, tail = read_slot(reader.slots, reader.layout, slot)
    except TransferError:
        return None
    records, sound = sound_trailers(reader.layout, np.frombuffer(tail, dtype=np.uint8)[None])
    record: np.void = records[0]
    return record if sound[0] else None


def lines_of(page: Page, width: int | None) -> list[str]:
    """The page as text."""
    content, row, layout = page.content, page.row, page.reader.layout
    entry, root = content.entry(row), content.root(row)
    first = page.chain[0]
    num_after = int(page.forest.num_after[row])
    rows = [
        ("page", content.key(row).hex()),
        ("tokens", f"{tokens_text(entry.position, 1, layout)} of its prompt (page {entry.position})"),
        ("page before", "none: it is a first page" if entry.position == 0 else entry.parent.hex()),
        ("pages after", f"{count_text(num_after)} directly" if num_after else "none: a prompt ends here"),
        ("chain", f"{count_of(len(page.chain), 'page')} up to here, from {key_text(content.key(first))}"),
        ("model", NOTHING if root is None else model_text(root)),
        ("salt", NOTHING if root is None else salt_text(root.salt)),
        ("shard", NOTHING if root is None else f"{root.shard[0]} of {root.shard[1]}"),
        ("root", NOTHING if root is None else root.hash.hex()),
        ("session", content.label(row) or "no label"),
        ("written", f"{when_text(entry.generation / SECOND_NS)}, generation {entry.generation}"),
        ("last used", when_text(int(content.last_use_s[row]))),
        ("hits", count_text(entry.hits)),
        ("slot", _slot_text(page, entry.slot)),
        ("checksum", f"{entry.checksum:016x}, over those of the layers"),
        ("layers", _layers_text(page)),
        ("trailer", _trailer_text(page)),
        ("verified", _verified_text(page)),
    ]  # fmt: skip
    return pairs(rows).lines(width)


def _verified_text(page: Page) -> str:
    if page.report is not None:
        return f"no: {report_text(page.report)}"
    if page.reader.can_read_pages:
        return "yes: every byte is as it was written"
    return f"its trailer alone: the page is encrypted with the key {page.reader.key_id}, which is not here"


def _slot_text(page: Page, slot: int) -> str:
    start = slot * page.reader.slot_stride
    size = size_text(page.reader.slot_stride)
    return f"{slot}: {size} from byte {count_text(start)} of {page.reader.path / 'slots'}"


def _layers_text(page: Page) -> str:
    sums = _layer_sums(page)
    if sums is None:
        return NOTHING
    shown = ", ".join(f"{number:016x}" for number in sums[:2].tolist())
    return f"{shown}, ... ({len(sums)} checksums; --json has all)" if len(sums) > 2 else shown


def _trailer_text(page: Page) -> str:
    if page.trailer is None:
        return "damaged, or cannot be read"
    if int(page.trailer["generation"]) != int(page.content.generations[page.row]):
        return f"of another write, generation {int(page.trailer['generation'])}"
    cipher = int(page.trailer["cipher"])
    return f"sound, {'not encrypted' if cipher == 0 else f'encrypted (cipher {cipher})'}"


def _layer_sums(page: Page) -> NDArray[np.uint64] | None:
    if page.trailer is None:
        return None
    sums: NDArray[np.uint64] = page.trailer["checksums"][: page.reader.layout.num_layers]
    return sums


def _chain_lines(page: Page, width: int | None) -> list[str]:
    """The pages before this one, and this one."""
    content, layout = page.content, page.reader.layout
    shown = page.chain[-MOST_CHAIN_ROWS:]
    rows = tuple(
        (
            key_text(content.key(row)),
            tokens_text(int(content.positions[row]), 1, layout),
            count_text(int(page.forest.num_after[row])),
            str(content.slots[row]),
            age_text(int(content.generations[row]) / SECOND_NS),
            age_text(int(content.last_use_s[row])),
            count_text(int(content.hits[row])),
            content.label(row) or NOTHING,
        )
        for row in shown
    )
    titles = ("page", "tokens", "after it", "slot", "age", "used", "hits", "session")
    lines = ["", *Table(titles, rows, (Align.LEFT, *[Align.RIGHT] * 6, Align.LEFT)).lines(width)]
    if len(shown) < len(page.chain):
        lines.append(f"the last {len(shown)} of {len(page.chain)} pages shown; --json has all")
    return lines


def to_json(page: Page, with_chain: bool) -> dict[str, object]:
    """The page as one document."""
    content, row, layout = page.content, page.row, page.reader.layout
    entry, sums = content.entry(row), _layer_sums(page)
    report, trailer = page.report, page.trailer
    first_child = np.flatnonzero(page.forest.before == row)
    document: dict[str, object] = {
        "store": str(page.reader.path),
        "key": content.key(row).hex(),
        "parent": entry.parent.hex(),
        "position": entry.position,
        "first_token": entry.position * layout.page_tokens,
        "end_token": (entry.position + 1) * layout.page_tokens,
        "followed_by": [content.key(int(other)).hex() for other in first_child],
        "root": root_json(content.root(row)),
        "session": content.label(row) or None,
        "tier": "ssd",
        "slot": entry.slot,
        "offset_bytes": entry.slot * page.reader.slot_stride,
        "bytes": page.reader.slot_stride,
        "generation": entry.generation,
        "stored_s": entry.generation / SECOND_NS,
        "last_use_s": int(content.last_use_s[row]),
        "hits": entry.hits,
        "checksum": f"{entry.checksum:016x}",
        "layer_checksums": None if sums is None else [f"{number:016x}" for number in sums.tolist()],
        "trailer": None if trailer is None else {
            "generation": int(trailer["generation"]),
            "cipher": int(trailer["cipher"]),
            "key": trailer["key"].tobytes().hex(),
        },
        "is_intact": report is None,
        "is_read": page.reader.can_read_pages,
        "finding": None if report is None else report_text(report),
    }  # fmt: skip
    if with_chain:
        document["chain"] = [content.key(other).hex() for other in page.chain]
        document["is_cut"] = bool(page.forest.is_cut[page.chain[0]])
    return document
