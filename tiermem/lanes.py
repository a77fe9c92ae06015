"""Lanes: staging slots in pinned memory for pages between GPU and SSD."""

from __future__ import annotations

import numpy as np

from tiermem.device.protocol import Device
from tiermem.layout import PageLayout
from tiermem.poison import Poison, PoolSlots
from tiermem.pools import SlotPool, Slots, Tier


class Lane:
    """Staging slots of one direction, in pinned memory: reserved, so that neither direction starves."""

    def __init__(self, pool: SlotPool, name: str) -> None:
        self.pool = pool
        self.name = name
        self.free = list(range(pool.num_slots))
        self._poison: Poison | None = None

    def watch(self, poison: Poison, device: Device) -> None:
        """Tell `poison` of every slot that is taken and given back."""
        poison.watch(self.name, PoolSlots(self.pool, device))
        poison.note_free(self.name, self.free)
        self._poison = poison

    def take(self, count: int) -> Slots:
        """`count` free slots."""
        taken = [self.free.pop() for _ in range(count)]
        if self._poison is not None:
            self._poison.note_taken(self.name, taken)
        return np.array(taken, dtype=np.int64)

    def give_back(self, slots: Slots) -> None:
        """The transfer that used `slots` has ended."""
        if self._poison is not None:
            self._poison.note_free(self.name, slots.tolist())
        self.free.extend(int(slot) for slot in slots)


def make_lanes(device: Device, layout: PageLayout, pages: int) -> dict[Tier, Lane]:
    """One lane for each tier that pages may come from."""
    size = layout.slot_bytes * pages
    return {
        src: Lane(
            SlotPool(device.allocate_host(size), layout.slot_bytes, pages),
            f"staging for what comes from {src.name}",
        )
        for src in (Tier.GPU, Tier.SSD)
    }
