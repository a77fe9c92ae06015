"""Lanes: staging slots in pinned memory for pages between GPU and SSD."""

from __future__ import annotations

import numpy as np

from tiermem.device.protocol import Device
from tiermem.layout import PageLayout
from tiermem.pools import SlotPool, Slots, Tier


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


def make_lanes(device: Device, layout: PageLayout, pages: int) -> dict[Tier, Lane]:
    """One lane for each tier that pages may come from."""
    size = layout.slot_bytes * pages
    return {
        src: Lane(SlotPool(device.allocate_host(size), layout.slot_bytes, pages))
        for src in (Tier.GPU, Tier.SSD)
    }
