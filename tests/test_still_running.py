"""What was started and then fails, or is left, keeps what it uses until it has ended: slots, sums, memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liveness_support import (
    DEADLINE_S,
    PAGE,
    check_content,
    faults_fixture,  # noqa: F401
    grow,
    open_manager,
    settle,
    tokens_of,
)
from world import LAYOUT, kv_of, store_bytes

from tiermem import TierManager, TransferError
from tiermem._core import FaultOps, FileCall, Tier
from tiermem.cipher_key import SecretKey
from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Device
from tiermem.device.simulated import SimulatedDevice
from tiermem.store import ColdStore


def free_slots_that_are_written(manager: TierManager, device: SimulatedDevice) -> list[int]:
    """Hot slots that no page has, and to which copies are on their way."""
    core, pool = manager._core, manager._core.pools[Tier.GPU]
    taken = {
        slot
        for sequence in manager._sequences
        for slot in core.table.slots(sequence.pages, Tier.GPU).tolist()
    }
    pieces = [piece for stream in device._streams for piece in stream.pending_pieces()]
    inside = [p.dst - pool.memory.address for p in pieces]
    slots = {at // pool.slot_bytes for at in inside if 0 <= at < pool.memory.num_bytes}
    return sorted(slots - taken)


class NoEvents:
    """A stream that cannot record its next event; then all is as it was."""

    def __init__(self, manager: TierManager) -> None:
        self._routes = manager._core.mover._routes
        self._stream = self._routes.checks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def record(self) -> Any:
        self._routes.checks = self._stream
        raise TransferError("no event")


@pytest.mark.parametrize("refused", ["slices", "verify_slices", "record"])
@pytest.mark.parametrize("slots", [(6, 8, 0), (6, 0, 20)], ids=["from-ram", "from-ssd"])
def test_slots_that_a_copy_still_writes_are_not_given_back(
    tmp_path: Path, refused: str, slots: tuple[int, int, int]
) -> None:
    """Pages are copied to the GPU and cannot be compared there: the copy goes on all the same."""
    device = SimulatedDevice(3, eagerness=0.0)
    path = tmp_path / "s" if slots[2] else None
    with open_manager(path, slots, device, io_timeout_s=30.0) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 4 * PAGE)
        sequence.suspend()
        core = manager._core
        with pytest.MonkeyPatch.context() as patch:

            def refuse(*_: object) -> None:
                patch.undo()
                raise TransferError(f"no {refused}")

            if refused == "record":
                own = device._own
                checks = core.mover.checks
                patch.setattr(device, "_own", lambda s: own(checks if type(s) is NoEvents else s))
                patch.setattr(core.mover._routes, "checks", NoEvents(manager))
            else:
                patch.setattr(device, refused, refuse)
            error: TransferError | None = None
            try:
                transfers = core.promote(sequence.pages)
            except TransferError as raised:
                error, transfers = raised, []
            assert free_slots_that_are_written(manager, device) == []
            core.in_flight.drain()
            error = error or next(transfer.error for transfer in transfers)
            assert error is not None
            assert f"no {'event' if refused == 'record' else refused}" in str(error)
        assert core.table.counts(Tier.GPU).free == 6
        manager.check()
        check_content(sequence)
        grow(manager, sequence, PAGE)
        check_content(sequence)


# ---- a device that refuses ---------------------------------------------------------------------------


@contextmanager
def refusing(device: Device, name: str) -> Iterator[None]:
    """The next call of this method of the device is refused."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            patch.undo()
            raise TransferError("refused")

        patch.setattr(device, name, refuse)
        yield


@pytest.mark.parametrize("start", [0, 5, PAGE])
@pytest.mark.parametrize("slots", [(8, 8, 0), (2, 8, 0)], ids=["hot", "through"])
def test_a_step_whose_pages_cannot_be_summed_is_undone(
    start: int, slots: tuple[int, int, int]
) -> None:
    device = CpuDevice()
    with open_manager(None, slots, device) as manager:
        sequence = manager.open_sequence()
        if start:
            grow(manager, sequence, start)
        pages = sequence.pages.copy()
        with refusing(device, "sum_slices"), pytest.raises(TransferError, match="refused"):
            grow(manager, sequence, 2 * PAGE)
        assert sequence.num_tokens == start
        assert np.array_equal(sequence.pages, pages)
        manager.check()
        check_content(sequence)
        grow(manager, sequence, 2 * PAGE)
        sequence.suspend()
        grow(manager, sequence, 1)
        check_content(sequence)


def test_a_page_that_cannot_be_summed_stays_open() -> None:
    device = CpuDevice()
    with open_manager(None, (8, 8, 0), device) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 5)
        with refusing(device, "sum_slices"), pytest.raises(TransferError, match="refused"):
            sequence.suspend()
        check_content(sequence)
        sequence.suspend()
        grow(manager, sequence, 5)
        check_content(sequence)


# ---- what a step uses --------------------------------------------------------------------------------


class Failure(Exception):
    """Raised in the body of a step."""


@pytest.mark.parametrize("slots", [(3, 12, 0), (2, 12, 0), (2, 0, 20)])
def test_a_step_that_is_undone_late_keeps_what_the_device_still_reads(
    tmp_path: Path, slots: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that slices are compared with, and sums of pages that are written through."""
    monkeypatch.setattr(
        logging.getLogger("tiermem"), "disabled", True
    )  # pytest keeps what is logged
    device = SimulatedDevice(3, eagerness=0.0)
    with open_manager(
        tmp_path / "s" if slots[2] else None, slots, device, io_timeout_s=30.0
    ) as manager:
        sequence = manager.open_sequence()
        for _ in range(6):
            grow(manager, sequence, PAGE)
        device.run_all()
        used: list[weakref.ref[torch.Tensor]] = []

        def fail() -> None:
            with manager.step([sequence], 3 * PAGE) as step:
                tokens = np.array(tokens_of(0, 9 * PAGE)[6 * PAGE :])
                step.append(0, *kv_of(b"", tokens, 6 * PAGE, 0))
                step.attend(0, torch.ones(3 * PAGE, 1, LAYOUT.head_dim))
                lower = step._lower
                assert lower is not None
                loads = [chunk.load for chunk in lower._chunks if chunk.load is not None]
                used.extend(weakref.ref(load.check.slices.rows) for load in loads)
                born = lower._through._born.values()
                used.extend(weakref.ref(slices.rows) for slices, _ in born)
                device.hang()
                raise Failure

        with pytest.raises(Failure):
            fail()
        gc.collect()
        assert manager._core.in_flight.num_late == 1
        assert used
        assert all(reference() is not None for reference in used)
        device.resume()
        manager._core.in_flight.reap()
        device.run_all()
        manager.poll()
        gc.collect()
        assert all(reference() is None for reference in used)
        check_content(sequence)


# ---- an interrupt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_slots_that_the_disk_still_writes_are_not_given_back_by_an_interrupt(
    tmp_path: Path, faults: FaultOps, monkeypatch: pytest.MonkeyPatch, num_interrupts: int
) -> None:
    """A step that writes pages through to the SSD is interrupted while it waits; the step is undone."""
    with open_manager(tmp_path / "s", (2, 0, 20), io_timeout_s=30.0) as manager:
        store = manager._store
        assert store is not None
        core, wait, left = manager._core, store.engine.wait, num_interrupts
        sequence = manager.open_sequence()
        grow(manager, sequence, PAGE)
        faults.hold(FileCall.WRITE, faults.num_calls(FileCall.WRITE) + 1, 1 << 40)

        def interrupt(ticket: int, timeout_s: float) -> Any:
            nonlocal left
            if left == 0:
                faults.release()
                return wait(ticket, timeout_s)
            left -= 1
            raise KeyboardInterrupt

        monkeypatch.setattr(store.engine, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grow(manager, sequence, 6 * PAGE)
        monkeypatch.undo()
        num_filling = core.table.counts(Tier.SSD).filling
        assert num_filling > 0 or not store.engine.counters().in_flight
        assert (num_filling > 0) == (num_interrupts > 1)
        faults.release()
        settle(manager)
        assert core.table.counts(Tier.SSD).filling == 0
        assert sequence.num_tokens == PAGE
        grow(manager, sequence, 6 * PAGE)
        check_content(sequence)
        manager.check()


# ---- memory of a store that was closed ---------------------------------------------------------------


def test_what_is_encrypted_stays_while_a_closed_store_may_write_it(
    tmp_path: Path, faults: FaultOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setattr(
        logging.getLogger("tiermem"), "disabled", True
    )  # pytest keeps what is logged
    key = SecretKey(bytes(range(32)))
    store = ColdStore(tmp_path / "s", LAYOUT, store_bytes(8), "threads", DEADLINE_S, key=key)
    assert store._vault is not None
    buffers = [weakref.ref(buffer) for buffer in store._vault._buffers]
    num_calls = faults.num_calls(FileCall.WRITE)
    faults.hold(FileCall.WRITE, num_calls + 1, 1 << 40)
    page = np.zeros(LAYOUT.slot_bytes, dtype=np.uint8)
    slots, addresses = np.array([0], dtype=np.int64), np.array([page.ctypes.data], dtype=np.int64)
    writing = store.write(slots, addresses, [None])
    while faults.num_calls(FileCall.WRITE) == num_calls:  # until the disk has it
        threading.Event().wait(0.01)
    writing.expire()
    with contextlib.suppress(TransferError):
        store.close()
    del store, writing
    gc.collect()
    assert all(buffer() is not None for buffer in buffers)
    faults.release()
    while any(buffer() is not None for buffer in buffers):
        threading.Event().wait(0.01)
        gc.collect()
