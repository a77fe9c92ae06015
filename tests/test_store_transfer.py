"""Pages between memory and the slot file: in parts, checked as they arrive, and around the page cache."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from io_support import POISON, Bytes, memory, random_memory, rng_fixture  # noqa: F401

from tiermem import ConfigError, DeadlineError, PageLayout, TransferError, _core, store_transfer
from tiermem._core import EngineKind, FaultOps, FileCall
from tiermem.disk_rates import DiskOptions
from tiermem.store import INDEX_BYTES, INDEX_BYTES_PER_SLOT, ColdStore
from tiermem.store_format import TRAILER_BYTES, PageName
from tiermem.store_transfer import parts_of

LAYOUT = PageLayout(3, 2, 32, "float16", 16)
SLOT = LAYOUT.slot_bytes
NUM_SLOTS = 40
CAP = INDEX_BYTES + NUM_SLOTS * (SLOT + TRAILER_BYTES + INDEX_BYTES_PER_SLOT)
WAYS = [
    None,
    DiskOptions(EngineKind.THREADS, 4096, 3),
    DiskOptions(EngineKind.THREADS, 1 << 20, 1),
    DiskOptions(EngineKind.IO_URING, 4096, 8, 2),
    DiskOptions(EngineKind.IO_URING, 64 << 10, 4),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages a part, so that few pages are several parts."""
    monkeypatch.setattr(store_transfer, "PART_BYTES", 3 * SLOT)


@pytest.fixture(name="store", params=WAYS, ids=str)
def store_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ColdStore]:
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "auto", 30.0, request.param)
    yield store
    store.close()


def read_slices(
    store: ColdStore, slots: np.ndarray, layer: int, addresses: np.ndarray
) -> np.ndarray:
    """Read one layer of some pages and wait; which of them are intact."""
    transfer = store.read_slices(slots, layer, addresses)
    transfer.wait()
    transfer.poll()
    return store.verify(transfer)


def at(pages: Bytes) -> np.ndarray:
    return pages.ctypes.data + np.arange(pages.size // SLOT, dtype=np.int64) * SLOT


def move(transfer: store_transfer.StoreTransfer) -> None:
    transfer.wait()
    assert transfer.poll()


def test_parts_are_every_place_once_by_ascending_slot(rng: np.random.Generator) -> None:
    for count in (0, 1, 2, 3, 4, 7, 100):
        slots = rng.permutation(1000)[:count].astype(np.int64)
        parts = list(parts_of(slots, SLOT))
        assert all(1 <= len(part) <= 3 for part in parts)
        every = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
        assert sorted(every.tolist()) == list(range(count))
        assert np.array_equal(slots[every.astype(np.int64)], np.sort(slots))
    assert [len(part) for part in parts_of(np.arange(3, dtype=np.int64), 100 * SLOT)] == [1, 1, 1]


def test_random_pages_come_back_to_where_they_are_wanted(
    store: ColdStore, rng: np.random.Generator
) -> None:
    stored: dict[int, bytes] = {}
    source, target = random_memory(rng, NUM_SLOTS * SLOT), memory(NUM_SLOTS * SLOT)
    registered = store.engine.register_memory(source.ctypes.data, source.size)
    assert registered == 0 or store.io_kind.startswith("io_uring")
    for _ in range(6):
        source[:] = rng.integers(0, 256, source.size, dtype=np.uint8)
        slots = rng.permutation(NUM_SLOTS)[: rng.integers(1, NUM_SLOTS + 1)].astype(np.int64)
        move(store.write(slots, at(source)[: len(slots)], [None] * len(slots)))
        for i, slot in enumerate(slots.tolist()):
            stored[slot] = source[i * SLOT :][:SLOT].tobytes()
        target[:] = POISON
        wanted = rng.permutation(list(stored)).astype(np.int64)
        transfer = store.read(wanted, at(target)[: len(wanted)])
        move(transfer)
        assert store.verify(transfer).all()
        for i, slot in enumerate(wanted.tolist()):
            assert target[i * SLOT :][:SLOT].tobytes() == stored[slot]
        assert np.all(target[len(wanted) * SLOT :] == POISON)
        if rng.integers(3) == 0:
            store.engine.unregister_memory()
    assert store.num_corrupt == 0


def test_damaged_pages_are_named_in_the_order_they_were_asked_for(
    store: ColdStore, rng: np.random.Generator
) -> None:
    pages = random_memory(rng, NUM_SLOTS * SLOT)
    every = np.arange(NUM_SLOTS, dtype=np.int64)
    move(store.write(every, at(pages), [None] * NUM_SLOTS))
    store.sync()
    damaged = sorted(rng.choice(NUM_SLOTS, 7, replace=False).tolist())
    with (store.path / "slots").open("r+b") as file:
        for i, slot in enumerate(damaged):
            place = slot * store.slot_stride + (0, SLOT - 1, SLOT + 50)[i % 3]
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 16]))
    asked = rng.permutation(NUM_SLOTS).astype(np.int64)
    transfer = store.read(asked, at(pages))
    move(transfer)
    good = store.verify(transfer)
    assert sorted(asked[~good].tolist()) == damaged
    assert store.num_corrupt == len(damaged)


def test_what_happened_to_a_page_before_it_was_written_is_found(
    store: ColdStore, rng: np.random.Generator
) -> None:
    """Sums are those of when the page was sealed, not of what came to the store."""
    pages, every = random_memory(rng, NUM_SLOTS * SLOT), np.arange(NUM_SLOTS, dtype=np.int64)
    sums = _core.checksum_pages(at(pages), LAYOUT.layer_bytes, LAYOUT.num_layers)
    pages[5 * SLOT + LAYOUT.layer_bytes + 3] ^= 1
    move(store.write(every, at(pages), [None] * NUM_SLOTS, sums))
    asked = rng.permutation(NUM_SLOTS).astype(np.int64)
    transfer = store.read(asked, at(pages))
    move(transfer)
    assert asked[~store.verify(transfer)].tolist() == [5]
    assert np.array_equal(transfer.sums, sums[asked])
    for layer in range(LAYOUT.num_layers):
        good = read_slices(store, asked, layer, at(pages))
        assert asked[~good].tolist() == ([5] if layer == 1 else [])
        assert np.array_equal(store.layer_sums(asked, layer), sums[asked, layer])


def test_slices_are_read_in_parts_too(store: ColdStore, rng: np.random.Generator) -> None:
    pages = random_memory(rng, NUM_SLOTS * SLOT)
    every = np.arange(NUM_SLOTS, dtype=np.int64)
    move(store.write(every, at(pages), [None] * NUM_SLOTS))
    size = LAYOUT.layer_bytes
    target = memory(NUM_SLOTS * size)
    asked = rng.permutation(NUM_SLOTS).astype(np.int64)
    places = target.ctypes.data + np.arange(NUM_SLOTS, dtype=np.int64) * size
    for layer in range(LAYOUT.num_layers):
        assert read_slices(store, asked, layer, places).all()
        for i, slot in enumerate(asked.tolist()):
            start = slot * SLOT + layer * size
            assert np.array_equal(target[i * size :][:size], pages[start : start + size])


def test_a_store_that_was_written_in_parts_opens_again(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pages = random_memory(rng, 10 * SLOT)
    slots = rng.permutation(NUM_SLOTS)[:10].astype(np.int64)
    names = [PageName(rng.bytes(32), rng.bytes(32), i) for i in range(10)]
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "auto", 30.0)
    move(store.write(slots, at(pages), list(names)))
    store.index.publish(slots, list(names))
    store.close()
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 30.0)
    stored = store.index.take_stored()
    by_key = {bytes(k): int(s) for k, s in zip(stored.keys, stored.slots, strict=True)}
    assert by_key == {name.key: int(slot) for name, slot in zip(names, slots, strict=True)}
    target = memory(10 * SLOT)
    transfer = store.read(slots, at(target))
    move(transfer)
    assert store.verify(transfer).all()
    assert np.array_equal(target, pages)
    store.close()


# ---- failures ----------------------------------------------------------------------------------------


@pytest.fixture(name="faults")
def faults_fixture() -> Iterator[FaultOps]:
    faults = FaultOps()
    yield faults
    faults.release()


@pytest.fixture(name="faulty")
def faulty_fixture(
    tmp_path: Path, faults: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ColdStore]:
    """A store whose engine moves one page at a time, by system calls that tests let fail."""

    def opened(options: DiskOptions) -> _core.IoEngine:
        piece = SLOT + TRAILER_BYTES
        return _core.IoEngine(options.kind, num_threads=1, piece_bytes=piece, faults=faults)

    monkeypatch.setattr("tiermem.guarded_io.open_engine", opened)
    way = DiskOptions(EngineKind.THREADS, 1 << 20, 1)
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "auto", 2.0, way)
    yield store
    faults.release()
    store.close()


@pytest.mark.parametrize("call", [1, 3, 4, 8, 9])
def test_an_error_is_told_when_no_part_uses_its_memory(
    faulty: ColdStore, faults: FaultOps, call: int
) -> None:
    pages = memory(9 * SLOT)
    faults.fail(FileCall.READ, first=call, error=errno.EIO)
    transfer = faulty.read(np.arange(9, dtype=np.int64), at(pages))
    with pytest.raises(TransferError, match="Input/output error"):
        move(transfer)
    with pytest.raises(TransferError, match="Input/output error"):
        transfer.poll()
    assert faulty.engine.counters().in_flight == 0
    assert not faulty.verify(transfer).any() or call > 3


def test_a_failed_part_is_pending_while_another_hangs(faulty: ColdStore, faults: FaultOps) -> None:
    pages = memory(6 * SLOT)
    faults.fail(FileCall.READ, first=1, error=errno.EIO)
    faults.hold(FileCall.READ, first=2)
    transfer = faulty.read(np.arange(6, dtype=np.int64), at(pages))
    assert faults.wait_held(1, 30.0)
    assert not transfer.poll()
    faults.release()
    with pytest.raises(TransferError, match="Input/output error"):
        move(transfer)


def test_a_part_is_checked_before_the_next_arrives(
    faulty: ColdStore, faults: FaultOps, rng: np.random.Generator
) -> None:
    pages = random_memory(rng, 6 * SLOT)
    every = np.arange(6, dtype=np.int64)
    move(faulty.write(every, at(pages), [None] * 6))
    faults.hold(FileCall.READ, first=4)
    transfer = faulty.read(every, at(pages))
    assert faults.wait_held(1, 30.0)
    while not transfer.poll() and not transfer.intact().any():
        pass
    assert transfer.intact().tolist() == [True] * 3 + [False] * 3
    faults.release()
    move(transfer)
    assert faulty.verify(transfer).all()


def test_a_deadline_passes_while_a_part_hangs(faulty: ColdStore, faults: FaultOps) -> None:
    pages = memory(6 * SLOT)
    faulty._file.timeout_s = 0.2
    faults.hold(FileCall.READ, first=4)
    transfer = faulty.read(np.arange(6, dtype=np.int64), at(pages))
    with pytest.raises(TransferError, match=r"io_timeout_s=0\.2"):
        transfer.wait()
    with pytest.raises(TransferError, match="SSD tier is off"):
        move(faulty.read(np.arange(6, dtype=np.int64), at(pages)))
    assert faulty.num_late == 1
    faults.release()
    while faulty.num_late:
        pass
    with pytest.raises(DeadlineError):  # what comes late is not used
        transfer.poll()
    assert faulty.num_late == 0


def test_a_failed_slice_is_told_after_all_parts(faulty: ColdStore, faults: FaultOps) -> None:
    pages = memory(9 * SLOT)
    every = np.arange(9, dtype=np.int64)
    move(faulty.write(every, at(pages), [None] * 9))
    faults.fail(FileCall.READ, first=faults.num_calls(FileCall.READ) + 2, error=errno.EIO)
    with pytest.raises(TransferError, match="Input/output error"):
        read_slices(faulty, every, 1, at(pages))
    assert faulty.engine.counters().in_flight == 0


class BrokenEngine:
    """Takes so many batches, then no more: as when the kernel's queue broke down."""

    def __init__(self, real: _core.IoEngine, most: int) -> None:
        self.left = most
        self.poll, self.wait, self.forget = real.poll, real.wait, real.forget
        self._real = real

    def submit_read(self, *operations: Any) -> int:
        return self._submit(self._real.submit_read, operations)

    def submit_write(self, *operations: Any) -> int:
        return self._submit(self._real.submit_write, operations)

    def _submit(self, real: Callable[..., int], operations: tuple[Any, ...]) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EBADF, "the I/O engine broke down")
        return real(*operations)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_an_engine_that_broke_down_fails_transfers(
    faulty: ColdStore, faults: FaultOps, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    pages = memory(9 * SLOT)
    every = np.arange(9, dtype=np.int64)
    real = faulty.engine
    for start in (faulty.read, lambda s, a: faulty.write(s, a, [None] * 9)):
        monkeypatch.setattr(faulty._file, "_engine", BrokenEngine(real, most))
        transfer = start(every, at(pages))
        with pytest.raises(TransferError, match="broke down"):
            move(transfer)
        assert real.counters().in_flight == 0
    for call in (
        lambda: read_slices(faulty, every, 1, at(pages)),
        lambda: faulty.write_slices(every, 1, at(pages)),
        lambda: faulty.finish_slices(every, [None] * 9, np.zeros((9, 3), dtype=np.uint64)),
    ):
        monkeypatch.setattr(faulty._file, "_engine", BrokenEngine(real, 0))
        with pytest.raises(TransferError, match="broke down"):
            call()
    monkeypatch.setattr(faulty._file, "_engine", real)


def test_what_was_measured_and_cannot_be_had_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(options: DiskOptions) -> _core.IoEngine:
        raise PermissionError(errno.EPERM, "the kernel refuses io_uring")

    monkeypatch.setattr("tiermem.guarded_io.open_engine", refused)
    way = DiskOptions(EngineKind.IO_URING, 1 << 20, 64)
    with caplog.at_level("WARNING"):
        store = ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 30.0, way)
    assert store.io_kind.startswith("threads")
    assert "64 io_uring x 1024 KiB was measured, but cannot be had now" in caplog.text
    store.close()


class RefusingEngine:
    """Registers so many bytes, then meets the limit of locked memory."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.ranges: set[tuple[int, int]] = set()

    def register_memory(self, address: int, num_bytes: int) -> tuple[int, int]:
        taken = min(num_bytes, self.left)
        self.left -= taken
        if taken:
            self.ranges.add((address, taken))
        return taken, errno.ENOMEM if taken < num_bytes else 0

    def unregister_memory(self, address: int, num_bytes: int) -> None:
        self.ranges.remove((address, num_bytes))


def test_the_limit_of_locked_memory_is_told_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tiermem.guarded_io.REGISTER_BYTES", 100)
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "auto", 30.0)
    real, engine = store.engine._engine, RefusingEngine(250)
    monkeypatch.setattr(store.engine, "_engine", engine)
    with caplog.at_level("INFO"):
        assert store.engine.register_memory(1000, 500) == 250
    assert "250 of 500 bytes of pinned memory registered (Cannot allocate memory)" in caplog.text
    assert engine.ranges == {(1000, 100), (1100, 100), (1200, 50)}
    store.engine.unregister_memory()
    assert engine.ranges == set()
    monkeypatch.setattr(store.engine, "_engine", real)
    store.close()


def test_a_start_does_not_wait_for_registering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.guarded_io.REGISTER_S", 0.0)
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "auto", 30.0)
    pages = memory(SLOT)
    assert store.engine.register_memory(pages.ctypes.data, SLOT) == 0
    store.close()


# ---- the page cache ----------------------------------------------------------------------------------


def resident_pages(path: Path) -> int:
    """How many pages of a file the page cache holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        count = -(-view.size // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * count)()
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
        assert libc.mincore(address, size, states) == 0, ctypes.get_errno()
        del view
    return sum(state & 1 for state in states)


def test_nothing_goes_through_the_page_cache_where_direct_io_works(
    store: ColdStore, rng: np.random.Generator
) -> None:
    if not store.io_kind.endswith("direct"):
        pytest.skip("no direct I/O on this file system")
    pages = random_memory(rng, NUM_SLOTS * SLOT)
    slots = rng.permutation(NUM_SLOTS).astype(np.int64)
    move(store.write(slots, at(pages), [None] * NUM_SLOTS))
    move(store.read(slots, at(pages)))
    assert read_slices(store, slots, 1, at(pages)).all()
    assert resident_pages(store.path / "slots") == 0
    (store.path / "slots").read_bytes()  # as a buffered reader leaves it
    assert resident_pages(store.path / "slots") > 0


def test_too_small_a_cap_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least \d+ bytes"):
        ColdStore(tmp_path / "s", LAYOUT, SLOT, "auto", 1.0)
