"""Checksum store: what comparing costs reads of the cold tier, and what summing costs writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem import _core
from tiermem.bench.checksum_steps import size_of
from tiermem.bench.checksum_turns import Row, Turns, Unit, take_turns
from tiermem.bench.disk import (
    SLOT_EXTRA,
    SPARE_BYTES,
    TIMEOUT_S,
    best_way,
    check_room,
    own_directory,
)
from tiermem.bench.result import Result
from tiermem.bench.run import Run, Scale
from tiermem.device.protocol import Memory
from tiermem.errors import ConfigError, CorruptPageError, InvariantError
from tiermem.layout import PageLayout
from tiermem.store import ColdStore, StoreTransfer

SSD_PERCENT = 2.0
BATCH_BYTES = 256 << 20
"""In one transfer; several are in flight."""
PAIRS = {Scale.QUICK: 3, Scale.FULL: 7}
SUMS_KNOWN = "with sums that are known"


def rows(bench: Run) -> Iterator[Result]:
    """Reads that are compared, and writes of pages whose sums are not known yet.

    Raises
    ------
    CorruptPageError: a page came back damaged. InvariantError: damage was not found.
    OSError, TransferError: the disk fails.
    """
    layout = size_of(bench).layout
    total = bench.pick(gpu=2 << 30, cpu=256 << 20, quick_gpu=128 << 20, quick_cpu=4 << 20)
    pages = total // layout.slot_bytes
    shape = {
        "layers": layout.num_layers,
        "page_bytes": layout.page_bytes,
        "total_bytes": pages * layout.page_bytes,
    }
    num_bytes = pages * layout.page_bytes
    reads = Row("reads from the SSD", shape, Unit.RATE, SSD_PERCENT, num_bytes)
    writes = Row("writes to the SSD", shape, Unit.RATE, SSD_PERCENT, num_bytes, SUMS_KNOWN)
    try:
        check_room(bench.directory, pages * (layout.slot_bytes + SLOT_EXTRA) + SPARE_BYTES)
    except ConfigError as error:
        yield from (row.skipped(bench, str(error)) for row in (reads, writes))
        return
    bench.progress("checksums: which way of reading and writing suits the disk")
    options = best_way(bench, total)
    memory = bench.device.allocate_host(pages * layout.slot_bytes)
    try:
        with own_directory(bench.directory) as path:
            cap_bytes = pages * (layout.slot_bytes + SLOT_EXTRA) + SPARE_BYTES // 2
            store = ColdStore(path / "store", layout, cap_bytes, "auto", TIMEOUT_S, options)
            note = str(options) if options else store.io_kind
            try:
                store.engine.register_memory(memory.address, memory.num_bytes)
                field = _Field(bench, layout, memory, store)
                # the first write meets extents that were never written, and does not count
                yield writes.measured(bench, field.written(), note)
                yield reads.measured(bench, field.read(), note)
            finally:
                store.close()
    finally:
        memory.free()


class _Field:
    """A store whose pages all have a place in memory."""

    def __init__(self, bench: Run, layout: PageLayout, memory: Memory, store: ColdStore) -> None:
        self._bench = bench
        self._pairs = PAIRS[bench.scale]
        self._layout = layout
        self._store = store
        count = memory.num_bytes // layout.slot_bytes
        self._slots = np.random.default_rng(0).permutation(count)
        self._at = memory.address + np.arange(count, dtype=np.int64) * layout.slot_bytes
        words = memory.tensor.view(torch.int64)
        torch.arange(len(words), out=words)
        self._sums = _core.checksum_pages(self._at, layout.layer_bytes, layout.num_layers)

    def written(self) -> Turns:
        """Writes whose sums are computed on the way, and such that bring theirs, as sealed pages do."""
        self._bench.progress("checksums: writes to the SSD")
        return take_turns(lambda: self._write(None), lambda: self._write(self._sums), self._pairs)

    def read(self) -> Turns:
        """Reads of what was written last."""
        self._bench.progress("checksums: reads from the SSD")
        turns = take_turns(self._read, self._read_unchecked, self._pairs)
        found = _core.checksum_pages(self._at, self._layout.layer_bytes, self._layout.num_layers)
        if not np.array_equal(found, self._sums):
            raise CorruptPageError("checksums: pages came back from the SSD as others")
        self._check_comparison()
        return turns

    def _write(self, sums: NDArray[np.uint64] | None) -> float:
        start_s = time.perf_counter()
        transfers = [
            self._store.write(
                self._slots[part], self._at[part], [None] * len(self._slots[part]),
                None if sums is None else sums[part],
            )
            for part in self._parts()
        ]  # fmt: skip
        _wait(transfers)
        return time.perf_counter() - start_s

    def _read(self) -> float:
        start_s = time.perf_counter()
        bad = self._num_bad(self._start_reads())
        elapsed_s = time.perf_counter() - start_s
        if bad:
            raise CorruptPageError(f"checksums: {bad} pages came back damaged from the SSD")
        return elapsed_s

    def _read_unchecked(self) -> float:
        start_s = time.perf_counter()
        transfers = self._start_reads()
        for transfer in transfers:
            transfer.leave_unchecked()  # nothing is looked at before the first wait
        bad = self._num_bad(transfers)
        elapsed_s = time.perf_counter() - start_s
        if bad != len(self._slots):
            raise InvariantError(
                f"checksums: {len(self._slots) - bad} pages were compared where none was to be"
            )
        return elapsed_s

    def _start_reads(self) -> list[StoreTransfer]:
        return [self._store.read(self._slots[part], self._at[part]) for part in self._parts()]

    def _num_bad(self, transfers: list[StoreTransfer]) -> int:
        """How many pages do not count as intact, once all of them have ended."""
        _wait(transfers)
        return sum(int((~self._store.verify(transfer)).sum()) for transfer in transfers)

    def _check_comparison(self) -> None:
        """A byte that was changed on the disk is found."""
        path = self._store.path / "slots"
        _change(path, self._store.slot_stride * int(self._slots[-1]) + self._layout.page_bytes // 2)
        bad = self._num_bad(self._start_reads())
        if bad != 1:
            raise InvariantError(f"checksums: of one damaged page on the SSD {bad} were found")

    def _parts(self) -> list[slice]:
        step = max(1, BATCH_BYTES // self._layout.slot_bytes)
        return [slice(start, start + step) for start in range(0, len(self._slots), step)]


def _wait(transfers: list[StoreTransfer]) -> None:
    for transfer in transfers:
        while not transfer.poll():
            transfer.wait()


def _change(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
