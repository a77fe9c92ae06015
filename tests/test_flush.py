"""Flush: it returns when every published page is durable, and says which are not and why; closing only logs it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from liveness_support import (
    PAGE,
    append,
    check_content,
    faults_fixture,  # noqa: F401
    grow,
    open_manager,
    tokens_of,
)

from tiermem import ConfigError, DeadlineError, NotDurableError, TransferError, _core
from tiermem._core import FaultOps, FileCall, Tier
from tiermem.breaker import MOST_FAILURES, TierState, Use
from tiermem.disk_budget import DiskGuard, Pause
from tiermem.pools import VALID

SLOTS = (8, 0, 32)


def fail_once(faults: FaultOps, call: FileCall, error: int) -> None:
    faults.fail(call, faults.num_calls(call) + 1, error, 1)


def num_stored(path: Path) -> int:
    """Pages of the prompt of salt 0 that a new manager finds."""
    with open_manager(path, SLOTS) as manager:
        sequence = manager.open_sequence(tokens_of(0, 8 * PAGE))
        check_content(sequence)
        return sequence.num_tokens // PAGE


def test_what_could_be_written_is_durable_and_the_next_flush_writes_the_rest(
    tmp_path: Path, faults: FaultOps
) -> None:
    with open_manager(tmp_path / "s", SLOTS, staging_pages=1) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 4 * PAGE)
        fail_once(faults, FileCall.WRITE, errno.EIO)
        with pytest.raises(NotDurableError, match=r"1 of 4 published .*Input/output") as caught:
            manager.flush()
        assert (caught.value.num_pages, caught.value.num_published) == (1, 4)
        assert isinstance(caught.value, TransferError)
        assert isinstance(caught.value.__cause__, TransferError)
        assert manager._store is not None
        slots = manager._core.table.slots(sequence.pages[:4], Tier.SSD)
        assert manager._store.index.is_durable(slots[slots >= 0]).sum() == 3
        manager.check()
        check_content(sequence)
        manager.flush()
        assert manager._store.index.num_pending == 0
    assert num_stored(tmp_path / "s") == 4


def test_a_payload_that_is_not_synced_is_not_durable(tmp_path: Path, faults: FaultOps) -> None:
    store_faults = FaultOps()
    opened = _core.BlockFile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "BlockFile", lambda *args: opened(*args, faults=store_faults))
        manager = open_manager(tmp_path / "s", SLOTS)
    with manager:
        grow(manager, manager.open_sequence(), 3 * PAGE)
        fail_once(store_faults, FileCall.SYNC, errno.EIO)
        with pytest.raises(NotDurableError, match=r"3 of 3 .*was not synced") as caught:
            manager.flush()
        assert caught.value.reason.startswith("the SSD tier was not synced")
        manager.flush()
    assert num_stored(tmp_path / "s") == 3


def test_a_tier_that_is_off_is_no_error_where_all_is_durable(
    tmp_path: Path, faults: FaultOps
) -> None:
    with open_manager(tmp_path / "s", SLOTS) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 3 * PAGE)
        manager.flush()
        assert manager._store is not None
        for _ in range(MOST_FAILURES):
            manager._store.breaker.note_failure(Use.WRITE, "no such device")
        assert manager._store.breaker.state is TierState.READ_ONLY
        writes = faults.num_calls(FileCall.WRITE)
        manager.flush()
        grow(manager, sequence, PAGE)
        with pytest.raises(NotDurableError, match=r"1 of 4 .*read-only \(3 failures") as caught:
            manager.flush()
        assert "tried again in" in caught.value.reason
        assert faults.num_calls(FileCall.WRITE) == writes


def test_a_missed_deadline_is_the_cause(tmp_path: Path, faults: FaultOps) -> None:
    with open_manager(tmp_path / "s", SLOTS) as manager:
        grow(manager, manager.open_sequence(), 2 * PAGE)
        faults.hold(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, 100)
        with pytest.raises(NotDurableError, match="2 of 2 ") as caught:
            manager.flush()
        assert isinstance(caught.value.__cause__, DeadlineError)
        faults.release()


def test_closing_tells_what_is_not_durable_in_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager(tmp_path / "s", SLOTS)
    grow(manager, manager.open_sequence(), 3 * PAGE)
    monkeypatch.setattr(DiskGuard, "pause", Pause.FREE_FLOOR)
    manager.close()
    wanted = f"3 of 3 published pages are not durable on the SSD: {Pause.FREE_FLOOR.value}"
    assert wanted in caplog.text
    monkeypatch.undo()
    assert num_stored(tmp_path / "s") == 0


def test_pages_beyond_the_cap_are_no_error(tmp_path: Path) -> None:
    """The most recent ones are kept, as it says."""
    with open_manager(tmp_path / "s", (8, 8, 3)) as manager:
        grow(manager, manager.open_sequence(), 4 * PAGE)
        grow(manager, manager.open_sequence(), 2 * PAGE, 1)
        manager.flush()
        assert manager.stats().tiers[Tier.SSD].used == 3


def test_pages_that_find_no_slot_though_the_cap_has_room_for_them_are_told(tmp_path: Path) -> None:
    """Pages without a name, of a sequence that is open, have all of them."""
    with open_manager(tmp_path / "s", (4, 0, 4)) as manager:
        other = manager.open_sequence()
        for _ in range(4):
            append(manager, other, PAGE, 1)
        other.suspend()
        grow(manager, manager.open_sequence(), 2 * PAGE)
        with pytest.raises(NotDurableError, match=r"2 of 2 .*in use fill the SSD tier"):
            manager.flush()
        other.close()
        manager.flush()
        assert manager.stats().tiers[Tier.SSD].used == 2


def test_where_few_slots_are_left_the_pages_that_others_are_found_through_are_written(
    tmp_path: Path,
) -> None:
    with open_manager(tmp_path / "s", (8, 0, 4)) as manager:
        unnamed = manager.open_sequence()
        append(manager, unnamed, 3 * PAGE, 1)
        unnamed.suspend()
        sequence = manager.open_sequence()
        grow(manager, sequence, 3 * PAGE)
        with pytest.raises(NotDurableError, match="2 of 3 "):
            manager.flush()
        states = manager._core.table.states(sequence.pages, Tier.SSD)
        assert (states == VALID).tolist() == [True, False, False]
        unnamed.close()
        manager.flush()
        assert manager._core.table.states(sequence.pages, Tier.SSD).tolist() == [VALID] * 3


def test_without_an_ssd_there_is_nothing_to_flush_to() -> None:
    with open_manager(None, (8, 8, 0)) as manager, pytest.raises(ConfigError, match="no SSD tier"):
        manager.flush()
