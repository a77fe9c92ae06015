"""Store check: whether every page that the index names is in its slot, bit by bit as it was written.

What does not look right is looked at again, with what the index says then: a slot that a process wrote to
meanwhile is no damage. Bits that nothing depends on are not looked at: slots that no entry names, what fills a
page up to a multiple of 4 KiB where its size is none, and room in the index's pages that holds no record.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.cipher_key import KEY_VARIABLE
from tiermem.errors import ConfigError
from tiermem.slot_scan import Batch, Part, SlotScan
from tiermem.store_chains import NO_PAGE, Int64s, rows_of
from tiermem.store_content import StoreContent
from tiermem.store_format import sound_trailers
from tiermem.store_reader import StoreReader
from tiermem.store_transfer import roots_of

SECOND_LOOKS_S = (0.0, 0.2, 0.6, 1.5)
"""Waits before looking again: a process commits what it did to its index within about a second."""


class Verdict(enum.IntEnum):
    """What is to be said of one page."""

    INTACT = 0
    PAYLOAD = 1
    """Its bytes are not those that were written."""
    TRAILER = 2
    """The bytes behind it that say which page it is are not those that were written."""
    MISMATCH = 3
    """The trailer is sound, but contradicts the index."""
    UNREADABLE = 4
    """The disk does not give it back."""
    BEYOND = 5
    """The slot file ends before it."""
    OUTDATED = 6
    """The slot was written again since: the entry is of no use, and nobody will be served by it."""
    CHANGED = 7
    """While it was looked at, the process that has the store in use gave it up or wrote it anew."""
    UNSETTLED = 8
    """Its bytes are not those that were written, but a process has the store in use and may be writing there."""

    @property
    def is_damage(self) -> bool:
        """Whether something was lost that should be there."""
        return Verdict.PAYLOAD <= self <= Verdict.BEYOND


@dataclass(frozen=True, slots=True)
class PageReport:
    """One page that is not simply intact. `layers`: those whose bytes differ; `error`: what the system said."""

    key: bytes
    slot: int
    position: int
    verdict: Verdict
    layers: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """num_pages: how many were looked at. reports: those that are not intact. num_bytes: read in `elapsed_s`."""

    num_pages: int
    reports: tuple[PageReport, ...]
    num_bytes: int
    elapsed_s: float

    @property
    def damaged(self) -> tuple[PageReport, ...]:
        """Pages that are lost."""
        return tuple(report for report in self.reports if report.verdict.is_damage)

    @property
    def unsettled(self) -> tuple[PageReport, ...]:
        """Pages of which nothing can be said while a process writes to the store."""
        return tuple(report for report in self.reports if report.verdict is Verdict.UNSETTLED)


Progress = Callable[[int, int, float], None]
"""Is told bytes read, bytes in all, and seconds so far."""


def check_pages(
    reader: StoreReader,
    content: StoreContent,
    rows: Int64s,
    part: Part,
    progress: Progress | None = None,
) -> CheckResult:
    """Look at these pages of `content`: all of their bytes, or with Part.TRAILER the 4 KiB behind each alone.

    Raises
    ------
    TransferError: the disk did not answer in time.
    CorruptPageError: the index could not be read again.
    ConfigError: all bytes are wanted of an encrypted store whose key the environment does not have.
    """
    if part is Part.WHOLE and not reader.can_read_pages:
        raise ConfigError(
            f"{reader.path}: its pages are encrypted with the key {reader.key_id}: give it in {KEY_VARIABLE}, or "
            f"look at the trailers alone (--quick)"
        )
    start_s = time.monotonic()
    reports = []
    done = 0
    with SlotScan(reader.slots, reader.layout, part) as scan:
        total = len(rows) * scan.bytes_each
        for some, verdicts, batch in _look(reader, content, rows, scan):
            reports += [_report(reader, content, some, verdicts, batch, i)
                        for i in np.flatnonzero(verdicts).tolist()]  # fmt: skip
            done += len(some) * scan.bytes_each
            if progress is not None:
                progress(done, total, time.monotonic() - start_s)
    settled = _look_again(reader, reports, part) if reports else []
    return CheckResult(len(rows), tuple(settled), done, time.monotonic() - start_s)


def check_page(reader: StoreReader, content: StoreContent, row: int) -> PageReport | None:
    """Look at all bytes of one page; None where it is intact. Raises as `check_pages`.

    Of a page that is encrypted with a key that is not there, at its trailer.
    """
    rows = np.array([row], dtype=np.int64)
    part = Part.WHOLE if reader.can_read_pages else Part.TRAILER
    return next(iter(check_pages(reader, content, rows, part).reports), None)


def _look(
    reader: StoreReader, content: StoreContent, rows: Int64s, scan: SlotScan
) -> Iterator[tuple[Int64s, NDArray[np.uint8], Batch]]:
    """The verdicts on these pages, batch by batch; the first batch has those beyond the end of the file."""
    slots = content.slots[rows]
    there = slots < reader.num_slots
    beyond = rows[~there]
    if len(beyond):
        none = np.zeros((0, 0), dtype=np.uint8)
        verdicts = np.full(len(beyond), Verdict.BEYOND, dtype=np.uint8)
        yield beyond, verdicts, Batch(slots[~there], none, none, {})
    done = 0
    for batch in scan.batches(slots[there]):
        part = rows[there][done : done + len(batch.slots)]
        done += len(part)
        yield part, _judge(reader, content, part, batch), batch


def _judge(
    reader: StoreReader, content: StoreContent, rows: Int64s, batch: Batch
) -> NDArray[np.uint8]:
    """A verdict on each page of a batch. What is said last counts."""
    entries = content.entries[rows]
    records, sound = sound_trailers(reader.layout, batch.tails)
    stored = records["checksums"][:, : reader.layout.num_layers]
    verdicts = np.zeros(len(rows), dtype=np.uint8)
    if batch.payloads.shape[1]:
        verdicts[~_payloads_fit(reader, batch, stored)] = Verdict.PAYLOAD
    fits = (roots_of(stored) == entries["checksum"]) & _names_fit(content, rows, records)
    verdicts[~fits] = Verdict.MISMATCH
    verdicts[records["generation"] < entries["generation"]] = Verdict.MISMATCH
    verdicts[records["generation"] > entries["generation"]] = Verdict.OUTDATED
    verdicts[~sound] = Verdict.TRAILER
    verdicts[list(batch.errors)] = Verdict.UNREADABLE
    return verdicts


def _payloads_fit(
    reader: StoreReader, batch: Batch, stored: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Which pages have the checksums of their trailers; encrypted ones are decrypted where they lie."""
    if reader.cipher is None:
        same: NDArray[np.bool_] = (_sums(reader, batch) == stored).all(axis=1)
        return same
    stored, seals = reader.cipher.open_trailers(batch.tails)
    layers = range(reader.layout.num_layers)
    good = reader.cipher.decrypt(seals, layers, _addresses(batch.payloads))
    good &= (_sums(reader, batch) == stored).all(axis=1)
    return good


def _addresses(payloads: NDArray[np.uint8]) -> Int64s:
    first = payloads.__array_interface__["data"][0]
    addresses: Int64s = first + np.arange(len(payloads), dtype=np.int64) * payloads.strides[0]
    return addresses


def _names_fit(content: StoreContent, rows: Int64s, records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether trailers name the pages that the index says are there."""
    entries = content.entries[rows]
    roots = [content.root(row) for row in rows.tolist()]
    same_root = [
        root is None or root.hash == record.tobytes()
        for root, record in zip(roots, records["root"], strict=True)
    ]
    fits: NDArray[np.bool_] = (
        (records["key"] == np.ascontiguousarray(content.keys[rows]).view("V32")[:, 0])
        & (records["parent"] == entries["parent"])
        & (records["position"] == entries["position"])
        & np.array(same_root, dtype=np.bool_)
    )
    return fits


def _sums(reader: StoreReader, batch: Batch) -> NDArray[np.uint64]:
    """The checksum of each layer of each page, (pages, layers)."""
    addresses = _addresses(batch.payloads)
    return _core.checksum_pages(addresses, reader.layout.layer_bytes, reader.layout.num_layers)


def _report(
    reader: StoreReader, content: StoreContent, rows: Int64s, verdicts: NDArray[np.uint8],
    batch: Batch, place: int,
) -> PageReport:  # fmt: skip
    row, verdict = int(rows[place]), Verdict(int(verdicts[place]))
    layers: tuple[int, ...] = ()
    if verdict is Verdict.PAYLOAD and reader.cipher is None:
        records, _ = sound_trailers(reader.layout, batch.tails[place : place + 1])
        one = Batch(batch.slots[:1], batch.payloads[place : place + 1], batch.tails[:1], {})
        stored = records["checksums"][0, : reader.layout.num_layers]
        layers = tuple(np.flatnonzero(_sums(reader, one)[0] != stored).tolist())
    return PageReport(
        key=content.key(row),
        slot=int(content.slots[row]),
        position=int(content.positions[row]),
        verdict=verdict,
        layers=layers,
        error=batch.errors.get(place, ""),
    )


def _look_again(reader: StoreReader, reports: list[PageReport], part: Part) -> list[PageReport]:
    """What is still to be said of these pages once whoever writes to the store has had its time."""
    settled: list[PageReport] = []
    # what is owned by this process is written by nobody while this looks
    is_written = reader.owner_pid() not in (None, os.getpid())
    waits = SECOND_LOOKS_S if is_written else SECOND_LOOKS_S[:1]
    for wait_s in waits:
        time.sleep(wait_s)
        content = reader.content()
        keys = np.frombuffer(b"".join(r.key for r in reports), dtype=np.uint8).reshape(-1, 32)
        rows = rows_of(keys, content.keys)
        settled += [_changed(report) for report, row in zip(reports, rows, strict=True)
                    if row == NO_PAGE]  # fmt: skip
        known = {report.key: report for report in reports}
        reports = []
        with SlotScan(reader.slots, reader.layout, part) as scan:
            for some, verdicts, batch in _look(reader, content, rows[rows != NO_PAGE], scan):
                for i in range(len(some)):
                    report = _report(reader, content, some, verdicts, batch, i)
                    if report.verdict is Verdict.INTACT:
                        settled.append(_changed(known[report.key]))
                    else:
                        reports.append(report)
        if not any(report.verdict.is_damage for report in reports):
            break
    if is_written:
        reports = [_unsettled(report) for report in reports]
    return sorted([*settled, *reports], key=lambda report: report.slot)


def _unsettled(report: PageReport) -> PageReport:
    """A page that is being filled layer by layer differs until its trailer is written, which may take a while."""
    if report.verdict is not Verdict.PAYLOAD:
        return report
    return replace(report, verdict=Verdict.UNSETTLED)


def _changed(report: PageReport) -> PageReport:
    return PageReport(report.key, report.slot, report.position, Verdict.CHANGED)
