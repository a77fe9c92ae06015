"""Routes: how pages get from one tier to another, and what is compared on the way."""

from __future__ import annotations

from functools import partial

import numpy as np

from tiermem import _core
from tiermem.device.protocol import Device, Direction, Event, Stream
from tiermem.errors import TransferError
from tiermem.layout import PageLayout
from tiermem.page_sums import Check, Damage, PageSums, Sums
from tiermem.pools import Addresses, Ids, SlotPool, Slots, Tier
from tiermem.quarantine import Names
from tiermem.store import ColdStore, StoreTransfer
from tiermem.transfer import Running, Stages


class Routes:
    """Starts copies between the tiers of one manager; who asks for them holds the pages and the slots.

    Owns the copy streams: one for each direction of the link, and `checks`, on which pages are compared beside
    the next copies. TransferError: the device or the I/O engine refused; nothing uses the slots then.
    """

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        table: _core.PageTable,
        pools: dict[Tier, SlotPool],
        store: ColdStore | None,
        names: Names,
        sums: PageSums,
    ) -> None:
        self.to_host = device.new_stream()
        self.to_device = device.new_stream()
        self.checks = device.new_stream()
        self._device = device
        self._layout = layout
        self._table = table
        self._pools = pools
        self._store = store
        self._names = names
        self._sums = sums

    def start_direct(self, ids: Ids, src: Tier, dst: Tier, slots: Slots) -> Stages:
        """Copy pages from `src` to `slots` of `dst`, which is next to it."""
        there = self._table.slots(ids, src)
        if dst == Tier.SSD:
            addresses = self._pools[src].addresses(there)
            return self._start_write(ids, slots, addresses, self._sums.of(src, there))
        target = self._pools[dst].addresses(slots)
        if src == Tier.SSD:
            reading = self._cold.read(there, target)
            return Stages(reading, None, partial(self._settle_read, reading, ids, dst, slots))
        source = self._pools[src].addresses(there)
        if dst == Tier.GPU:
            rows, sums = self._sums.rows(src, there), self._sums.of(src, there)
            return self._start_checked(source, ids, src, there, slots, rows, sums)
        copied = self._copy(target, source, src)

        def settle() -> list[Damage]:
            self._sums.put(dst, slots, self._sums.of(src, there))
            return []

        return Stages(copied, None, settle)

    def start_staged(self, ids: Ids, src: Tier, buffers: Addresses, slots: Slots) -> Stages:
        """Copy pages between GPU and SSD in two stages: to pinned memory at `buffers`, then to `slots`."""
        there = self._table.slots(ids, src)
        if src == Tier.GPU:
            writes: list[Stages] = []

            def write() -> Running:
                # The sums were born before the copy that has ended.
                writes.append(self._start_write(ids, slots, buffers, self._sums.of(src, there)))
                return writes[0].running

            def publish() -> list[Damage]:
                return writes[0].settle()

            return Stages(self._copy(buffers, self._addresses(ids, src), src), write, publish)
        reading = self._cold.read(there, buffers)
        damaged: list[list[Damage]] = []
        uploads: list[Stages] = []

        def upload() -> Running:
            damaged.append(self._damages_of(reading, ids))
            sums, rows = self._sums.new_rows(len(ids))
            sums[:] = reading.sums
            # What the SSD gave was right where the CPU looked at it, in pinned RAM.
            uploads.append(self._start_checked(buffers, ids, Tier.RAM, there, slots, rows, sums))
            return uploads[0].running

        def settle() -> list[Damage]:
            known = {damage.page for damage in damaged[0]}
            found = uploads[0].settle()
            return damaged[0] + [damage for damage in found if damage.page not in known]

        return Stages(reading, upload, settle)

    # ---- parts -------------------------------------------------------------------------------------

    def _settle_read(
        self, reading: StoreTransfer, ids: Ids, dst: Tier, slots: Slots
    ) -> list[Damage]:
        """Pages that came from the SSD have the sums of their trailers."""
        damages = self._damages_of(reading, ids)
        self._sums.put(dst, slots, reading.sums)
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
        check = self._sums.check(target, rows, ids, tiers, there, sums)
        copied = self._copy(target, source, Tier.RAM)

        def settle() -> list[Damage]:
            self._sums.put(Tier.GPU, slots, sums)
            return check.damages()

        try:
            self.checks.wait_event(copied)
            self._sums.verify(check, self._sums.every_layer, self.checks)
            return Stages(self.checks.record(), None, settle)
        except TransferError as error:
            # the copy goes on: until it has ended, the slots are not given back
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

    @property
    def _cold(self) -> ColdStore:
        assert self._store is not None
        return self._store

    def _addresses(self, ids: Ids, tier: Tier) -> Addresses:
        return self._pools[tier].addresses(self._table.slots(ids, tier))

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
