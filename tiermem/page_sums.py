"""PageSums: the checksums of pages in memory, from where a page is sealed to where it is used.

They lie in rows beside the slots, one sum a layer, and mean something while the slot has a VALID copy of a sealed
page. They are born on the device that wrote the page and go from row to row with the page's copies, so that
whatever happens to the bytes on the way is found when they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem import _core
from tiermem.device.protocol import Device, Event, Slices, Stream
from tiermem.device.sums import new_zeros
from tiermem.errors import DeadlineError, TransferError
from tiermem.layout import PageLayout
from tiermem.pools import Addresses, Ids, SlotPool, Slots, Tier

SUM_BYTES = 8

Sums = NDArray[np.uint64]
"""(pages, layers)."""


@dataclass(frozen=True, slots=True, order=True)
class Damage:
    """A copy whose bytes are not those of the page; `layer` is one of those that differ, None where all were read
    together."""

    tier: Tier
    page: int
    slot: int
    layer: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """Pages that the device compares with their sums: where they came from, and what it found.

    It must be kept until the comparisons have ended. `sums` are those of pages that have no row beside a slot, in
    `new_rows`, which the device reads as long.
    """

    slices: Slices
    ids: Ids
    tiers: Slots
    slots: Slots
    sums: Sums | None = None

    def damages(self) -> list[Damage]:
        """What was found, once the comparisons were seen done."""
        marks = self.slices.marked()
        return [
            Damage(
                Tier(int(self.tiers[i])), int(self.ids[i]), int(self.slots[i]), int(marks[i]) - 1
            )
            for i in np.flatnonzero(marks)
        ]


class PageSums:
    """The sums of one manager's pages in GPU and RAM.

    `attended_a_layer`: how many of the pages that the CPU attends in RAM are compared in every layer, in rotation;
    None: all. `verifies` is for benchmarks alone: without it nothing is summed or compared on the device.
    """

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        table: _core.PageTable,
        pools: dict[Tier, SlotPool],
        attended_a_layer: int | None = 1,
    ) -> None:
        self.verifies = True
        self._attended_a_layer = attended_a_layer
        self._turn = 0
        self._device = device
        self._layout = layout
        self._table = table
        self._pools = pools
        row_bytes = layout.num_layers * SUM_BYTES
        self._rows = {
            tier: SlotPool(
                device.allocate_host(pool.num_slots * row_bytes), row_bytes, pool.num_slots
            )
            for tier, pool in pools.items()
        }
        self._sums = {
            tier: rows.memory.tensor.numpy().view(np.uint64).reshape(-1, layout.num_layers)
            for tier, rows in self._rows.items()
        }
        none = np.empty(0, dtype=np.int64)
        device.slices(none, none, layout.layer_bytes)  # loads what a step must not wait for

    @property
    def num_bytes(self) -> int:
        """Of pinned memory."""
        return sum(rows.memory.num_bytes for rows in self._rows.values())

    @property
    def every_layer(self) -> range:
        """Numbers of the layers."""
        return range(self._layout.num_layers)

    def free(self) -> None:
        """Give the memory back; nothing may be in flight."""
        self._sums.clear()
        for rows in self._rows.values():
            rows.free()

    # ---- rows --------------------------------------------------------------------------------------

    def of(self, tier: Tier, slots: Slots) -> Sums:
        """The sums of pages whose copies in GPU or RAM the host has seen done; a copy."""
        return self._sums[tier][slots]

    def put(self, tier: Tier, slots: Slots, sums: Sums) -> None:
        """Pages came to these slots, whose sums are known."""
        self._sums[tier][slots] = sums

    def rows(self, tier: Tier, slots: Slots) -> Addresses:
        """Where the rows lie."""
        return self._rows[tier].addresses(slots)

    def new_rows(self, count: int) -> tuple[Sums, Addresses]:
        """Rows of no slot, which must be kept as long as a device uses them, and where they lie.

        Raises
        ------
        TransferError: there is no memory for them.
        """
        pinned = self._device.torch_device.type == "cuda"
        rows = new_zeros((count, self._layout.num_layers), torch.int64, pinned=pinned)
        addresses = rows.data_ptr() + np.arange(count, dtype=np.int64) * rows.stride(0) * SUM_BYTES
        return rows.numpy().view(np.uint64), addresses

    # ---- birth -------------------------------------------------------------------------------------

    def begin(self, ids: Ids) -> Slices | None:
        """Sum pages that were sealed in the hot tier, in the order of the compute stream.

        What is returned must be kept, and the copies pinned, until the stream has come so far.
        """
        if len(ids) == 0 or not self.verifies:
            return None
        slots = self._table.slots(ids, Tier.GPU)
        slices = self._device.slices(
            self._pools[Tier.GPU].addresses(slots),
            self.rows(Tier.GPU, slots),
            self._layout.layer_bytes,
        )
        self._device.sum_slices(slices, self.every_layer, self._device.compute_stream())
        return slices

    def of_slices(self, pages: Addresses, rows: Addresses) -> Slices:
        """Slices of one layer of pages that are being filled, for `begin_layer`."""
        return self._device.slices(pages, rows, self._layout.layer_bytes)

    def begin_layer(self, slices: Slices, layer: int) -> None:
        """Sum the slices of one layer, in the order of the compute stream."""
        self._device.sum_slices(slices, range(layer, layer + 1), self._device.compute_stream())

    # ---- use ---------------------------------------------------------------------------------------

    def check(
        self,
        pages: Addresses,
        rows: Addresses,
        ids: Ids,
        tiers: Slots,
        slots: Slots,
        sums: Sums | None = None,
    ) -> Check:
        """What `verify` takes, of pages that come to hot memory at `pages` from `slots` of their `tiers`.

        `sums`: where `rows`, or some of them, are `new_rows`.
        """
        slices = self._device.slices(pages, rows, self._layout.layer_bytes)
        return Check(slices, ids, tiers, slots, sums)

    def verify(self, check: Check, layers: range, stream: Stream) -> None:
        """Compare consecutive slices of every page with its sums at `layers`, in the order of `stream`."""
        if self.verifies:
            self._device.verify_slices(check.slices, layers, stream)

    def verify_attended(self, ids: Ids, layer: int) -> list[Damage]:
        """Compare slices of `layer` of pages that are attended in RAM: the ones whose turn it is, or all."""
        if not self.verifies:
            return []
        if self._attended_a_layer is not None and len(ids):
            if layer == 0:
                self._turn += self._attended_a_layer
            # Other pages in every layer of a step, and in every step of a layer.
            turns = self._turn + layer + np.arange(min(self._attended_a_layer, len(ids)))
            ids = ids[turns % len(ids)]
        return self.verify_in_ram(ids, [layer])

    def verify_in_ram(self, ids: Ids, layers: Iterable[int]) -> list[Damage]:
        """Compare slices where they lie in RAM, by the calling thread."""
        slots = self._table.slots(ids, Tier.RAM)
        found = []
        for layer in layers:
            offset = layer * self._layout.layer_bytes
            addresses = self._pools[Tier.RAM].addresses(slots, offset)
            sums = _core.checksum_pages(addresses, self._layout.layer_bytes, 1)[:, 0]
            wrong = np.flatnonzero(sums != self._sums[Tier.RAM][slots, layer])
            found += [Damage(Tier.RAM, int(ids[i]), int(slots[i]), layer) for i in wrong]
        return found


class SumWork:
    """Pages that were sealed between steps, in flight until they are summed; holds them in the hot tier."""

    def __init__(self, table: _core.PageTable, ids: Ids, slices: Slices, event: Event) -> None:
        table.pin(ids, Tier.GPU)
        self._table = table
        self._ids = ids
        self._slices = slices
        self._event = event

    def poll(self) -> bool:
        """Whether the device has summed them."""
        return self._event.done()

    def wait(self) -> None:
        """Block until it has."""
        self._event.wait()

    def held(self) -> TransferError | None:
        """Nobody counts on it."""
        return None

    def is_late(self) -> bool:
        """Whether the device should have ended it."""
        return self._event.is_late()

    def expire(self) -> DeadlineError:
        """It keeps its pins until it has ended."""
        return DeadlineError(f"{len(self._ids)} sealed pages were not summed by the deadline")

    def finish(self) -> None:
        """Release the pins (R1)."""
        self._table.unpin(self._ids, Tier.GPU)

    def fail(self, error: TransferError) -> None:  # noqa: ARG002 - logged by the list
        """The device failed; the bookkeeping goes on."""
        self.finish()
