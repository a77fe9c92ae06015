"""Liveness: whatever hangs, every call returns by its deadline, and nothing is freed that may still be used."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from liveness_support import (
    PAGE,
    check_content,
    faults_fixture,  # noqa: F401
    grow,
    in_time,
    make_due,
    open_manager,
    reopened,
    settle,
    state,
    tokens_of,
)

from tiermem import (
    DeadlineError,
    NotDurableError,
    OutOfPagesError,
    Sequence,
    TierManager,
    TransferError,
)
from tiermem._core import CopyState, FaultOps, FileCall, Tier
from tiermem.breaker import TierState
from tiermem.device.simulated import SimulatedDevice

EVERY = 1 << 40


def hold(faults: FaultOps, call: FileCall) -> None:
    """The next calls of this kind hang until `release`."""
    faults.hold(call, faults.num_calls(call) + 1, EVERY)


def fail(faults: FaultOps, call: FileCall, error: int, count: int = EVERY) -> None:
    faults.fail(call, faults.num_calls(call) + 1, error, count)


# ---- a disk that hangs -------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [(8, 8, 16), (8, 0, 16)], ids=["from-ram", "from-gpu"])
def test_writes_that_hang_end_flush_by_its_deadline_and_nothing_is_lost(
    tmp_path: Path, faults: FaultOps, slots: tuple[int, int, int]
) -> None:
    with open_manager(tmp_path / "s", slots) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 4 * PAGE)
        hold(faults, FileCall.WRITE)
        with in_time(), pytest.raises(NotDurableError, match=r"4 of 4 published.*io_timeout_s"):
            manager.flush()
        assert state(manager) is TierState.OFF
        assert manager.stats().failed_transfers >= 1
        with in_time(0), pytest.raises(NotDurableError, match=r"4 of 4 .*SSD tier is off"):
            manager.flush()
        with in_time(0):  # steps that do not need it are not slowed
            grow(manager, sequence, 3 * PAGE)
        check_content(sequence)
        manager.check()
        faults.release()
        settle(manager)
        assert state(manager) is TierState.ON
        manager.flush()
        manager.check()
    with open_manager(tmp_path / "s", slots) as manager:
        again = manager.open_sequence(tokens_of(0, 7 * PAGE))
        assert again.num_tokens == 7 * PAGE
        check_content(again)


@pytest.mark.parametrize(
    "use",
    [
        lambda manager, sequence: sequence.read(0, 0, 8 * PAGE),
        lambda manager, sequence: grow(manager, sequence, 1),
    ],
    ids=["read", "step"],
)
def test_reads_that_hang_end_by_their_deadline_and_the_pages_come_back(
    tmp_path: Path, faults: FaultOps, use: Callable[[TierManager, Sequence], None]
) -> None:
    with open_manager(tmp_path / "s", (3, 2, 20)) as manager:
        sequence = manager.open_sequence()
        for _ in range(8):
            grow(manager, sequence, PAGE)
        hold(faults, FileCall.READ)
        with in_time(2), pytest.raises(DeadlineError):
            use(manager, sequence)
        with in_time(0), pytest.raises(TransferError, match="SSD tier is off"):
            use(manager, sequence)
        assert sequence.num_tokens == 8 * PAGE
        assert manager.open_sequence(tokens_of(0, 8 * PAGE)).num_tokens < 8 * PAGE
        manager.check()
        faults.release()
        settle(manager)
        check_content(sequence)
        grow(manager, sequence, 5)
        manager.check()


def test_write_through_that_hangs_undoes_the_step_and_keeps_its_slots(
    tmp_path: Path, faults: FaultOps
) -> None:
    with open_manager(tmp_path / "s", (2, 0, 20)) as manager:
        sequence = manager.open_sequence()
        hold(faults, FileCall.WRITE)
        with in_time(2), pytest.raises(TransferError):
            grow(manager, sequence, 6 * PAGE)
        assert sequence.num_tokens == 0
        # pages that a late write may still reach are not given to anyone
        assert manager._core.table.counts(Tier.SSD).filling > 0
        faults.release()
        settle(manager)
        assert manager._core.table.counts(Tier.SSD).filling == 0
        grow(manager, sequence, 6 * PAGE)
        check_content(sequence)
        manager.check()


def test_suspend_and_prefetch_return_while_the_disk_hangs(tmp_path: Path, faults: FaultOps) -> None:
    with open_manager(tmp_path / "s", (8, 0, 16)) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 4 * PAGE)
        hold(faults, FileCall.WRITE)
        with in_time(), pytest.raises((TransferError, OutOfPagesError)):
            sequence.suspend()
        with in_time(0), pytest.raises((TransferError, OutOfPagesError)):
            sequence.suspend()
        sequence.prefetch()
        sequence.rollback(2 * PAGE)
        grow(manager, sequence, 1)
        check_content(sequence)
        faults.release()
        settle(manager)
        manager.check()


@pytest.mark.parametrize("call", [FileCall.WRITE, FileCall.READ])
def test_close_returns_while_the_disk_hangs_and_the_lock_comes_back_after_that(
    tmp_path: Path, faults: FaultOps, call: FileCall, caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager(tmp_path / "s", (3, 2, 20))
    sequence = manager.open_sequence()
    for _ in range(8):
        grow(manager, sequence, PAGE)
    hold(faults, call)
    if call is FileCall.READ:
        with pytest.raises(DeadlineError):
            sequence.read(0, 0, 8 * PAGE)
    with in_time(2):
        manager.close()
    manager.close()
    assert "not given back" in caplog.text
    faults.release()
    with reopened(tmp_path / "s", (3, 2, 20)) as again:
        found = again.open_sequence(tokens_of(0, 8 * PAGE))
        check_content(found)


def test_a_sync_that_hangs_has_a_deadline(
    tmp_path: Path, faults: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HangingFile:
        def __init__(self) -> None:
            self.released = threading.Event()

        def sync(self) -> None:
            self.released.wait()

    manager = open_manager(tmp_path / "s", (8, 8, 16))
    grow(manager, manager.open_sequence(), 2 * PAGE)
    assert manager._store is not None
    file, hanging = manager._store._file._file, HangingFile()
    monkeypatch.setattr(manager._store.payload, "sync", hanging.sync)
    with in_time(), pytest.raises(NotDurableError, match=r"2 of 2 .*making the SSD tier durable"):
        manager.flush()
    with in_time(0), pytest.raises(NotDurableError, match=r"2 of 2 .*SSD tier is off"):
        manager.flush()
    hanging.released.set()
    monkeypatch.undo()
    assert not file.is_closed
    settle(manager)
    manager.flush()
    manager.close()


# ---- a disk that fails -------------------------------------------------------------------------------


def test_a_disk_that_is_full_loses_nothing_and_stays_on(tmp_path: Path, faults: FaultOps) -> None:
    with open_manager(tmp_path / "s", (8, 8, 32)) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 3 * PAGE)
        manager.flush()
        fail(faults, FileCall.WRITE, errno.ENOSPC)
        for _ in range(6):
            grow(manager, sequence, PAGE)
            with contextlib.suppress(TransferError):
                manager.flush()
        assert state(manager) is TierState.ON
        check_content(sequence)
        manager.check()
        forget(faults)


def test_a_disk_that_cannot_be_written_is_read_only_and_comes_back(
    tmp_path: Path, faults: FaultOps
) -> None:
    with open_manager(tmp_path / "s", (8, 8, 32)) as manager:
        first = manager.open_sequence()
        grow(manager, first, 3 * PAGE)
        manager.flush()
        fail(faults, FileCall.WRITE, errno.EIO)
        second = manager.open_sequence()
        for i in range(3):
            grow(manager, second, PAGE, 1)
            with pytest.raises(NotDurableError, match=rf"{i + 1} of {i + 4} published pages"):
                manager.flush()
            assert state(manager) is (TierState.READ_ONLY if i == 2 else TierState.ON)
        writes = faults.num_calls(FileCall.WRITE)
        with pytest.raises(NotDurableError, match=r"3 of 6 .*SSD tier is read-only"):
            manager.flush()
        assert faults.num_calls(FileCall.WRITE) == writes
        for _ in range(4):  # more than the GPU tier: RAM takes what leaves it
            grow(manager, second, PAGE, 1)
        check_content(first)
        check_content(second, 1)
        report = manager.stats().breakers[0]
        assert (report.tier, report.state, report.trips) == ("SSD", "read-only", 1)
        make_due(manager)
        manager.poll()
        manager._core.in_flight.drain()
        assert state(manager) is TierState.READ_ONLY  # the probe failed too
        manager.check()
        forget(faults)
        settle(manager)
        manager.flush()
    with open_manager(tmp_path / "s", (8, 8, 32)) as manager:
        assert manager.open_sequence(tokens_of(1, 7 * PAGE)).num_tokens == 7 * PAGE


def forget(faults: FaultOps) -> None:
    """Calls from now on go through: the fault planned last counts."""
    faults.shorten(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, 1 << 30, EVERY)


def test_pages_in_use_are_kept_in_ram_while_only_the_dead_disk_has_them_besides(
    tmp_path: Path, faults: FaultOps
) -> None:
    with open_manager(tmp_path / "s", (6, 12, 32)) as manager:
        kept = manager.open_sequence()
        grow(manager, kept, 4 * PAGE)
        manager.flush()  # all of it is clean now
        hold(faults, FileCall.WRITE)
        other = manager.open_sequence()
        grow(manager, other, PAGE, 1)
        with pytest.raises(NotDurableError):
            manager.flush()
        for _ in range(9):
            grow(manager, other, PAGE, 1)
        hot = manager._core.table.states(kept.pages, Tier.GPU) == CopyState.VALID
        warm = manager._core.table.states(kept.pages, Tier.RAM) == CopyState.VALID
        assert (hot | warm).all()
        check_content(kept)
        check_content(other, 1)
        manager.check()
        faults.release()
        settle(manager)


# ---- a device that hangs -----------------------------------------------------------------------------


def test_copies_that_never_run_end_every_call_and_what_they_use_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = SimulatedDevice(3, eagerness=1.0)
    manager = open_manager(tmp_path / "s", (6, 8, 16), device)
    sequence = manager.open_sequence()
    grow(manager, sequence, 3 * PAGE)
    device.hang()
    other = manager.open_sequence()
    with in_time(), pytest.raises((TransferError, OutOfPagesError)):
        manager.flush()
    with in_time(), pytest.raises((TransferError, OutOfPagesError)):
        sequence.suspend()
    with in_time(), pytest.raises((TransferError, OutOfPagesError)):
        grow(manager, other, 12 * PAGE, 1)
    with in_time(), pytest.raises(TransferError):
        sequence.read(0, 0, PAGE)
    device.resume()
    device.run_all()
    manager.poll()
    assert len(manager._core.in_flight) == 0
    manager.check()
    check_content(sequence)
    manager.flush()
    grow(manager, sequence, PAGE)
    device.hang()
    with in_time():
        manager.close()
    manager.close()
    assert "not given back" in caplog.text


def test_a_failed_promotion_whose_step_makes_room_does_not_spin(tmp_path: Path) -> None:
    """It is not settled before the step lets go of it, and the step waits for nothing that it holds itself."""
    for seed in range(20):
        device = SimulatedDevice(seed, eagerness=0.0)
        with open_manager(None, (3, 6, 0), device) as manager:
            sequence = manager.open_sequence()
            grow(manager, sequence, 2 * PAGE)
            sequence.suspend()
            device.fail_copy(0)
            with contextlib.suppress(TransferError, OutOfPagesError):
                grow(manager, sequence, 6 * PAGE + seed)
            manager._core.in_flight.drain()
            device.run_all()
            device._failing.clear()
            check_content(sequence)
            manager.check()


# ---- the start ---------------------------------------------------------------------------------------


def test_a_start_that_fails_half_way_gives_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("ResidentPool", "Pressure", "build_core"):
        device = SimulatedDevice(1)
        with monkeypatch.context() as patch:
            patch.setattr(f"tiermem.manager.{place}", refuse)
            with pytest.raises(KeyboardInterrupt):
                open_manager(tmp_path / "s", (4, 4, 8), device)
        assert not device._hot
        assert not device._host
        open_manager(tmp_path / "s", (4, 4, 8)).close()  # the lock is free
