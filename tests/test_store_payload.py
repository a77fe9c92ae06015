"""After a sync that the disk refused: what it may have lost is written again before anything counts as durable."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from io_support import Bytes
from liveness_support import (
    PAGE,
    check_content,
    faults_fixture,  # noqa: F401
    grow,
    open_manager,
    tokens_of,
)
from test_cipher import KEY
from test_power_loss import CAP, LAYOUT, ROOT, at, memory, move
from test_store_commits import ids, publish

from tiermem import (
    DeadlineError,
    NotDurableError,
    PageLayout,
    Sequence,
    TierManager,
    TransferError,
    _core,
)
from tiermem._core import FaultOps, FileCall, Tier
from tiermem.cipher_key import SecretKey
from tiermem.guarded_io import GuardedEngine
from tiermem.store import ColdStore
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_index import Records, StoreIndex
from tiermem.store_names import PageName

TIMEOUT_S = 30.0


@pytest.fixture(name="disk")
def disk_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultOps]:
    """Faults of the slot file of every store that is opened meanwhile: its sync."""
    faults, opened = FaultOps(), _core.BlockFile
    monkeypatch.setattr(_core, "BlockFile", lambda *args: opened(*args, faults=faults))
    yield faults
    faults.release()


@pytest.fixture(name="key", params=[None, KEY], ids=["plain", "encrypted"])
def key_fixture(request: pytest.FixtureRequest) -> SecretKey | None:
    key: SecretKey | None = request.param
    return key


@pytest.fixture(name="store")
def store_fixture(tmp_path: Path, disk: FaultOps) -> Iterator[ColdStore]:
    store = open_store(tmp_path / "s")
    yield store
    store.close()


def open_store(path: Path, key: SecretKey | None = None) -> ColdStore:
    return ColdStore(path, LAYOUT, CAP, "threads", TIMEOUT_S, key=key)


def refuse_sync(disk: FaultOps, times: int = 1) -> None:
    disk.fail(FileCall.SYNC, disk.num_calls(FileCall.SYNC) + 1, errno.EIO, times)


class Medium:
    """What is on a disk: what was there when this was made, and what was written since and not dropped."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        self._slots = self._read()
        self._ranges: list[tuple[int, int]] = []
        submit = GuardedEngine.submit_write

        def note(engine: GuardedEngine, *operations: Any) -> int:
            _, offsets, _, lengths, *tails = operations
            ends = offsets + lengths + (tails[1] if tails else 0)
            self._ranges.extend(zip(offsets.tolist(), ends.tolist(), strict=True))
            return submit(engine, *operations)

        monkeypatch.setattr(GuardedEngine, "submit_write", note)

    @property
    def num_writes(self) -> int:
        """Pages and trailers written since."""
        return len(self._ranges)

    def drop(self) -> None:
        """A sync has failed: what was written before it is lost, though it can be read while there is power."""
        self._ranges.clear()

    def lose_power(self) -> Path:
        """The store as it is afterwards."""
        now = self._read()
        slots = np.zeros(len(now), dtype=np.uint8)
        slots[: len(self._slots)] = self._slots
        for start, end in self._ranges:
            slots[start:end] = now[start:end]
        copy = self._path.with_name("after")
        shutil.copytree(self._path, copy)
        slots.tofile(copy / "slots")
        return copy

    def _read(self) -> Bytes:
        return np.fromfile(self._path / "slots", dtype=np.uint8)


def intact(path: Path, key: SecretKey | None) -> set[int]:
    """Slots whose pages a store that is opened now finds, and reads as they were written."""
    store = open_store(path, key)
    stored = store.index.take_stored()
    pages = memory(max(1, len(stored.slots)) * LAYOUT.slot_bytes)
    reading = store.read(stored.slots, at(pages)[: len(stored.slots)])
    move(reading)
    good = store.verify(reading)
    store.close()
    return set(stored.slots[good].tolist())


def flip(path: Path, slot: int, layout: PageLayout = LAYOUT) -> None:
    """Change a bit of what is in a slot."""
    with (path / "slots").open("r+b") as file:
        file.seek(slot * (layout.slot_bytes + TRAILER_BYTES) + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 8]))


# ---- a store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
def test_pages_that_a_refused_sync_lost_are_on_the_disk_after_the_next_one(
    tmp_path: Path,
    disk: FaultOps,
    monkeypatch: pytest.MonkeyPatch,
    key: SecretKey | None,
    times: int,
) -> None:
    path = tmp_path / "s"
    store = open_store(path, key)
    publish(store, [0, 1])
    store.sync()
    medium = Medium(path, monkeypatch)
    publish(store, [2, 3, 4])
    refuse_sync(disk, times)
    for _ in range(times):
        with pytest.raises(TransferError, match="was not synced"):
            store.sync()
        assert not store.index.is_durable(ids([2, 3, 4])).any()
        medium.drop()
    publish(store, [5])
    store.sync()
    assert store.index.is_durable(ids([0, 1, 2, 3, 4, 5])).all()
    assert intact(medium.lose_power(), key) == {0, 1, 2, 3, 4, 5}
    num_writes = medium.num_writes
    store.sync()
    assert medium.num_writes == num_writes  # nothing is in doubt any more
    store.close()
    assert intact(path, key) == {0, 1, 2, 3, 4, 5}


def test_commits_that_nobody_asks_for_write_again_part_by_part_and_name_no_page_before(
    tmp_path: Path, disk: FaultOps, monkeypatch: pytest.MonkeyPatch, key: SecretKey | None
) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr("tiermem.store_transfer.PART_BYTES", 2 * LAYOUT.slot_bytes)
    monkeypatch.setattr("tiermem.store_commits.SYNC_S", 0.0)
    store = open_store(path, key)
    medium = Medium(path, monkeypatch)
    publish(store, [0, 1, 2, 3, 4])
    refuse_sync(disk)
    store.poll()
    medium.drop()
    assert store.index.num_pending > 0
    store._commits._backoff.note_good()  # the pause is over
    for num_writes in (2, 4, 5):
        assert not store.index.is_durable(ids([0, 1, 2, 3, 4])).any()
        store.poll()
        assert medium.num_writes == num_writes
    assert store.index.is_durable(ids([0, 1, 2, 3, 4])).all()
    assert intact(medium.lose_power(), key) == {0, 1, 2, 3, 4}
    store.close()


def test_pages_without_a_name_are_written_again_once_they_have_one(
    store: ColdStore, disk: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = memory(2 * LAYOUT.slot_bytes)
    move(store.write(ids([0, 1]), at(pages), [None, None]))
    refuse_sync(disk)
    with pytest.raises(TransferError):
        store.sync()
    medium = Medium(store.path, monkeypatch)
    medium.drop()
    store.sync()
    assert medium.num_writes == 0
    name = PageName(b"n" * 32, ROOT.hash, 0, ROOT, "")
    assert store.rename(ids([1]), [name]).all()
    store.sync()
    assert intact(medium.lose_power(), None) == {1}


def test_what_cannot_be_written_again_is_not_durable_and_stays_readable(
    tmp_path: Path, disk: FaultOps, faults: FaultOps
) -> None:
    store = open_store(tmp_path / "s")
    publish(store, [0, 1, 2])
    refuse_sync(disk)
    with pytest.raises(TransferError, match="not synced"):
        store.sync()
    faults.fail(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, errno.EIO, 1)
    with pytest.raises(TransferError, match="Input/output"):
        store.sync()
    assert not store.index.is_durable(ids([0, 1, 2])).any()
    store.sync()
    assert store.index.is_durable(ids([0, 1, 2])).all()
    store.close()
    assert intact(tmp_path / "s", None) == {0, 1, 2}


@pytest.mark.parametrize("call", [FileCall.READ, FileCall.WRITE])
def test_writing_again_has_a_deadline_and_is_done_by_the_next_sync(
    tmp_path: Path, disk: FaultOps, faults: FaultOps, call: FileCall
) -> None:
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 0.2)
    publish(store, [0, 1, 2])
    refuse_sync(disk)
    with pytest.raises(TransferError, match="not synced"):
        store.sync()
    faults.hold(call, faults.num_calls(call) + 1, 100)
    with pytest.raises(DeadlineError):
        store.sync()
    with pytest.raises(TransferError, match="SSD tier is off"):
        store.sync()
    assert not store.index.is_durable(ids([0, 1, 2])).any()
    faults.release()
    while store.num_late:
        threading.Event().wait(0.01)
    store.breaker.probe_ended(None)  # it is on again
    store.sync()
    assert store.index.is_durable(ids([0, 1, 2])).all()
    store.close()
    assert intact(tmp_path / "s", None) == {0, 1, 2}


def test_writing_again_without_memory_fails_and_is_done_later(
    store: ColdStore, disk: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, [0])
    refuse_sync(disk)
    with pytest.raises(TransferError, match="not synced"):
        store.sync()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("tiermem.slot_file.mmap.mmap", refuse)
        with pytest.raises(TransferError, match="no memory for 1 pages"):
            store.sync()
    assert not store.index.is_durable(ids([0])).any()
    store.sync()
    assert store.index.is_durable(ids([0])).all()


def test_a_page_that_was_damaged_meanwhile_is_not_written_again(
    store: ColdStore, disk: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, [0, 1])
    refuse_sync(disk)
    with pytest.raises(TransferError):
        store.sync()
    flip(store.path, 1)
    medium = Medium(store.path, monkeypatch)
    store.sync()
    assert medium.num_writes == 1
    assert store.payload.are_damaged(ids([0, 1])).tolist() == [False, True]


def test_an_index_that_cannot_be_written_leaves_no_page_in_doubt(
    store: ColdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, [0])

    def refuse(_: StoreIndex, __: Records) -> None:
        raise TransferError("the index of the SSD tier was not written")

    with monkeypatch.context() as patch:
        patch.setattr(StoreIndex, "write", refuse)
        with pytest.raises(TransferError, match="was not written"):
            store.sync()
    medium = Medium(store.path, monkeypatch)
    store.sync()
    assert medium.num_writes == 0
    assert store.index.is_durable(ids([0])).all()


def test_a_thread_that_cannot_be_had_leaves_nothing_in_doubt(
    store: ColdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, [0])

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(TransferError, match="new thread"):
            store.sync()
    medium = Medium(store.path, monkeypatch)
    store.sync()
    assert medium.num_writes == 0


# ---- a manager ---------------------------------------------------------------------------------------


def open_in_doubt(path: Path, disk: FaultOps) -> tuple[TierManager, Sequence, int]:
    """A manager with three published pages on the SSD that a refused sync left in doubt; the second one's slot."""
    manager = open_manager(path, (8, 0, 32), io_timeout_s=TIMEOUT_S)
    sequence = manager.open_sequence()
    grow(manager, sequence, 3 * PAGE)
    refuse_sync(disk)
    with pytest.raises(NotDurableError, match=r"3 of 3 .*was not synced"):
        manager.flush()
    return manager, sequence, int(manager._core.table.slots(sequence.pages[1:2], Tier.SSD)[0])


def test_a_damaged_page_is_written_from_another_copy_by_the_next_flush(
    tmp_path: Path, disk: FaultOps
) -> None:
    manager, sequence, slot = open_in_doubt(tmp_path / "s", disk)
    with manager:
        flip(tmp_path / "s", slot, manager.layout)
        manager.flush()
        assert manager.stats().corrupt_pages == 1
        manager.check()
        check_content(sequence)
    with open_manager(tmp_path / "s", (8, 0, 32)) as manager:
        sequence = manager.open_sequence(tokens_of(0, 3 * PAGE))
        assert sequence.num_tokens == 3 * PAGE
        check_content(sequence)


def test_a_damaged_page_without_another_copy_is_lost_and_told(
    tmp_path: Path, disk: FaultOps
) -> None:
    manager, sequence, slot = open_in_doubt(tmp_path / "s", disk)
    with manager:
        sequence.close()
        other = manager.open_sequence()
        grow(manager, other, 8 * PAGE, 1)  # the SSD has the only copy of the first pages now
        flip(tmp_path / "s", slot, manager.layout)
        manager.flush()
        assert manager.stats().corrupt_pages == 1
        manager.check()
        other.close()
        again = manager.open_sequence(tokens_of(0, 3 * PAGE))
        assert again.num_tokens == PAGE
        check_content(again)


def test_closing_writes_again_too(
    tmp_path: Path, disk: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _, _ = open_in_doubt(tmp_path / "s", disk)
    medium = Medium(tmp_path / "s", monkeypatch)
    medium.drop()
    manager.close()
    assert medium.num_writes == 3
    with open_manager(medium.lose_power(), (8, 0, 32)) as manager:
        sequence = manager.open_sequence(tokens_of(0, 3 * PAGE))
        assert sequence.num_tokens == 3 * PAGE
        check_content(sequence)
