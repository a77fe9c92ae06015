"""SlotPool: the memory of one tier in fixed slots, no policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem._core import NO_SLOT, Tier
from tiermem.device.protocol import Memory

__all__ = [
    "ABSENT",
    "FILLING",
    "NO_SLOT",
    "VALID",
    "Addresses",
    "Ids",
    "SlotPool",
    "Slots",
    "Tier",
    "as_ids",
]

Ids = NDArray[np.int64]
"""Page ids, one-dimensional."""
Slots = NDArray[np.int64]
"""Slots of one tier, one-dimensional; NO_SLOT where a page has no copy there."""
Addresses = NDArray[np.int64]

VALID = int(_core.CopyState.VALID)
ABSENT = int(_core.CopyState.ABSENT)
FILLING = int(_core.CopyState.FILLING)


class SlotPool:
    """The memory of one tier: `num_slots` slots of `slot_bytes` bytes each.

    Owns `memory` from construction to `free`. Address = base + slot x stride, in 64 bits.
    """

    def __init__(self, memory: Memory, slot_bytes: int, num_slots: int) -> None:
        if memory.num_bytes < slot_bytes * num_slots:
            raise ValueError(
                f"num_slots={num_slots}: {slot_bytes * num_slots} bytes do not fit into "
                f"the {memory.num_bytes} bytes given"
            )
        self.memory = memory
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots

    def addresses(self, slots: Slots, offset: int = 0) -> Addresses:
        """Byte address of `offset` within each of `slots`."""
        return self.memory.address + slots * self.slot_bytes + offset

    def free(self) -> None:
        """Give the memory back. Nothing may be in flight from or to it."""
        self.memory.free()


def as_ids(pages: object) -> Ids:
    """`pages` as the array that the page table takes."""
    return np.ascontiguousarray(pages, dtype=np.int64)
