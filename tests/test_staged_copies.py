"""Copies in two stages, between GPU and SSD through staging: stages that fail, pages that change meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
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

from tiermem import CorruptPageError, Sequence, TierManager, TransferError
from tiermem._core import FaultOps, FileCall, Tier
from tiermem.breaker import MOST_FAILURES, Use
from tiermem.device.simulated import SimulatedDevice
from tiermem.pools import ABSENT, FILLING, VALID, Ids
from tiermem.transfer import Transfer

SLOTS = (8, 0, 16)


class Setup:
    """A manager without RAM over a device that runs nothing by itself, and a sequence of four pages on the GPU."""

    def __init__(self, tmp_path: Path, *, is_named: bool = True) -> None:
        self.device = SimulatedDevice(7, eagerness=0.0)
        self.manager = open_manager(tmp_path / "s", SLOTS, self.device, io_timeout_s=30.0)
        self.core = self.manager._core
        self.sequence: Sequence = self.manager.open_sequence()
        (grow if is_named else append)(self.manager, self.sequence, 4 * PAGE)
        self.core.in_flight.drain()
        self.core.leases.end_all()
        self.pages: Ids = self.sequence.pages.copy()
        self.lanes = self.core.mover._lanes
        self.num_staging = {tier: len(lane.free) for tier, lane in self.lanes.items()}

    def go_down(self) -> Transfer:
        (transfer,) = self.core.mover.submit(self.pages, Tier.GPU, Tier.SSD)
        return transfer

    def settle(self, transfer: Transfer) -> TransferError | None:
        self.core.in_flight.wait_for([transfer])
        return transfer.error

    def leave_gpu(self) -> None:
        """Only the SSD has the pages."""
        assert self.settle(self.go_down()) is None
        self.core.table.drop(self.pages, Tier.GPU)

    def states(self, tier: Tier) -> set[int]:
        return set(self.core.table.states(self.pages, tier).tolist())

    def check(self) -> None:
        """Nothing is in flight, pinned or taken, and every byte is right."""
        assert len(self.core.in_flight) == 0
        for tier in Tier:
            assert not self.core.table.pins(self.pages, tier).any()
        assert {tier: len(lane.free) for tier, lane in self.lanes.items()} == self.num_staging
        assert self.core.mover.leaving == dict.fromkeys(Tier, 0)
        self.manager.check()
        check_content(self.sequence)


def fail_next(faults: FaultOps, call: FileCall) -> None:
    faults.fail(call, faults.num_calls(call) + 1, errno.EIO, 1)


# ---- a stage that fails --------------------------------------------------------------------------------


def test_a_copy_down_that_fails_writes_nothing(tmp_path: Path, faults: FaultOps) -> None:
    setup = Setup(tmp_path)
    writes = faults.num_calls(FileCall.WRITE)
    setup.device.fail_copy(2)
    error = setup.settle(setup.go_down())
    assert error is not None
    assert "copy" in str(error)
    assert faults.num_calls(FileCall.WRITE) == writes
    assert (setup.states(Tier.GPU), setup.states(Tier.SSD)) == ({VALID}, {ABSENT})
    setup.check()
    assert setup.settle(setup.go_down()) is None
    assert setup.states(Tier.SSD) == {VALID}
    setup.check()
    setup.manager.close()


def test_a_read_that_fails_copies_nothing_up(tmp_path: Path, faults: FaultOps) -> None:
    setup = Setup(tmp_path)
    setup.leave_gpu()
    copies = setup.device.copies_submitted
    fail_next(faults, FileCall.READ)
    (transfer,) = setup.core.mover.submit(setup.pages, Tier.SSD, Tier.GPU)
    error = setup.settle(transfer)
    assert error is not None
    assert error.errno == errno.EIO
    assert setup.device.copies_submitted == copies
    assert (setup.states(Tier.GPU), setup.states(Tier.SSD)) == ({ABSENT}, {VALID})
    setup.check()
    setup.manager.close()


def test_a_write_that_fails_leaves_the_pages_on_the_gpu(tmp_path: Path, faults: FaultOps) -> None:
    setup = Setup(tmp_path)
    fail_next(faults, FileCall.WRITE)
    error = setup.settle(setup.go_down())
    assert error is not None
    assert error.errno == errno.EIO
    assert (setup.states(Tier.GPU), setup.states(Tier.SSD)) == ({VALID}, {ABSENT})
    setup.check()
    setup.manager.close()


def test_a_copy_up_that_fails_leaves_the_pages_on_the_ssd(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.leave_gpu()
    setup.device.fail_copy(1)
    (transfer,) = setup.core.mover.submit(setup.pages, Tier.SSD, Tier.GPU)
    error = setup.settle(transfer)
    assert isinstance(error, CorruptPageError)  # what arrived is compared, whatever the device says
    assert error.lost == ()
    states = setup.core.table.states(setup.pages, Tier.GPU)
    assert error.pages == tuple(setup.pages[states == ABSENT].tolist())
    assert (states == VALID).sum() == 3
    assert setup.states(Tier.SSD) == {VALID}
    setup.check()
    setup.manager.close()


# ---- a second stage that does not start ------------------------------------------------------------------


def test_a_write_is_refused_where_the_tier_was_switched_off_meanwhile(
    tmp_path: Path, faults: FaultOps
) -> None:
    setup = Setup(tmp_path)
    transfer = setup.go_down()
    assert setup.states(Tier.SSD) == {FILLING}
    assert setup.manager._store is not None
    breaker = setup.manager._store.breaker
    for _ in range(MOST_FAILURES):
        breaker.note_failure(Use.WRITE, "no such device")
    writes = faults.num_calls(FileCall.WRITE)
    error = setup.settle(transfer)
    assert error is not None
    assert "read-only" in str(error)
    assert faults.num_calls(FileCall.WRITE) == writes
    assert (setup.states(Tier.GPU), setup.states(Tier.SSD)) == ({VALID}, {ABSENT})
    breaker.probe_ended(None)
    setup.check()
    setup.manager.close()


def test_a_copy_up_that_the_device_refuses_fails_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path)
    setup.leave_gpu()
    (transfer,) = setup.core.mover.submit(setup.pages, Tier.SSD, Tier.GPU)

    def refuse(*_: object) -> None:
        raise TransferError("the device takes no copy")

    monkeypatch.setattr(setup.device, "copy", refuse)
    error = setup.settle(transfer)
    assert "takes no copy" in str(error)
    assert (setup.states(Tier.GPU), setup.states(Tier.SSD)) == ({ABSENT}, {VALID})
    monkeypatch.undo()
    setup.check()
    setup.manager.close()


# ---- pages that change meanwhile -------------------------------------------------------------------------


def found(tmp_path: Path) -> int:
    """Pages that the next manager finds by name, every byte of them right."""
    with open_manager(tmp_path / "s", SLOTS) as manager:
        sequence = manager.open_sequence(tokens_of(0, 4 * PAGE))
        check_content(sequence)
        return sequence.num_tokens // PAGE


def give_up(manager: TierManager) -> None:
    """End a manager without writing anything more: what its store has now is what counts."""
    core, store = manager._core, manager._store
    assert store is not None
    store.sync()
    core.prefixes.forget(core.prefixes.pages())
    store.index._pending.clear()
    manager.close()


@pytest.mark.parametrize("stage", [1, 2])
def test_pages_that_get_their_name_meanwhile_are_found_under_it(
    tmp_path: Path, faults: FaultOps, stage: int
) -> None:
    setup = Setup(tmp_path, is_named=False)
    transfer = setup.go_down()
    faults.hold(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, 100)
    if stage == 2:
        setup.device.run_all()
        assert not transfer.poll()
        assert transfer.event is None
        assert transfer._then is None
    setup.sequence.record(tokens_of(0, 4 * PAGE))
    faults.release()
    assert setup.settle(transfer) is None
    assert setup.states(Tier.SSD) == {VALID}
    assert setup.manager._store is not None
    slots = setup.core.table.slots(setup.pages, Tier.SSD)
    # what their trailers do not say is not published
    assert setup.manager._store.index.is_published(slots).all() == (stage == 1)
    assert setup.manager._store.index.is_published(slots).any() == (stage == 1)
    setup.check()
    setup.manager.flush()
    assert setup.manager._store.index.is_durable(slots).all()
    give_up(setup.manager)
    assert found(tmp_path) == 4


def test_pages_that_lose_their_name_while_they_are_written_are_not_found(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    transfer = setup.go_down()
    setup.core.prefixes.forget(setup.pages[2:3])  # and what follows it
    assert setup.settle(transfer) is None
    assert setup.manager._store is not None
    slots = setup.core.table.slots(setup.pages, Tier.SSD)
    assert setup.manager._store.index.is_published(slots).tolist() == [True, True, False, False]
    setup.check()
    give_up(setup.manager)
    assert found(tmp_path) == 2


@pytest.mark.parametrize(
    "end",
    [lambda sequence: sequence.close(), lambda sequence: sequence.rollback(4 * PAGE)],
    ids=["closed", "rolled-back"],
)
def test_pages_whose_sequence_ends_while_they_are_written_leave_no_slot_behind(
    tmp_path: Path, end: Callable[[Sequence], None]
) -> None:
    setup = Setup(tmp_path, is_named=False)
    transfer = setup.go_down()
    end(setup.sequence)
    assert setup.settle(transfer) is None
    assert not setup.core.table.alive(setup.pages).any()
    for tier in Tier:
        counts = setup.core.table.counts(tier)
        assert counts.free == counts.slots
    setup.manager.check()
    setup.manager.close()
    assert found(tmp_path) == 0


def test_a_page_that_goes_on_after_it_was_sealed_is_written_as_it_was(tmp_path: Path) -> None:
    """`fork` seals the last page, half full; its continuation is another page, with its own bytes."""
    setup = Setup(tmp_path)
    append(setup.manager, setup.sequence, PAGE // 2)
    setup.core.in_flight.drain()
    twin = setup.sequence.fork("twin")
    assert len(setup.sequence.pages) == 5
    setup.pages = setup.sequence.pages[1:].copy()
    setup.core.in_flight.drain()
    setup.core.leases.end_all()
    transfer = setup.go_down()
    append(setup.manager, setup.sequence, PAGE)
    assert setup.settle(transfer) is None
    assert np.array_equal(twin.pages[1:], setup.pages)
    assert setup.sequence.pages[-2] != twin.pages[-1]
    setup.core.in_flight.drain()
    check_content(twin)
    check_content(setup.sequence)
    assert twin.num_tokens == 4 * PAGE + PAGE // 2
    setup.manager.check()
    setup.manager.close()
