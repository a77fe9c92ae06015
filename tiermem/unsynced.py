"""UnsyncedSlots: which slots were written since the last sync, and which of them a sync that failed left in doubt.

Linux tells once that what was written did not reach the disk. After that it counts as written, and the next sync
succeeds though it is lost. So whatever was written between a sync that succeeded and one that failed is in doubt
until it was written again and a later sync has covered that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.store_transfer import Int64s, StoreTransfer

_WRITTEN, _WHOLE = 1, 2
"""Written since the sync that began last; and all of it at once, since the last failure."""
_SYNCING, _SYNCING_WHOLE = 4, 8
"""The same, before the sync that runs."""
_DOUBTFUL = 16
_DAMAGED = 32
"""In doubt, and not what was written when it was read to be written again."""
LOOK_WRITES = 16
"""Writes that were not seen to end are looked at when there are twice as many as last time, and so many more."""


@dataclass(slots=True)
class _Write:
    """A write that was not seen to end."""

    transfer: StoreTransfer
    slots: Int64s
    is_whole: bool


class UnsyncedSlots:
    """Of one slot file. Single-threaded: where a sync runs in another thread, this one notes its begin and end."""

    def __init__(self, num_slots: int) -> None:
        self._flags = np.zeros(num_slots, dtype=np.uint8)
        self._writes: list[_Write] = []
        self._most_writes = LOOK_WRITES

    def note_write(self, transfer: StoreTransfer, slots: Int64s, *, is_whole: bool) -> None:
        """`transfer` writes to `slots`; `is_whole`: page and trailer, so that nothing older counts any more."""
        if len(self._writes) >= self._most_writes:
            self._note_ended()
        self._writes.append(_Write(transfer, slots, is_whole))
        self._flags[slots] &= 0xFF ^ _DAMAGED

    def note_damaged(self, slots: Int64s) -> None:
        """What is in these slots was read to be written again, and was not what was written there."""
        self._flags[slots] |= _DAMAGED

    def begin_sync(self) -> None:
        """A sync begins: it covers the writes that have ended."""
        self._note_ended()
        flags = self._flags
        flags |= (flags & (_WRITTEN | _WHOLE)) << 2
        flags &= 0xFF ^ (_WRITTEN | _WHOLE)

    def end_sync(self, *, is_good: bool) -> None:
        """The sync that began last is over."""
        self._note_ended()
        flags = self._flags
        if is_good:
            flags[flags & _SYNCING_WHOLE != 0] &= 0xFF ^ _DOUBTFUL
            flags &= 0xFF ^ (_SYNCING | _SYNCING_WHOLE)
            return
        flags[flags & (_WRITTEN | _SYNCING) != 0] |= _DOUBTFUL
        flags &= _DOUBTFUL | _DAMAGED
        for write in self._writes:  # it may have been lost as well, whenever it ends
            flags[write.slots] |= _DOUBTFUL
            write.is_whole = False

    def to_write_again(self) -> Int64s:
        """Slots in doubt that were neither written again since the last failure nor found damaged."""
        self._note_ended()
        done = _WHOLE | _SYNCING_WHOLE | _DAMAGED
        slots: Int64s = np.flatnonzero(self._flags & (_DOUBTFUL | done) == _DOUBTFUL)
        return slots

    def are_damaged(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of `slots` were found damaged, and not written since."""
        damaged: NDArray[np.bool_] = self._flags[slots] & _DAMAGED != 0
        return damaged

    def _note_ended(self) -> None:
        for write in self._writes:
            if write.transfer.has_ended:
                is_whole = write.is_whole and write.transfer.has_succeeded
                self._flags[write.slots] |= _WRITTEN | (_WHOLE if is_whole else 0)
        self._writes = [write for write in self._writes if not write.transfer.has_ended]
        self._most_writes = 2 * len(self._writes) + LOOK_WRITES
