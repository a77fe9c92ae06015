"""Ring: layer slices of pages that are not hot, brought to the device chunk by chunk.

A small piece of hot memory beyond the pool, cut into two halves, so that one is filled while the other is read.
Every use of a half waits, on the device, for the uses before it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from tiermem import _core
from tiermem.attention.pool_view import TORCH_DTYPES, PoolView, SlotHolds
from tiermem.device.protocol import Device, Direction, Event, Memory, Stream
from tiermem.errors import CorruptPageError, TransferError
from tiermem.layout import SLOT_ALIGN_BYTES, PageLayout, round_up
from tiermem.pools import Addresses, Ids, SlotPool, Slots, Tier
from tiermem.store import ColdStore, StoreTransfer
from tiermem.trace import traced
from tiermem.transfer import Mover

NUM_HALVES = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """Slices on their way from the SSD to the first buffers of a half."""

    layer: int
    ids: Ids
    transfer: StoreTransfer

    def is_of(self, layer: int, ids: Ids) -> bool:
        """Whether it brings `layer` of the pages `ids`."""
        return self.layer == layer and np.array_equal(self.ids, ids)


class Ring:
    """Staging for slices: `chunk_pages` slices in each half, on the device and, with a store, in pinned RAM.

    Reads that were started ahead fill the buffers in pinned RAM of their half until they are loaded, or dropped.
    """

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        table: _core.PageTable,
        pools: dict[Tier, SlotPool],
        store: ColdStore | None,
        mover: Mover,
        chunk_pages: int,
    ) -> None:
        self.chunk_pages = chunk_pages
        self._device = device
        self._layout = layout
        self._table = table
        self._pools = pools
        self._store = store
        self._mover = mover
        num_slots = NUM_HALVES * chunk_pages
        slice_bytes = layout.layer_bytes
        ring_bytes = round_up(num_slots * slice_bytes, SLOT_ALIGN_BYTES)
        self._ring = SlotPool(device.allocate(ring_bytes), slice_bytes, num_slots)
        host_slice = round_up(slice_bytes, SLOT_ALIGN_BYTES)
        self._host = (
            SlotPool(device.allocate_host(num_slots * host_slice), host_slice, num_slots)
            if store
            else None
        )
        self.view = PoolView(
            self._ring.memory.tensor.view(TORCH_DTYPES[layout.dtype]),
            layout,
            layout.layer_items,
            num_slots,
            SlotHolds.ONE_LAYER,
        )
        self._users: list[list[Event]] = [[] for _ in range(NUM_HALVES)]
        self._ahead: dict[int, _Read] = {}

    @property
    def device_bytes(self) -> int:
        """Hot memory beyond the pool, bytes."""
        return self._ring.memory.num_bytes

    @property
    def staging(self) -> list[Memory]:
        """Pinned memory beyond the tiers."""
        return [self._host.memory] if self._host else []

    @property
    def host_bytes(self) -> int:
        """Pinned memory beyond the tiers, bytes."""
        return self._host.memory.num_bytes if self._host else 0

    def slots_of(self, half: int, count: int) -> Slots:
        """The first `count` slots of `half` in the ring."""
        return np.arange(half * self.chunk_pages, half * self.chunk_pages + count, dtype=np.int64)

    @traced("stream slices in")
    def load(self, half: int, layer: int, ids: Ids, tiers: Slots) -> None:
        """Bring `layer` of the pages, each from a VALID copy in its tier, to the first slots of `half`.

        The pages must be pinned there. Returns before the copies have run; the compute stream waits for them.

        Raises
        ------
        CorruptPageError: a slice read from the SSD is not what was written there.
        TransferError: a copy or read failed.
        """
        stream = self._mover.to_device
        self._wait_for_users(half, stream)
        slots = self.slots_of(half, len(ids))
        for tier in Tier:
            chosen = np.flatnonzero(tiers == tier)
            if len(chosen) == 0:
                continue
            target = self._ring.addresses(slots[chosen])
            source = self._source(half, layer, ids[chosen], tier, slots[chosen])
            direction = Direction.DEVICE_TO_DEVICE if tier == Tier.GPU else Direction.HOST_TO_DEVICE
            self._device.copy(direction, target, source, self._layout.layer_bytes, stream)
            if tier != Tier.GPU:
                self._note(tier, Tier.GPU, len(chosen))
        loaded = stream.record()
        self._users[half] = [loaded]
        self._device.compute_stream().wait_event(loaded)
        loaded.done()  # raises if it is known by now to have failed

    def read_ahead(self, half: int, layer: int, ids: Ids, tiers: Slots) -> None:
        """Start reading what `load` with the same arguments will take from the SSD; it must be pinned there.

        Waits until earlier copies have left the half's buffers.
        """
        chosen = np.flatnonzero(tiers == Tier.SSD)
        if len(chosen) == 0 or half in self._ahead:
            return
        slots = self._table.slots(ids[chosen], Tier.SSD)
        buffers = self._free_buffers(half, self.slots_of(half, len(ids))[chosen])
        self._ahead[half] = self._start_read(layer, ids[chosen], slots, buffers)

    def drop_ahead(self) -> None:
        """Wait for reads that nobody wanted after all; whether they failed does not matter."""
        for half in list(self._ahead):
            self._drop(half)

    def copy_out(self, half: int, target: Addresses) -> Event:
        """Copy the first slices of `half`, just loaded, to hot memory at `target`; the event behind it."""
        stream = self._mover.to_device
        source = self._ring.addresses(self.slots_of(half, len(target)))
        self._device.copy(
            Direction.DEVICE_TO_DEVICE, target, source, self._layout.layer_bytes, stream
        )
        copied = stream.record()
        self._users[half] = [copied]
        return copied

    def begin_use(self, half: int) -> None:
        """The compute stream is about to write `half` itself: it waits for the uses before."""
        self._wait_for_users(half, self._device.compute_stream())

    def end_use(self, half: int) -> None:
        """What the compute stream was given so far was the last to use `half`."""
        self._users[half] = [self._device.compute_stream().record()]

    @traced("stream slices out")
    def save(self, half: int, count: int, layer: int, dst: Slots) -> Event:
        """Copy the first `count` slices of `half`, as the compute stream leaves them, into RAM slots `dst`.

        Returns the event behind the copy: done, or the error, before the slots may become VALID.
        """
        event = self._save_to(
            half, count, self._pools[Tier.RAM].addresses(dst, layer * self._layout.layer_bytes)
        )
        self._users[half] = [event]
        self._note(Tier.GPU, Tier.RAM, count)
        return event

    @traced("stream slices out")
    def save_cold(self, half: int, count: int, layer: int, dst: Slots) -> np.ndarray:
        """Write them to SSD slots `dst` and wait; the slices' checksums (count,) uint64."""
        assert self._host is not None and self._store is not None
        self._drop(half)
        buffers = self._host.addresses(self.slots_of(half, count))
        event = self._save_to(half, count, buffers)
        event.wait()
        self._users[half] = []
        self._note(Tier.GPU, Tier.SSD, count)
        return self._store.write_slices(dst, layer, buffers)

    def read_tensor(self, half: int, count: int) -> torch.Tensor:
        """(count, 2, kv_heads, page_tokens, head_dim): a view of the first slices of `half`."""
        pages = self.view.layer_pages(0)
        return pages[half * self.chunk_pages : half * self.chunk_pages + count]

    def free(self) -> None:
        """Give the memory back; nothing may be in flight through it."""
        self._ring.free()
        if self._host:
            self._host.free()

    # ---- inside ------------------------------------------------------------------------------------

    def _note(self, src: Tier, dst: Tier, slices: int) -> None:
        self._mover.meter.stream(src, dst, slices * self._layout.layer_bytes)

    def _wait_for_users(self, half: int, stream: Stream) -> None:
        for event in self._users[half]:
            stream.wait_event(event)

    def _source(self, half: int, layer: int, ids: Ids, tier: Tier, ring_slots: Slots) -> Addresses:
        slots = self._table.slots(ids, tier)
        if tier != Tier.SSD:
            return self._pools[tier].addresses(slots, layer * self._layout.layer_bytes)
        assert self._host is not None and self._store is not None
        read = self._ahead.pop(half, None)
        if read is not None and not read.is_of(layer, ids):
            self._end(read)
            read = None
        if read is None:
            buffers = self._free_buffers(half, ring_slots)
            read = self._start_read(layer, ids, slots, buffers)
        read.transfer.wait()
        read.transfer.poll()
        good = self._store.verify(read.transfer)
        if not good.all():
            raise CorruptPageError(
                f"{int((~good).sum())} pages read from SSD are not what was written there; "
                f"they were not served",
                pages=tuple(int(page) for page in ids[~good]),
            )
        return self._host.addresses(ring_slots)

    def _free_buffers(self, half: int, ring_slots: Slots) -> Addresses:
        """Buffers of some slots of `half`, once earlier copies have left them."""
        assert self._host is not None
        for event in self._users[half]:
            # Whether one failed was for its own step to find.
            with contextlib.suppress(TransferError):
                event.wait()
        return self._host.addresses(ring_slots)

    def _start_read(self, layer: int, ids: Ids, slots: Slots, buffers: Addresses) -> _Read:
        assert self._store is not None
        return _Read(layer, ids, self._store.read_slices(slots, layer, buffers))

    def _drop(self, half: int) -> None:
        read = self._ahead.pop(half, None)
        if read is not None:
            self._end(read)

    def _end(self, read: _Read) -> None:
        with contextlib.suppress(TransferError):
            read.transfer.wait()

    def _save_to(self, half: int, count: int, target: Addresses) -> Event:
        stream = self._mover.to_host
        stream.wait_event(self._device.compute_stream().record())
        source = self._ring.addresses(self.slots_of(half, count))
        self._device.copy(
            Direction.DEVICE_TO_HOST, target, source, self._layout.layer_bytes, stream
        )
        return stream.record()
