"""Transfers: pages on their way from one tier to another.

A transfer pins its source and holds its destination FILLING from `submit` until the list of work in flight
reaps it (rules R1, R2). Pages between GPU and SSD go through staging slots in pinned memory, so that a missing
or full RAM tier stops nothing.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.breaker import Use
from tiermem.device.protocol import Device, Direction, Event, Memory, Stream
from tiermem.errors import CorruptPageError, DeadlineError, TransferError
from tiermem.inflight import InFlight
from tiermem.lanes import make_lanes
from tiermem.layout import PageLayout
from tiermem.meter import Meter
from tiermem.page_sums import Check, Damage, PageSums, Sums
from tiermem.poison import Poison
from tiermem.pools import Addresses, Ids, SlotPool, Slots, Tier, as_ids
from tiermem.probe import start_probe
from tiermem.quarantine import Names, Quarantine
from tiermem.store import ColdStore, StoreTransfer
from tiermem.trace import traced

Running = Event | StoreTransfer


class Transfer:
    """Pages `ids` moving from `src` to `dst`: one entry in the list of work in flight.

    `running` is what was started; `then` starts a second stage when it has ended. `settle` is called once at
    a good end, before the copies become VALID, and answers what was found damaged; `release` is called once at
    any end.
    """

    def __init__(
        self,
        mover: Mover,
        ids: Ids,
        src: Tier,
        dst: Tier,
        running: Running,
        then: Callable[[], Running] | None,
        settle: Callable[[], list[Damage]],
        release: Callable[[], None],
    ) -> None:
        self.ids = ids
        self.src = src
        self.dst = dst
        self.error: TransferError | None = None
        self._mover = mover
        self._running: Running | None = running
        self._then = then
        self._settle = settle
        self._release = release
        self._damages: list[Damage] | None = None
        self._damage: CorruptPageError | None = None

    @property
    def event(self) -> Event | None:
        """What a compute stream may wait for instead of the host (R3): a copy in its last stage."""
        running = self._running
        return None if self._then is not None or isinstance(running, StoreTransfer) else running

    def poll(self) -> bool:
        """Whether the last stage has ended and was settled; starts the second when the first has."""
        while self._running is not None and self._advance():
            pass
        if self._running is not None or self.held() is not None:
            return False  # a step that counts on a copy that failed lets go of it first
        if self.error is not None:
            raise self.error
        return True

    def held(self) -> TransferError | None:
        """The error of one that has ended, where a step that counts on it has yet to let go of it."""
        error = self.error or self._damage
        if self._running is not None or error is None:
            return None
        ids = self.ids if self.error is not None else self._damaged_ids()
        return error if self._mover.table.pins(ids, self.dst).any() else None

    def is_late(self) -> bool:
        """Whether the deadline of the stage in progress is over."""
        return self._running is not None and self._running.is_late()

    def expire(self) -> DeadlineError:
        """Nothing that arrives from now on is used: when it ends, it fails."""
        if isinstance(self._running, StoreTransfer):
            error = self._running.expire()
        else:
            error = DeadlineError(
                f"{len(self.ids)} pages were not copied from {self.src.name} towards {self.dst.name} "
                f"within copy_timeout_s={self._mover.copy_timeout_s:g}"
            )
        self.error = self.error or error
        return error

    def check(self) -> None:
        """Raise the TransferError if it is known by now to have failed, or to be late; never blocks."""
        with contextlib.suppress(TransferError):
            self.poll()
        error = self.error or self._damage
        if error is not None:
            raise error

    def wait(self) -> None:
        """Block until the stage in progress has ended; raises DeadlineError at its deadline."""
        if self._running is None:
            return
        try:
            self._running.wait()
        except DeadlineError:
            raise
        except TransferError:
            return  # `poll` raises it again, and the work is settled as failed

    def finish(self) -> None:
        """The copies become VALID, except those that were found damaged, which are quarantined."""
        table, damaged = self._mover.table, self._damaged_ids()
        table.commit(np.setdiff1d(self.ids, damaged, assume_unique=True), self.dst)
        table.abort(damaged, self.dst)
        table.unpin(self.ids, self.src)
        self.error = self._damage
        self._mover.quarantine.drop_found()
        self._end(len(self.ids) - len(damaged))

    def fail(self, error: TransferError) -> None:
        """The pages are as they were before."""
        self.error = error
        if error.errno == errno.ENOSPC and self.dst == Tier.SSD:
            self._mover.note_full()
        self._mover.table.abort(self.ids, self.dst)
        self._mover.table.unpin(self.ids, self.src)
        self._end(0)

    def _advance(self) -> bool:
        """Go on to the next stage where the one in progress has ended, well or not."""
        try:
            if not self._ended():
                return False
            self._running = self._next_stage()
        except TransferError as error:
            self._running = None
            self.error = self.error or error
        return True

    def _next_stage(self) -> Running | None:
        """What was started behind the stage that has ended; None where it was the last, and is settled."""
        then, self._then = self._then, None
        if then is not None and self.error is None:
            return then()
        if self.error is None:
            self._damages = self._settle()
            if self._damages:
                self._damage = self._mover.quarantine.report(self._damages)
        return None

    def _damaged_ids(self) -> Ids:
        return as_ids([damage.page for damage in self._damages or ()])

    def _ended(self) -> bool:
        running = self._running
        assert running is not None
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
        sums: PageSums,
    ) -> None:
        self.table = table
        self.sums = sums
        self.quarantine = Quarantine(table, sums, names, store)
        self.meter = Meter()
        self.poison: Poison | None = None
        self.to_host = device.new_stream()
        self.to_device = device.new_stream()
        self.checks = device.new_stream()
        self.leaving = dict.fromkeys(Tier, 0)
        self._device = device
        self._layout = layout
        self._in_flight = in_flight
        self._pools = pools
        self._store = store
        self._names = names
        self._lanes = make_lanes(device, layout, staging_pages) if store else {}

    def watch(self, poison: Poison) -> None:
        """Find stray writes to staging from now on, for debugging."""
        self.poison = poison
        for lane in self._lanes.values():
            lane.watch(poison, self._device)

    @property
    def copy_timeout_s(self) -> float:
        """Deadline of a copy."""
        return self._device.copy_timeout_s

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
        self._check_store(src, dst)
        self.table.pin(ids, src)  # R2; and R4, while staging slots are waited for
        if {src, dst} == {Tier.GPU, Tier.SSD}:
            return self._submit_staged(ids, src, dst)
        return [self._start(ids, src, dst, partial(self._start_direct, ids, src, dst), _nothing)]

    def finish_write_through(self, ids: Ids, checksums: NDArray[np.uint64]) -> None:
        """Every slice of these pages, FILLING on the SSD, was written: write their trailers and wait."""
        slots = self.table.slots(ids, Tier.SSD)
        self._cold.finish_slices(slots, self._names.names_of(ids), checksums)

    def most_without_waiting(self, src: Tier, dst: Tier) -> int | None:
        """How many pages `submit` would start without waiting for staging slots; None for any number."""
        if {src, dst} != {Tier.GPU, Tier.SSD}:
            return None
        return len(self._lanes[src].free)

    def allows(self, use: Use) -> bool:
        """Whether the SSD tier may be used so; where there is none, whatever it is asked."""
        return self._store is None or self._store.breaker.allows(use)

    def check(self, use: Use) -> None:
        """Raise TransferError where the SSD tier is switched off for that use."""
        if self._store is not None:
            self._store.breaker.check(use)

    def has_no_late_io(self) -> bool:
        """Whether no read or write of the SSD tier is past its deadline and still running."""
        return self._store is None or self._store.num_late == 0

    def probe(self) -> None:
        """Try the SSD tier again, where it is switched off and it is time; never waits."""
        if self._store is not None and self._store.is_probe_due():
            start_probe(self._store, self.table, self._in_flight)

    def note_end(self, transfer: Transfer, num_pages: int) -> None:
        """`transfer` was settled after moving `num_pages` pages."""
        self.leaving[transfer.src] -= len(transfer.ids)
        self.meter.end(transfer.src, transfer.dst, num_pages * self._layout.page_bytes)

    def note_full(self) -> None:
        """The SSD had no space for a page."""
        self._cold.guard.note_full()

    def free(self) -> None:
        """Give the staging slots and the sums back; nothing may be in flight."""
        self.sums.free()
        for lane in self._lanes.values():
            lane.pool.free()

    # ---- one stage ---------------------------------------------------------------------------------

    def _start_direct(self, ids: Ids, src: Tier, dst: Tier, slots: Slots) -> Stages:
        there = self.table.slots(ids, src)
        if dst == Tier.SSD:
            addresses = self._pools[src].addresses(there)
            return self._start_write(ids, slots, addresses, self.sums.of(src, there))
        target = self._pools[dst].addresses(slots)
        if src == Tier.SSD:
            reading = self._cold.read(there, target)
            return Stages(reading, None, partial(self._settle_read, reading, ids, dst, slots))
        source = self._pools[src].addresses(there)
        if dst == Tier.GPU:
            rows, sums = self.sums.rows(src, there), self.sums.of(src, there)
            return self._start_checked(source, ids, src, there, slots, rows, sums)
        copied = self._copy(target, source, src)

        def settle() -> list[Damage]:
            self.sums.put(dst, slots, self.sums.of(src, there))
            return []

        return Stages(copied, None, settle)

    def _settle_read(
        self, reading: StoreTransfer, ids: Ids, dst: Tier, slots: Slots
    ) -> list[Damage]:
        """Pages that came from the SSD have the sums of their trailers."""
        damages = self._damages_of(reading, ids)
        self.sums.put(dst, slots, reading.sums)
        return damages

    def _damages_of(self, reading: StoreTransfer, ids: Ids) -> list[Damage]:
        bad = np.flatnonzero(~self._cold.verify(reading))
        return [Damage(Tier.SSD, int(ids[i]), int(reading.slots[i]), None) for i in bad]

    def _start_checked(
        self,
        source: Addresses,
        ids: Ids,
        src: Tier,
        there: Slots,
        slots: Slots,
        rows: Addresses,
        sums: Sums,
    ) -> Stages:
        """Copy pages to `slots` of the hot tier, and compare them there with `sums`, which lie in `rows`.

        The comparisons run on a stream of their own, beside the next copies. `src` and `there` are for reports.
        """
        tiers = np.full(len(ids), src, dtype=np.int64)
        target = self._pools[Tier.GPU].addresses(slots)
        check = self.sums.check(target, rows, ids, tiers, there, sums)
        copied = self._copy(target, source, Tier.RAM)

        def settle() -> list[Damage]:
            self.sums.put(Tier.GPU, slots, sums)
            return check.damages()

        try:
            self.checks.wait_event(copied)
            self.sums.verify(check, self.sums.every_layer, self.checks)
            return Stages(self.checks.record(), None, settle)
        except (
            TransferError
        ) as error:  # the copy goes on: until it has ended, the slots are not given back
            return Stages(copied, None, partial(self._fail_checked, check, error))

    def _fail_checked(self, check: Check, error: TransferError) -> list[Damage]:  # noqa: ARG002
        """Pages could not be compared: raises `error`, once nothing can use the `check` any more."""
        self.checks.synchronize()
        raise error

    def _start_write(self, ids: Ids, slots: Slots, addresses: Addresses, sums: Sums) -> Stages:
        names = self._names.names_of(ids)
        writing = self._cold.write(slots, addresses, names, sums)

        def publish() -> list[Damage]:
            # The page may have been renamed or dropped meanwhile: only a name that is in the trailer
            # and still stands enters the index.
            now = self._names.names_of(ids)
            same = [name if name == then else None for name, then in zip(now, names, strict=True)]
            self._cold.index.publish(slots, same)
            return []

        return Stages(writing, None, publish)

    # ---- two stages, through staging ---------------------------------------------------------------

    def _submit_staged(self, ids: Ids, src: Tier, dst: Tier) -> list[Transfer]:
        lane = self._lanes[src]
        started: list[Transfer] = []
        while len(ids):
            try:
                while not lane.free:
                    self._in_flight.wait_any()
                self._check_store(src, dst)
            except TransferError:
                self.table.unpin(ids, src)
                raise
            now, ids = ids[: len(lane.free)], ids[len(lane.free) :]
            staged = lane.take(len(now))
            begin = partial(self._start_staged, now, src, lane.pool.addresses(staged))
            try:
                started.append(self._start(now, src, dst, begin, partial(lane.give_back, staged)))
            except TransferError:
                self.table.unpin(ids, src)
                raise
        return started

    def _start_staged(self, ids: Ids, src: Tier, buffers: Addresses, slots: Slots) -> Stages:
        there = self.table.slots(ids, src)
        if src == Tier.GPU:
            writes: list[Stages] = []

            def write() -> Running:
                # The sums were born before the copy that has ended.
                writes.append(self._start_write(ids, slots, buffers, self.sums.of(src, there)))
                return writes[0].running

            def publish() -> list[Damage]:
                return writes[0].settle()

            return Stages(self._copy(buffers, self._addresses(ids, src), src), write, publish)
        reading = self._cold.read(there, buffers)
        damaged: list[list[Damage]] = []
        uploads: list[Stages] = []

        def upload() -> Running:
            damaged.append(self._damages_of(reading, ids))
            sums, rows = self.sums.new_rows(len(ids))
            sums[:] = reading.sums
            # What the SSD gave was right where the CPU looked at it, in pinned RAM.
            uploads.append(self._start_checked(buffers, ids, Tier.RAM, there, slots, rows, sums))
            return uploads[0].running

        def settle() -> list[Damage]:
            known = {damage.page for damage in damaged[0]}
            found = uploads[0].settle()
            return damaged[0] + [damage for damage in found if damage.page not in known]

        return Stages(reading, upload, settle)

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
        return self._recorded(stream)

    def _recorded(self, stream: Stream) -> Event:
        """The event behind a copy that was just given to `stream`; where there is none the copy has ended."""
        try:
            return stream.record()
        except TransferError:
            stream.synchronize()
            raise

    def _check_store(self, src: Tier, dst: Tier) -> None:
        """Fail at once where the SSD tier is switched off."""
        if dst == Tier.SSD:
            self.check(Use.WRITE)
        elif src == Tier.SSD:
            self.check(Use.READ)

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
        self,
        running: Running,
        then: Callable[[], Running] | None,
        settle: Callable[[], list[Damage]],
    ) -> None:
        self.running = running
        self.then = then
        self.settle = settle


def _nothing() -> None:
    return None
