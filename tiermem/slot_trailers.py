"""SlotTrailers: what the trailers of an open store say: which write of a page each slot holds."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tiermem.cipher import Seal
from tiermem.layout import PageLayout
from tiermem.slot_file import SlotFile
from tiermem.store_format import PageName, checksum_words, keys_in, pack_trailers, parse_trailers
from tiermem.store_index import StoreIndex
from tiermem.store_transfer import Int64s, roots_of
from tiermem.vault import Vault


class SlotTrailers:
    """Makes a trailer for every page that is written, and tells whether one that was read is the last one made.

    `sums` has the checksums of the layers of each slot whose trailer was read since the slot was written.
    """

    def __init__(
        self, layout: PageLayout, file: SlotFile, index: StoreIndex, vault: Vault | None
    ) -> None:
        self.sums: dict[int, NDArray[np.uint64]] = {}
        self._layout = layout
        self._file = file
        self._index = index
        self._vault = vault
        newest = int(index.generations.max(initial=0))
        self._next_generation = max(time.time_ns(), newest + 1)

    def make(
        self, slots: Int64s, names: Sequence[PageName | None], sums: NDArray[np.uint64]
    ) -> NDArray[np.uint8]:
        """The trailers of pages that are being written to `slots`, (slots, 4096).

        `sums` (slots, layers) are the checksums of their layers. What the slots held before is not known any more.
        """
        first = self._next_generation
        self._next_generation += len(slots)
        raw = pack_trailers(self._layout, names, first, sums)
        if self._vault is not None:
            self._vault.seal_trailers(raw, slots)
        self._index.generations[slots] = np.arange(first, self._next_generation, dtype=np.uint64)
        self._index.checksums[slots] = roots_of(checksum_words(self._layout, raw))
        for slot in slots.tolist():
            self.sums.pop(slot, None)
        return raw

    def parse(
        self, slots: Int64s, raw: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_], list[Seal | None]]:
        """The checksums in trailers read from `slots`, which of them are what was written, and their seals."""
        stored, same = parse_trailers(self._layout, self._index.generations[slots], raw)
        same &= roots_of(stored) == self._index.checksums[slots]
        same &= self._index.are_called(slots, keys_in(raw))
        if self._vault is None:
            return stored, same, []
        stored, seals = self._vault.open_trailers(raw)
        return stored, same & np.array([seal is not None for seal in seals]), seals

    def load(self, slots: Int64s) -> None:
        """Read the trailers of the slots whose layers' checksums are not known yet, and wait for the disk.

        Those that are not what was written stay unknown.
        """
        new = np.array([slot for slot in slots.tolist() if slot not in self.sums], dtype=np.int64)
        if len(new) == 0:
            return
        stored, same, seals = self.parse(new, self._file.read_trailers(new))
        for i, (slot, sums) in enumerate(zip(new.tolist(), stored.copy(), strict=True)):
            if same[i]:
                self.sums[slot] = sums
                if self._vault is not None:
                    self._vault.know(slot, seals[i])
