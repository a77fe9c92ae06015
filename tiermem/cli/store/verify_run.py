"""Verify run: `tiermem verify` from options to verdict."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiermem.cli.human import rate_text, size_text, time_text
from tiermem.cli.notes import Progress
from tiermem.cli.screen import terminal_width
from tiermem.cli.store.words import count_of, key_text, places_text
from tiermem.cli.table import Align, Table
from tiermem.errors import CorruptPageError
from tiermem.slot_scan import Part
from tiermem.store_chains import rows_of
from tiermem.store_check import CheckResult, PageReport, Verdict, check_pages
from tiermem.store_collect import unreachable
from tiermem.store_content import StoreContent
from tiermem.store_keeper import StoreKeeper, rebuild_where_damaged
from tiermem.store_names import KEY_BYTES, GoneReason
from tiermem.store_reader import StoreReader

SHOWN = 20
VERDICT_TEXTS = {
    Verdict.PAYLOAD: "its bytes are not those that were written",
    Verdict.TRAILER: "its trailer is not the one that was written",
    Verdict.MISMATCH: "its trailer contradicts the index",
    Verdict.UNREADABLE: "cannot be read",
    Verdict.BEYOND: "the slot file ends before it",
    Verdict.OUTDATED: "its slot was used again; the entry is outdated",
    Verdict.UNSETTLED: "not what was written, but it may be being written: look again when it is not in use",
    Verdict.CHANGED: "changed meanwhile by the process that has the store in use",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found. index_error: what is wrong with the index's file; empty where nothing is.

    content, checked: None where the index could not be read. num_cut: pages that nobody can find, because one
    before them is not stored. num_set_aside: damaged pages that --repair took out; None without it.
    num_dropped: other ones that it took out, outdated or found through those.
    """

    index_error: str
    content: StoreContent | None
    checked: CheckResult | None
    num_cut: int = 0
    num_set_aside: int | None = None
    num_dropped: int = 0

    @property
    def is_well(self) -> bool:
        """Whether nothing is damaged."""
        return not (
            self.index_error
            or (self.content is not None and self.content.strays)
            or (self.checked is not None and (self.checked.damaged or self.checked.unsettled))
        )

    @property
    def is_unsettled(self) -> bool:
        """Whether the only thing that is not well is what a process may be writing just now."""
        strays = self.content is not None and self.content.strays
        checked = self.checked
        return bool(
            checked and checked.unsettled and not (checked.damaged or strays or self.index_error)
        )


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    part = Part.TRAILER if options.quick else Part.WHOLE
    with StoreReader(options.store) as reader:
        outcome = _repair(options.store, part) if options.repair else _check(reader, part)
        if options.json:
            print(json.dumps(to_json(reader, outcome, part), indent=2))
        else:
            print("\n".join(lines_of(reader, outcome, part, terminal_width(sys.stdout))))
    return 0 if outcome.is_well else 1


def _check(reader: StoreReader, part: Part) -> Outcome:
    try:
        content = reader.content()
    except CorruptPageError as error:
        return Outcome(str(error), None, None)
    try:
        checked = check_pages(reader, content, content.rows(), part, _progress)
    finally:
        Progress.clear()
    return Outcome("", content, checked, int(content.forest().is_cut.sum()))


def _repair(path: Path, part: Part) -> Outcome:
    """Check a store that nobody has in use, and take out what is damaged."""
    index_error = rebuild_where_damaged(path)
    with StoreKeeper(path) as keeper:
        outcome = replace(_check(keeper.reader, part), index_error=index_error)
        content, checked = outcome.content, outcome.checked
        if content is None or checked is None:
            return outcome
        bad = [report for report in checked.reports if report.verdict is not Verdict.CHANGED]
        if bad or content.strays:
            reasons = _reasons(content, bad)
            outcome = replace(outcome, num_dropped=len(reasons) - len(checked.damaged))
            keeper.drop(reasons)
            keeper.wipe_trailers(np.array([one.slot for one in checked.damaged], dtype=np.int64))
        return replace(outcome, num_set_aside=len(checked.damaged))


def _reasons(content: StoreContent, bad: list[PageReport]) -> dict[int, GoneReason]:
    """Why which rows are to go: what is damaged or outdated, and all that is found through it."""
    keys = np.frombuffer(b"".join(report.key for report in bad), dtype=np.uint8)
    rows = rows_of(keys.reshape(-1, KEY_BYTES), content.keys)
    lost = np.zeros(len(content), dtype=np.bool_)
    lost[rows] = True
    gone = unreachable(content.forest(), content.positions, lost)
    reasons = dict.fromkeys(np.flatnonzero(gone).tolist(), GoneReason.UNREACHABLE)
    for row, report in zip(rows.tolist(), bad, strict=True):
        is_damage = report.verdict.is_damage
        reasons[row] = GoneReason.QUARANTINED if is_damage else GoneReason.EVICTED
    return reasons


def _progress(done: int, total: int, seconds: float) -> None:
    rate = rate_text(done / max(seconds, 1e-9) / 1e9)
    Progress.show(f"verify: {size_text(done)} of {size_text(total)}, {rate}")


def to_json(reader: StoreReader, outcome: Outcome, part: Part) -> dict[str, object]:
    """One document."""
    checked, content = outcome.checked, outcome.content
    reports = checked.reports if checked else ()
    return {
        "store": str(reader.path),
        "is_well": outcome.is_well,
        "in_use": reader.owner_pid() is not None,
        "quick": part is Part.TRAILER,
        "index_error": outcome.index_error or None,
        "damaged_records": None if content is None else len(content.strays),
        "unreachable_pages": outcome.num_cut,
        "pages": checked.num_pages if checked else None,
        "damaged_pages": len(checked.damaged) if checked else None,
        "unsettled_pages": len(checked.unsettled) if checked else None,
        "set_aside": outcome.num_set_aside,
        "dropped": outcome.num_dropped,
        "bytes": checked.num_bytes if checked else 0,
        "elapsed_s": checked.elapsed_s if checked else 0.0,
        "findings": [_report_json(report) for report in reports],
    }


def lines_of(reader: StoreReader, outcome: Outcome, part: Part, width: int | None) -> list[str]:
    """The same as text."""
    lines = [*_index_lines(outcome)]
    checked = outcome.checked
    if checked is not None:
        lines += [_pages_line(checked, part), *_findings(checked.reports, width)]
    if outcome.num_cut:
        cut = count_of(outcome.num_cut, "page")
        lines.append(f"{cut} cannot be found, a page before is not stored: `tiermem gc` drops such")
    if outcome.is_well:
        return [*lines, f"{reader.path}: all is well"]
    if outcome.is_unsettled:
        return [
            *lines,
            f"{reader.path}: not settled: verify it again when no process has it in use",
        ]
    what = f"{reader.path}: damaged"
    if outcome.num_set_aside is not None:
        what += f"; {count_of(outcome.num_set_aside, 'page')} set aside"
        if outcome.num_dropped:
            what += f", and {count_of(outcome.num_dropped, 'page')} dropped that were found through them"
    elif checked is not None and outcome.index_error == "":
        what += "; no damaged page is ever served; `tiermem verify --repair` sets them aside"
    return [*lines, what]


def _index_lines(outcome: Outcome) -> list[str]:
    if outcome.index_error:
        by_whom = (
            "the next process that opens the store, or `tiermem verify --repair`, makes it again"
        )
        is_made = outcome.content is not None
        what = "it was made again from the trailers" if is_made else by_whom
        return [f"index: damaged: {outcome.index_error}", what]
    if outcome.content is not None and outcome.content.strays:
        return [f"index: {count_of(len(outcome.content.strays), 'record')} damaged and left out"]
    return ["index: in order"]


def _pages_line(checked: CheckResult, part: Part) -> str:
    what = "trailers of pages" if part is Part.TRAILER else "pages"
    rate = rate_text(checked.num_bytes / max(checked.elapsed_s, 1e-9) / 1e9)
    intact = checked.num_pages - len(checked.reports)
    return (
        f"{what}: {intact} of {checked.num_pages} intact; {size_text(checked.num_bytes)} read in "
        f"{time_text(checked.elapsed_s)}, {rate}"
    )


def _findings(reports: tuple[PageReport, ...], width: int | None) -> list[str]:
    if not reports:
        return []
    counts = Counter(report.verdict for report in reports)
    lines = [f"  {count_of(counts[v], 'page')}: {VERDICT_TEXTS[v]}" for v in Verdict if counts[v]]
    told = [report for report in reports if report.verdict.is_damage]
    if not told:
        return lines
    rows = tuple(
        (key_text(report.key), str(report.position), str(report.slot), report_text(report))
        for report in told[:SHOWN]
    )
    aligns = (Align.LEFT, Align.RIGHT, Align.RIGHT, Align.LEFT)
    lines += Table(("page", "position", "slot", "what"), rows, aligns).lines(width)
    if len(told) > SHOWN:
        lines.append(f"{SHOWN} of {len(told)} damaged pages shown; --json has all")
    return lines


def report_text(report: PageReport) -> str:
    """What was found, in words."""
    text = VERDICT_TEXTS[report.verdict]
    if report.layers:
        text += f" (layer {places_text(report.layers)})"
    return f"{text}: {report.error}" if report.error else text


def _report_json(report: PageReport) -> dict[str, object]:
    return {
        "key": report.key.hex(),
        "slot": report.slot,
        "position": report.position,
        "verdict": report.verdict.name.lower(),
        "is_damage": report.verdict.is_damage,
        "layers": list(report.layers),
        "error": report.error or None,
    }
