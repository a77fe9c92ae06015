"""Ring: layer slices of pages that are not hot, brought to the device chunk by chunk.

A small piece of hot memory beyond the pool, cut into two halves, so that one is filled while the other is read.
Every use of a half waits, on the device, for the uses before it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch

from tiermem import _core
from tiermem.attention.pool_view import TORCH_DTYPES, PoolView, SlotHolds
from tiermem.device.protocol import Device, Direction, Event, Memory, Slices
from tiermem.errors import DeadlineError, TransferError
from tiermem.layout import SLOT_ALIGN_BYTES, PageLayout, round_up
from tiermem.mover import Mover
from tiermem.page_sums import Check, Damage, Sums
from tiermem.pools import Addresses, Ids, SlotPool, Slots, Tier
from tiermem.store import ColdStore, StoreTransfer
from tiermem.trace import traced

NUM_HALVES = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """Slices of pages in one tier: where those of layer 0 lie, and the ring's slots that they are copied to."""

    tier: Tier
    direction: Direction
    target: Addresses
    source: Addresses


@dataclass(frozen=True, slots=True, eq=False)
class _ColdSlices:
    """Slices of pages on the SSD: their slots there, and in the ring; `sums` get those of each layer read."""

    ids: Ids
    slots: Slots
    ring_slots: Slots
    sums: Sums


@dataclass(frozen=True, slots=True, eq=False)
class SliceLoad:
    """Pages whose slices are brought to the first slots of a half, one layer at a time.

    Worked out once for all layers: the pages must be pinned in their tiers as long as it is used.
    """

    half: int
    copies: tuple[_Copies, ...]
    cold: _ColdSlices | None
    check: Check
    """Of the pages that are sealed: others have no sums."""


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """Slices of one layer on their way from the SSD to the buffers of a half."""

    load: SliceLoad
    layer: int
    transfer: StoreTransfer


@dataclass(slots=True, eq=False)
class _Half:
    """What one half of the ring has, or is being filled with.

    users: what has to end before it is filled again. load, layer: what was started last, if it is still there;
    loaded: when it is. is_waiting: it was not used yet. ahead: reads from the SSD that were started for it;
    drained: when the buffers of those before are free.
    """

    users: list[Event] = field(default_factory=list)
    load: SliceLoad | None = None
    layer: int = 0
    loaded: Event | None = None
    is_waiting: bool = False
    ahead: _Read | None = None
    drained: Event | None = None

    def holds(self, load: SliceLoad, layer: int) -> bool:
        """Whether the slices of `load` are there, or on their way."""
        return self.load is load and self.layer == layer

    def given_to(self, *users: Event) -> None:
        """Something else than a load has it now, until `users`."""
        self.load, self.loaded, self.is_waiting = None, None, False
        self.users = list(users)


class Ring:
    """Staging for slices: `chunk_pages` slices in each half, on the device and, with a store, in pinned RAM.

    Loads may be started ahead of their use, one a half. Reads from the SSD that were started ahead fill the
    buffers in pinned RAM of their half until they are loaded, or dropped.
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
        self._halves = [_Half() for _ in range(NUM_HALVES)]

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

    def plan(self, half: int, ids: Ids, tiers: Slots) -> SliceLoad:
        """How slices of the pages, each from a VALID copy in its tier, come to the first slots of `half`."""
        slots = self.slots_of(half, len(ids))
        there, rows = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.int64)
        from_tiers = tiers.copy()
        copies, cold = [], None
        for tier in Tier:
            chosen = np.flatnonzero(tiers == tier)
            if len(chosen) == 0:
                continue
            there[chosen] = self._table.slots(ids[chosen], tier)
            if tier == Tier.SSD:
                sums, rows[chosen] = self._mover.sums.new_rows(len(chosen))
                from_tiers[chosen] = Tier.RAM  # what was read is right where it lies in pinned RAM
                cold = _ColdSlices(ids[chosen], there[chosen], slots[chosen], sums)
                continue
            rows[chosen] = self._mover.sums.rows(tier, there[chosen])
            direction = Direction.DEVICE_TO_DEVICE if tier == Tier.GPU else Direction.HOST_TO_DEVICE
            target = self._ring.addresses(slots[chosen])
            source = self._pools[tier].addresses(there[chosen])
            copies.append(_Copies(tier, direction, target, source))
        sealed = self._table.is_sealed(ids)
        check = self._mover.sums.check(
            self._ring.addresses(slots[sealed]),
            rows[sealed],
            ids[sealed],
            from_tiers[sealed],
            there[sealed],
            None if cold is None else cold.sums,
        )
        return SliceLoad(half, tuple(copies), cold, check)

    @traced("stream slices in")
    def start(self, load: SliceLoad, layer: int) -> None:
        """Start bringing `layer` of its pages to its half, if it is not there; returns before the copies have run.

        Waits for what comes from the SSD, which `read_ahead` starts earlier.

        Raises
        ------
        CorruptPageError: a slice read from the SSD is not what was written there.
        TransferError: a copy or read failed.
        """
        half = self._halves[load.half]
        if half.holds(load, layer):
            return
        offset = layer * self._layout.layer_bytes
        half.load = None
        stream = self._mover.to_device
        for event in half.users:
            stream.wait_event(event)
        for copies in load.copies:
            self._copy_in(copies.direction, copies.target, copies.source + offset)
            if copies.tier != Tier.GPU:
                self._note(copies.tier, Tier.GPU, len(copies.target))
        if load.cold is not None:
            source = self._read(load, load.cold, layer)
            target = self._ring.addresses(load.cold.ring_slots)
            self._copy_in(Direction.HOST_TO_DEVICE, target, source)
            self._note(Tier.SSD, Tier.GPU, len(target))
        half.loaded = stream.record()
        half.users = [half.loaded]
        if load.cold is not None:
            half.drained = half.loaded
        half.load, half.layer, half.is_waiting = load, layer, True

    def begin_use(self, load: SliceLoad, layer: int) -> None:
        """As `start`; the compute stream waits for the copies and compares the slices with their sums.

        What it finds is in the load's `check`, for whoever has seen it done.
        """
        self.start(load, layer)
        loaded = self._halves[load.half].loaded
        assert loaded is not None
        compute = self._device.compute_stream()
        compute.wait_event(loaded)
        loaded.done()  # raises if it is known by now to have failed
        self._mover.sums.verify(load.check, range(layer, layer + 1), compute)

    def load(self, half: int, layer: int, ids: Ids, tiers: Slots) -> Check:
        """`begin_use` of pages that are wanted once."""
        load = self.plan(half, ids, tiers)
        self.begin_use(load, layer)
        return load.check

    def holds(self, load: SliceLoad, layer: int) -> bool:
        """Whether `start` would have nothing to do."""
        return self._halves[load.half].holds(load, layer)

    def is_waiting(self, half: int) -> bool:
        """Whether `half` has, or is to get, slices that nothing has used yet."""
        return self._halves[half].is_waiting

    def read_ahead(self, load: SliceLoad, layer: int) -> None:
        """Start reading what `start` will take from the SSD, unless something is being read ahead for that half.

        Waits until earlier copies have left the half's buffers.
        """
        if load.cold is not None and self._halves[load.half].ahead is None:
            self._halves[load.half].ahead = self._start_read(load, load.cold, layer)

    def drop_ahead(self) -> None:
        """Forget what was started and not used: wait for reads, whether they failed or not.

        The compute stream waits for copies, which read pages that stay pinned until it has ended the step (R2).
        """
        for number, half in enumerate(self._halves):
            if half.is_waiting and half.loaded is not None:
                self._device.compute_stream().wait_event(half.loaded)
            half.load, half.is_waiting = None, False
            self._drop(number)

    def copy_out(self, half: int, target: Addresses) -> Event:
        """Copy the first slices of `half`, just loaded, to hot memory at `target`; the event behind it."""
        stream = self._mover.to_device
        source = self._ring.addresses(self.slots_of(half, len(target)))
        self._device.copy(
            Direction.DEVICE_TO_DEVICE, target, source, self._layout.layer_bytes, stream
        )
        copied = stream.record()
        # The slices are still compared where they lie: what comes next waits for that too.
        self._halves[half].given_to(copied, self._device.compute_stream().record())
        return copied

    def begin_write(self, half: int) -> None:
        """The compute stream is about to write `half` itself: it waits for the uses before."""
        compute = self._device.compute_stream()
        for event in self._halves[half].users:
            compute.wait_event(event)
        self._halves[half].given_to(*self._halves[half].users)

    def end_use(self, half: int) -> None:
        """What the compute stream was given so far was the last to use `half`."""
        self._halves[half].users = [self._device.compute_stream().record()]
        self._halves[half].is_waiting = False

    def slices_of(self, half: int, rows: Addresses) -> Slices:
        """The first slices of `half`, to be summed into `rows`, for `save` and `save_cold`."""
        pages = self._ring.addresses(self.slots_of(half, len(rows)))
        return self._mover.sums.of_slices(pages, rows)

    @traced("stream slices out")
    def save(self, half: int, slices: Slices, layer: int, dst: Slots) -> Event:
        """Copy `slices` of `half`, as the compute stream leaves them, into RAM slots `dst`, and sum them.

        Returns the event behind the copy: done, or the error, before the slots may become VALID.
        """
        self._mover.sums.begin_layer(slices, layer)
        target = self._pools[Tier.RAM].addresses(dst, layer * self._layout.layer_bytes)
        event = self._save_to(half, target)
        self._halves[half].given_to(event)
        self._note(Tier.GPU, Tier.RAM, len(dst))
        return event

    @traced("stream slices out")
    def save_cold(self, half: int, slices: Slices, layer: int, dst: Slots) -> None:
        """Write them to SSD slots `dst` and wait, and sum them."""
        assert self._host is not None and self._store is not None
        self._drop(half)
        self._mover.sums.begin_layer(slices, layer)
        buffers = self._host.addresses(self.slots_of(half, len(dst)))
        event = self._save_to(half, buffers)
        self._halves[half].drained = event  # where it is late, nothing else comes to the buffers
        event.wait()
        self._halves[half].given_to()
        self._note(Tier.GPU, Tier.SSD, len(dst))
        self._store.write_slices(dst, layer, buffers)

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

    def _copy_in(self, direction: Direction, target: Addresses, source: Addresses) -> None:
        size = self._layout.layer_bytes
        self._device.copy(direction, target, source, size, self._mover.to_device)

    def _read(self, load: SliceLoad, cold: _ColdSlices, layer: int) -> Addresses:
        """Where the slices lie in pinned RAM once they were read and verified."""
        assert self._host is not None and self._store is not None
        half = self._halves[load.half]
        if half.ahead is not None and (half.ahead.load, half.ahead.layer) != (load, layer):
            self._drop(load.half)
        read = half.ahead or self._start_read(load, cold, layer)
        half.ahead = None
        read.transfer.complete()
        bad = np.flatnonzero(~self._store.verify(read.transfer))
        if len(bad):
            raise self._mover.quarantine.report(
                [Damage(Tier.SSD, int(cold.ids[i]), int(cold.slots[i]), layer) for i in bad]
            )
        cold.sums[:, layer] = self._store.layer_sums(cold.slots, layer)
        return self._host.addresses(cold.ring_slots)

    def _start_read(self, load: SliceLoad, cold: _ColdSlices, layer: int) -> _Read:
        """Into buffers of the half, once earlier copies have left them."""
        assert self._host is not None and self._store is not None
        drained = self._halves[load.half].drained
        if drained is not None:
            # Whether it failed was for its own step to find.
            try:
                drained.wait()
            except DeadlineError:
                raise  # the buffers are still in use
            except TransferError:
                pass
        buffers = self._host.addresses(cold.ring_slots)
        return _Read(load, layer, self._store.read_slices(cold.slots, layer, buffers))

    def _drop(self, half: int) -> None:
        read, self._halves[half].ahead = self._halves[half].ahead, None
        if read is not None:
            with contextlib.suppress(TransferError):
                read.transfer.complete()

    def _save_to(self, half: int, target: Addresses) -> Event:
        stream = self._mover.to_host
        stream.wait_event(self._device.compute_stream().record())
        source = self._ring.addresses(self.slots_of(half, len(target)))
        self._device.copy(
            Direction.DEVICE_TO_HOST, target, source, self._layout.layer_bytes, stream
        )
        return stream.record()
