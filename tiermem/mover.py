"""Mover: starts transfers between the tiers of one manager, and knows what is on its way.

Pages between GPU and SSD go through staging slots in pinned memory, so that a missing or full RAM tier stops
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.breaker import Use
from tiermem.device.protocol import Device, Memory
from tiermem.errors import TransferError
from tiermem.inflight import InFlight
from tiermem.lanes import make_lanes
from tiermem.layout import PageLayout
from tiermem.meter import Meter
from tiermem.page_sums import PageSums
from tiermem.poison import Poison
from tiermem.pools import Ids, SlotPool, Slots, Tier
from tiermem.probe import start_probe
from tiermem.quarantine import Names, Quarantine
from tiermem.routes import Routes
from tiermem.store import ColdStore
from tiermem.trace import traced
from tiermem.transfer import Stages, Transfer


class Mover:
    """Starts transfers between the tiers of one manager.

    Owns the staging slots, not the pools. The copy streams are those of its routes; slices that are streamed go
    there too. `submit` needs VALID sources and enough free slots in the destination; making that room is not its
    business.
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
        self._routes = Routes(device, layout, table, pools, store, names, sums)
        self.to_host = self._routes.to_host
        self.to_device = self._routes.to_device
        self.checks = self._routes.checks
        self.leaving = dict.fromkeys(Tier, 0)
        self._device = device
        self._page_bytes = layout.page_bytes
        self._in_flight = in_flight
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
        return [
            self._start(ids, src, dst, partial(self._routes.start_direct, ids, src, dst), _nothing)
        ]

    def finish_write_through(self, ids: Ids, checksums: NDArray[np.uint64]) -> None:
        """Every slice of these pages, FILLING on the SSD, was written: write their trailers and wait."""
        slots = self.table.slots(ids, Tier.SSD)
        assert self._store is not None
        self._store.finish_slices(slots, self._names.names_of(ids), checksums)

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
        self.meter.end(transfer.src, transfer.dst, num_pages * self._page_bytes)

    def note_full(self) -> None:
        """The SSD had no space for a page."""
        assert self._store is not None
        self._store.guard.note_full()

    def free(self) -> None:
        """Give the staging slots and the sums back; nothing may be in flight."""
        self.sums.free()
        for lane in self._lanes.values():
            lane.pool.free()

    # ---- inside ------------------------------------------------------------------------------------

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
            begin = partial(self._routes.start_staged, now, src, lane.pool.addresses(staged))
            try:
                started.append(self._start(now, src, dst, begin, partial(lane.give_back, staged)))
            except TransferError:
                self.table.unpin(ids, src)
                raise
        return started

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
        transfer = Transfer(self, ids, src, dst, stages, release)
        self.leaving[src] += len(ids)
        self.meter.begin(src, dst)
        self._in_flight.add(transfer)
        return transfer


def _nothing() -> None:
    return None
