"""Transfers: pages on their way from one tier to another.

A transfer pins its source and holds its destination FILLING from `submit` until the list of work in flight
reaps it (rules R1, R2). Pages between GPU and SSD go through staging slots in pinned memory, so that a missing
or full RAM tier stops nothing.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.device.protocol import Device, Direction, Event, Memory
from tiermem.errors import CorruptPageError, TransferError
from tiermem.inflight import InFlight
from tiermem.layout import PageLayout
from tiermem.meter import Meter
from tiermem.pools import VALID, Addresses, Ids, SlotPool, Slots, Tier
from tiermem.store import ColdStore, StoreTransfer
from tiermem.store_names import GoneReason, PageName
from tiermem.trace import traced

Running = Event | StoreTransfer


class Names(Protocol):
    """What pages are called; the prefix index, as transfers see it."""

    def names_of(self, ids: Ids) -> Sequence[PageName | None]: ...

    def forget(self, ids: Ids) -> None: ...


class Transfer:
    """Pages `ids` moving from `src` to `dst`: one entry in the list of work in flight.

    `running` is what was started; `then` starts a second stage when it has ended. `settle` is called once at
    a good end, before the copies become VALID, and answers which pages were found damaged; `release` is
    called once at any end.
    """

    def __init__(
        self,
        mover: Mover,
        ids: Ids,
        src: Tier,
        dst: Tier,
        running: Running,
        then: Callable[[], Running] | None,
        settle: Callable[[], Ids],
        release: Callable[[], None],
    ) -> None:
        self.ids = ids
        self.src = src
        self.dst = dst
        self.error: TransferError | None = None
        self._mover = mover
        self._running = running
        self._then = then
        self._settle = settle
        self._release = release

    @property
    def event(self) -> Event | None:
        """What a compute stream may wait for instead of the host (R3): a copy in its last stage."""
        if self._then is not None or isinstance(self._running, StoreTransfer):
            return None
        return self._running

    def poll(self) -> bool:
        """Whether the last stage has ended; starts the second when the first has."""
        try:
            while self.error is None and self._ended():
                if self._then is None:
                    return True
                then, self._then = self._then, None
                self._running = then()
        except TransferError as error:
            self.error = error
        if self.error is None or self._mover.table.pins(self.ids, self.dst).any():
            return False  # a step that counted on a failed copy lets go of it first
        raise self.error

    def check(self) -> None:
        """Raise the TransferError if it is known by now to have failed; never blocks."""
        with contextlib.suppress(TransferError):
            self.poll()
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Block until the stage in progress has ended."""
        if isinstance(self._running, StoreTransfer):
            self._running.wait()
            return
        try:
            self._running.wait()
        except TransferError:
            return  # `poll` raises it again, and the work is settled as failed

    def finish(self) -> None:
        """The copies become VALID, except those that were found damaged, which are quarantined."""
        table = self._mover.table
        damaged = self._settle()
        table.commit(np.setdiff1d(self.ids, damaged, assume_unique=True), self.dst)
        table.abort(damaged, self.dst)
        table.unpin(self.ids, self.src)
        if len(damaged):
            self.error = self._mover.corrupt(
                f"{len(damaged)} of {len(self.ids)} pages read from {self.src.name} are not what was "
                f"written there; they were not served",
                damaged,
                self.src,
            )
            self._mover.quarantine(damaged, self.src)
        self._end(len(self.ids) - len(damaged))

    def fail(self, error: TransferError) -> None:
        """The pages are as they were before."""
        self.error = error
        if error.errno == errno.ENOSPC and self.dst == Tier.SSD:
            self._mover.note_full()
        self._mover.table.abort(self.ids, self.dst)
        self._mover.table.unpin(self.ids, self.src)
        self._end(0)

    def _ended(self) -> bool:
        running = self._running
        return running.poll() if isinstance(running, StoreTransfer) else running.done()

    def _end(self, num_pages: int) -> None:
        self._release()
        self._mover.note_end(self, num_pages)


class Mover:
    """Starts transfers between the tiers of one manager.

    Owns the copy streams and the staging slots, not the pools. `submit` needs VALID sources and enough free
    slots in the destination; making that room is not its business.
    """

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        table: _core.PageTable,
        in_flight: InFlight,
        pools: dict[Tier, SlotPool],
        store: ColdStore | None,
        names: Names,
        staging_pages: int,
    ) -> None:
        self.table = table
        self.meter = Meter()
        self.to_host = device.new_stream()
        self.to_device = device.new_stream()
        self.leaving = dict.fromkeys(Tier, 0)
        self._device = device
        self._layout = layout
        self._in_flight = in_flight
        self._pools = pools
        self._store = store
        self._names = names
        self._lanes = _make_lanes(device, layout, staging_pages) if store else {}

    @property
    def staging(self) -> list[Memory]:
        """Pinned memory beyond the tiers."""
        return [lane.pool.memory for lane in self._lanes.values()]

    @property
    def staging_bytes(self) -> int:
        """Pinned memory beyond the tiers, bytes."""
        return sum(memory.num_bytes for memory in self.staging)

    @traced("submit copies")
    def submit(self, ids: Ids, src: Tier, dst: Tier) -> list[Transfer]:
        """Start copying `ids` from `src` to `dst`; the source copies stay.

        Waits for work in flight where staging slots are needed and taken.

        Raises
        ------
        TransferError: the device or the I/O engine refused; those pages are as before.
        """
        if len(ids) == 0:
            return []
        self.table.pin(ids, src)  # R2; and R4, while staging slots are waited for
        if {src, dst} == {Tier.GPU, Tier.SSD}:
            return self._submit_staged(ids, src, dst)
        return [self._start(ids, src, dst, partial(self._start_direct, ids, src, dst), _nothing)]

    def corrupt(self, message: str, ids: Ids, tier: Tier) -> CorruptPageError:
        """What to raise for pages whose copies in `tier` were found damaged: it says which have no other one."""
        alive = ids[self.table.alive(ids)]
        others = [self.table.states(alive, other) == VALID for other in Tier if other != tier]
        lost = alive[~np.logical_or.reduce(others)]
        return CorruptPageError(message, tuple(ids.tolist()), tuple(lost.tolist()))

    def quarantine(self, ids: Ids, tier: Tier) -> None:
        """Drop copies that were found damaged, even the last ones: their pages are lost, never served.

        A copy that someone else holds stays until it is found damaged again: every way back verifies it.
        """
        ids = ids[self.table.alive(ids)]
        ids = ids[self.table.pins(ids, tier) == 0]
        if tier == Tier.SSD:
            self._cold.unpublish(self.table.slots(ids, Tier.SSD), GoneReason.QUARANTINED)
        self.table.discard(ids, tier)
        alive = self.table.alive(ids)
        lost = ids[alive][self.table.is_lost(ids[alive])]
        self._names.forget(np.concatenate([ids[~alive], lost]))

    def finish_write_through(self, ids: Ids, checksums: NDArray[np.uint64]) -> None:
        """Every slice of these pages, FILLING on the SSD, was written: write their trailers and wait."""
        slots = self.table.slots(ids, Tier.SSD)
        self._cold.finish_slices(slots, self._names.names_of(ids), checksums)

    def most_without_waiting(self, src: Tier, dst: Tier) -> int | None:
        """How many pages `submit` would start without waiting for staging slots; None for any number."""
        if {src, dst} != {Tier.GPU, Tier.SSD}:
            return None
        return len(self._lanes[src].free)

    def note_end(self, transfer: Transfer, num_pages: int) -> None:
        """`transfer` was settled after moving `num_pages` pages."""
        self.leaving[transfer.src] -= len(transfer.ids)
        self.meter.end(transfer.src, transfer.dst, num_pages * self._layout.page_bytes)

    def note_full(self) -> None:
        """The SSD had no space for a page."""
        self._cold.guard.note_full()

    def free(self) -> None:
        """Give the staging slots back; nothing may be in flight."""
        for lane in self._lanes.values():
            lane.pool.free()

    # ---- one stage ---------------------------------------------------------------------------------

    def _start_direct(self, ids: Ids, src: Tier, dst: Tier, slots: Slots) -> Stages:
        if dst == Tier.SSD:
            return self._start_write(ids, slots, self._addresses(ids, src))
        target = self._pools[dst].addresses(slots)
        if src == Tier.SSD:
            reading = self._cold.read(self.table.slots(ids, src), target)
            return Stages(reading, None, lambda: ids[~self._cold.verify(reading)])
        return Stages(self._copy(target, self._addresses(ids, src), src), None, _no_ids)

    def _start_write(self, ids: Ids, slots: Slots, addresses: Addresses) -> Stages:
        names = self._names.names_of(ids)
        writing = self._cold.write(slots, addresses, names)

        def publish() -> Ids:
            # The page may have been renamed or dropped meanwhile: only a name that is in the trailer
            # and still stands enters the index.
            now = self._names.names_of(ids)
            same = [name if name == then else None for name, then in zip(now, names, strict=True)]
            self._cold.publish(slots, same)
            return _no_ids()

        return Stages(writing, None, publish)

    # ---- two stages, through staging ---------------------------------------------------------------

    def _submit_staged(self, ids: Ids, src: Tier, dst: Tier) -> list[Transfer]:
        lane = self._lanes[src]
        started: list[Transfer] = []
        while len(ids):
            while not lane.free:
                self._in_flight.wait_any()
            now, ids = ids[: len(lane.free)], ids[len(lane.free) :]
            staged = lane.take(len(now))
            begin = partial(self._start_staged, now, src, dst, lane.pool.addresses(staged))
            try:
                started.append(self._start(now, src, dst, begin, partial(lane.give_back, staged)))
            except TransferError:
                self.table.unpin(ids, src)
                raise
        return started

    def _start_staged(
        self, ids: Ids, src: Tier, dst: Tier, buffers: Addresses, slots: Slots
    ) -> Stages:
        if src == Tier.GPU:
            writes: list[Stages] = []

            def write() -> Running:
                writes.append(self._start_write(ids, slots, buffers))
                return writes[0].running

            def publish() -> Ids:
                return writes[0].settle()

            return Stages(self._copy(buffers, self._addresses(ids, src), src), write, publish)
        reading = self._cold.read(self.table.slots(ids, src), buffers)
        damaged: list[Ids] = []

        def upload() -> Running:
            damaged.append(ids[~self._cold.verify(reading)])
            return self._copy(self._pools[dst].addresses(slots), buffers, Tier.RAM)

        return Stages(reading, upload, lambda: damaged[0])

    # ---- inside ------------------------------------------------------------------------------------

    @property
    def _cold(self) -> ColdStore:
        assert self._store is not None
        return self._store

    def _addresses(self, ids: Ids, tier: Tier) -> Addresses:
        return self._pools[tier].addresses(self.table.slots(ids, tier))

    def _copy(self, dst: Addresses, src: Addresses, src_tier: Tier) -> Event:
        to_host = src_tier == Tier.GPU
        stream = self.to_host if to_host else self.to_device
        direction = Direction.DEVICE_TO_HOST if to_host else Direction.HOST_TO_DEVICE
        self._device.copy(direction, dst, src, self._layout.page_bytes, stream)
        return stream.record()

    def _start(
        self,
        ids: Ids,
        src: Tier,
        dst: Tier,
        begin: Callable[[Slots], Stages],
        release: Callable[[], None],
    ) -> Transfer:
        slots = self.table.reserve(ids, dst)
        try:
            stages = begin(slots)
        except TransferError:
            self.table.abort(ids, dst)
            self.table.unpin(ids, src)
            release()
            raise
        transfer = Transfer(
            self, ids, src, dst, stages.running, stages.then, stages.settle, release
        )
        self.leaving[src] += len(ids)
        self.meter.begin(src, dst)
        self._in_flight.add(transfer)
        return transfer


class Stages:
    """What a transfer has started, what follows, and what settles it."""

    def __init__(
        self, running: Running, then: Callable[[], Running] | None, settle: Callable[[], Ids]
    ) -> None:
        self.running = running
        self.then = then
        self.settle = settle


class Lane:
    """Staging slots of one direction, in pinned memory: reserved, so that neither direction starves."""

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self.free = list(range(pool.num_slots))

    def take(self, count: int) -> Slots:
        """`count` free slots."""
        return np.array([self.free.pop() for _ in range(count)], dtype=np.int64)

    def give_back(self, slots: Slots) -> None:
        """The transfer that used `slots` has ended."""
        self.free.extend(int(slot) for slot in slots)


def _make_lanes(device: Device, layout: PageLayout, pages: int) -> dict[Tier, Lane]:
    """One lane for each tier that pages may come from."""
    size = layout.slot_bytes * pages
    return {
        src: Lane(SlotPool(device.allocate_host(size), layout.slot_bytes, pages))
        for src in (Tier.GPU, Tier.SSD)
    }


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int64)


def _nothing() -> None:
    return None
