"""Payload: makes the slots of an open store durable, and writes again what a sync that failed left in doubt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.disk_budget import DiskGuard
from tiermem.layout import PageLayout
from tiermem.slot_file import SlotFile, new_memory
from tiermem.slot_trailers import SlotTrailers
from tiermem.store_index import StoreIndex
from tiermem.store_transfer import Int64s, StoreTransfer, parts_of
from tiermem.vault import Vault


class Payload:
    """Of one store: pages and trailers, of which the index' entries tell.

    What is in doubt is written again before a commit begins, so that no entry is durable before its page; but for
    pages found damaged then, which the next flush drops.
    """

    def __init__(
        self,
        layout: PageLayout,
        file: SlotFile,
        trailers: SlotTrailers,
        index: StoreIndex,
        guard: DiskGuard,
        vault: Vault | None,
    ) -> None:
        self._layout = layout
        self._file = file
        self._trailers = trailers
        self._index = index
        self._guard = guard
        self._vault = vault

    # ---- syncing -----------------------------------------------------------------------------------

    def begin_sync(self) -> None:
        """A sync begins: it covers the writes that have ended."""
        self._file.unsynced.begin_sync()

    def sync(self) -> None:
        """Return when all that was written before `begin_sync` is durable; any thread may do it.

        Raises
        ------
        TransferError: the disk refuses.
        """
        self._file.sync()

    def end_sync(self, *, is_good: bool) -> None:
        """The sync that began last is over."""
        self._file.unsynced.end_sync(is_good=is_good)

    # ---- doubt -------------------------------------------------------------------------------------

    def write_again(self, most_parts: int | None = None) -> bool:
        """Write published pages in doubt to their slots once more, and wait; whether none is left.

        They are compared with their checksums first. What is damaged is left: see `are_damaged`.

        Raises
        ------
        TransferError: they cannot be read or written. DeadlineError: not in time.
        """
        slots = self._file.unsynced.to_write_again()
        slots = slots[self._index.is_published(slots)]
        for number, places in enumerate(parts_of(slots, self._layout.slot_bytes)):
            if number == most_parts:
                return False
            self._write_again(slots[places])
        return True

    def are_damaged(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of `slots` hold pages that were lost in a sync that failed."""
        return self._file.unsynced.are_damaged(slots)

    def _write_again(self, slots: Int64s) -> None:
        reading = self._file.new_own_pages(slots)
        self._file.read_pages(reading, np.arange(len(slots)))
        reading.complete()
        good = self._are_intact(reading)
        self._file.unsynced.note_damaged(slots[~good])
        kept = np.flatnonzero(good)
        if len(kept) == 0:
            return
        writing = self._file.new_pages(slots[kept], reading.addresses[kept])
        writing.memory = reading.memory
        writing.trailers[:] = reading.trailers[kept]
        self._guard.note_written(len(kept) * self._file.stride)
        self._file.write_pages(writing, np.arange(len(kept)), writing.addresses)
        writing.complete()

    def _are_intact(self, reading: StoreTransfer) -> NDArray[np.bool_]:
        """Which pages are the very bytes that were written; they stay as they are on the disk."""
        stored, same, seals = self._trailers.parse(reading.slots, reading.trailers)
        pages = reading.addresses
        if self._vault is not None:
            assert reading.memory is not None
            plain = new_memory(len(reading.memory), "pages to decrypt")
            plain[:] = memoryview(reading.memory)
            pages = np.frombuffer(plain, dtype=np.uint8).ctypes.data + (pages - pages[0])
            same = same & self._vault.decrypt_pages(seals, pages)
        found = _core.checksum_pages(pages, self._layout.layer_bytes, self._layout.num_layers)
        intact: NDArray[np.bool_] = same & (stored == found).all(axis=1)
        return intact
