"""Commits that fail, hang or are interrupted: nothing that was published meanwhile is lost, nothing piles up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_power_loss import CAP, LAYOUT, ROOT, at, content, memory, move

from tiermem import DeadlineError, TransferError
from tiermem.backoff import Backoff
from tiermem.patience import PatientCall
from tiermem.store import ColdStore
from tiermem.store_commits import LONGEST_PAUSE_S, SYNC_RECORDS, SYNC_S, Commits
from tiermem.store_index import Records, StoreIndex
from tiermem.store_names import GoneReason, PageName
from tiermem.store_transfer import Int64s

TIMEOUT_S = 30.0
SHORT_S = 0.1


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Disk:
    """Stands for the payload: its sync fails while it is told to, and is counted."""

    def __init__(self) -> None:
        self.fails = False
        self.num_calls = 0

    def write_again(self, most_parts: int | None = None) -> bool:
        return True

    def begin_sync(self) -> None:
        pass

    def end_sync(self, *, is_good: bool) -> None:
        assert is_good != self.fails

    def sync(self) -> None:
        self.num_calls += 1
        if self.fails:
            raise TransferError(5, "the SSD tier was not synced: Input/output error")


@pytest.fixture(name="store")
def store_fixture(tmp_path: Path) -> Iterator[ColdStore]:
    store = open_store(tmp_path)
    yield store
    store.close()


def open_store(tmp_path: Path) -> ColdStore:
    return ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", TIMEOUT_S)


def publish(store: ColdStore, slots: list[int]) -> list[PageName]:
    """A new page in each slot, written and published."""
    rng = np.random.default_rng(slots)
    names = [PageName(rng.bytes(32), ROOT.hash, 0, ROOT, "") for _ in slots]
    pages = memory(len(slots) * LAYOUT.slot_bytes)
    for i, name in enumerate(names):
        pages[i * LAYOUT.slot_bytes : (i + 1) * LAYOUT.slot_bytes] = content(name.key)
    move(store.write(ids(slots), at(pages), list(names)))
    store.index.publish(ids(slots), list(names))
    return names


def ids(slots: list[int]) -> Int64s:
    return np.array(slots, dtype=np.int64)


def stored_keys(tmp_path: Path) -> set[bytes]:
    """What a store has that is opened now."""
    store = open_store(tmp_path)
    keys = {row.tobytes() for row in store.index.take_stored().keys}
    store.close()
    return keys


def end(store: ColdStore) -> None:
    """Return when what was late has ended; commits have all the time they need from now on."""
    while store.num_late:
        threading.Event().wait(0.01)
    store._commits._timeout_s = TIMEOUT_S


# ---- the pause ---------------------------------------------------------------------------------------


def test_the_pause_doubles_up_to_its_longest_and_a_success_ends_it() -> None:
    clock = Clock()
    backoff = Backoff(1.0, 10.0, clock)
    assert backoff.is_over
    for pause_s in (1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        backoff.note_failure()
        assert backoff.pause_s == pause_s
        clock.now_s += pause_s - 0.01
        assert not backoff.is_over
        clock.now_s += 0.01
        assert backoff.is_over
    backoff.note_failure()
    backoff.note_good()
    assert backoff.is_over
    backoff.note_failure()
    assert backoff.pause_s == 1.0


@pytest.mark.parametrize("num_records", [1, SYNC_RECORDS], ids=["one", "many"])
def test_commits_that_fail_are_tried_ever_more_rarely(
    store: ColdStore, caplog: pytest.LogCaptureFixture, num_records: int
) -> None:
    clock, disk = Clock(), Disk()
    commits = Commits(disk, store.index, store.engine, TIMEOUT_S, clock)
    publish(store, [0])
    store.index._pending |= {b"x%d" % i: b"" for i in range(num_records - 1)}
    disk.fails = True
    tries = []
    for _ in range(20_000):
        clock.now_s += 0.1
        before = disk.num_calls
        commits.poll()
        if disk.num_calls > before:
            tries.append(clock.now_s)
    pauses = np.diff(tries)
    assert 10 <= len(tries) <= 16  # in 2,000 seconds
    assert pauses[0] == pytest.approx(SYNC_S, abs=0.2)
    assert (pauses[1:] > pauses[:-1] - 0.2).all()
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=0.2)
    assert caplog.text.count("tried again in") == len(tries)
    assert store.index.num_pending >= num_records
    with pytest.raises(TransferError, match="not synced"):
        commits.sync()  # whoever asks is told at once
    disk.fails = False
    commits.sync()
    assert store.index.num_pending == 0
    publish(store, [1])
    clock.now_s += SYNC_S
    commits.poll()
    assert store.index.num_pending == 0


# ---- what is durable ---------------------------------------------------------------------------------


def test_what_a_failed_commit_had_is_part_of_the_next_one(tmp_path: Path) -> None:
    store, disk = open_store(tmp_path), Disk()
    commits = Commits(disk, store.index, store.engine, TIMEOUT_S)
    names = publish(store, [0, 1])
    gone = publish(store, [2])
    disk.fails = True
    with pytest.raises(TransferError):
        commits.sync()
    assert not store.index.is_durable(ids([0, 1, 2])).any()
    store.index.unpublish_keys([gone[0].key], GoneReason.EVICTED)
    names += publish(store, [3])
    disk.fails = False
    commits.sync()
    assert store.index.is_durable(ids([0, 1, 2, 3])).tolist() == [True, True, False, True]
    store.close()
    assert stored_keys(tmp_path) == {name.key for name in names}


def test_what_is_published_while_a_late_commit_goes_on_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, is_written, go_on = open_store(tmp_path), threading.Event(), threading.Event()
    write = StoreIndex._write

    def write_slowly(index: StoreIndex, records: Records) -> None:
        write(index, records)
        is_written.set()
        go_on.wait()

    names = publish(store, [0, 1])
    store._commits._timeout_s = SHORT_S
    monkeypatch.setattr(StoreIndex, "_write", write_slowly)
    with pytest.raises(DeadlineError):
        store.sync()
    is_written.wait()
    with pytest.raises(TransferError, match="SSD tier is off"):
        store.sync()
    later = PageName(bytes(31) + b"l", ROOT.hash, 0, ROOT, "")
    store.index.publish(ids([2]), [later])  # of a write that ended meanwhile
    store.index.unpublish_keys([names[0].key], GoneReason.EVICTED)
    assert not store.index.is_durable(ids([0, 1, 2])).any()
    monkeypatch.undo()
    go_on.set()
    end(store)
    store.sync()
    assert store.index.is_durable(ids([0, 1, 2])).tolist() == [False, True, True]
    store.close()
    assert stored_keys(tmp_path) == {names[1].key, later.key}


def test_a_commit_that_an_interrupt_left_is_ended_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, go_on = open_store(tmp_path), threading.Event()
    wait = PatientCall.wait

    def interrupted(call: PatientCall, timeout_s: float) -> None:
        raise KeyboardInterrupt

    names = publish(store, [0])
    monkeypatch.setattr(store.payload, "sync", go_on.wait)
    monkeypatch.setattr(PatientCall, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.sync()
    monkeypatch.setattr(PatientCall, "wait", wait)
    assert not store._commits.is_idle
    names += publish(store, [1])
    store._commits._timeout_s = SHORT_S
    with pytest.raises(TransferError, match="SSD tier is off"):
        store.sync()  # it hangs, and is not joined by a second one
    go_on.set()
    end(store)
    store.sync()
    assert store.index.is_durable(ids([0, 1])).all()
    store.close()
    assert stored_keys(tmp_path) == {name.key for name in names}


def test_what_is_pending_stays_bounded_while_nothing_can_be_written(store: ColdStore) -> None:
    disk = Disk()
    commits = Commits(disk, store.index, store.engine, TIMEOUT_S)
    publish(store, [0])
    commits.sync()
    disk.fails = True
    counts = []
    for number in range(3000):
        name = PageName(number.to_bytes(32, "big"), ROOT.hash, 0, ROOT, "")
        store.index.publish(ids([1]), [name])
        store.index.note_hits([name.key, bytes(28) + number.to_bytes(4, "big")])
        if number % 7 == 0:
            with pytest.raises(TransferError):
                commits.sync()
        store.index.unpublish_keys([name.key], GoneReason.EVICTED)
        counts.append(store.index.num_pending)
    assert max(counts) < 1000
    assert max(counts[1500:]) <= max(counts[:1500])
    disk.fails = False
    commits.sync()
    assert store.index.num_pending == 0


def test_a_thread_that_cannot_be_had_fails_the_commit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    names = publish(store, [0, 1])

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(TransferError, match="not synced: can't start new thread"):
                store.sync()
    assert not store.index.is_durable(ids([0, 1])).any()
    store.sync()
    assert store.index.is_durable(ids([0, 1])).all()
    store.close()
    assert stored_keys(tmp_path) == {name.key for name in names}
