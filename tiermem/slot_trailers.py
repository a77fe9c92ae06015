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
        self._unsure: dict[int, tuple[int, int]] = {}
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
            self._unsure.pop(slot, None)
        return raw

    def rewrite(self, slots: Int64s, names: Sequence[PageName]) -> None:
        """Name the pages in `slots`, whose `sums` are known, anew: write other trailers, and wait for the disk.

        The pages may be read meanwhile. Where it fails they are what they were.

        Raises
        ------
        TransferError: they cannot be written. DeadlineError: not in time.
        """
        index, vault = self._index, self._vault
        sums = [self.sums[slot] for slot in slots.tolist()]
        seals = [] if vault is None else [vault.known(slot) for slot in slots.tolist()]
        before = index.generations[slots], index.checksums[slots]
        try:
            self._file.write_trailers(slots, self.make(slots, names, np.stack(sums)))
        except BaseException:
            made = index.generations[slots].tolist(), index.checksums[slots].tolist()
            self._unsure.update(zip(slots.tolist(), zip(*made, strict=True), strict=True))
            index.generations[slots], index.checksums[slots] = before
            raise
        finally:
            self.sums.update(zip(slots.tolist(), sums, strict=True))
            for slot, seal in zip(slots.tolist(), seals, strict=False):
                assert vault is not None
                vault.know(slot, seal)

    def parse(
        self, slots: Int64s, raw: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_], list[Seal | None]]:
        """The checksums in trailers read from `slots`, which of them are what was written, and their seals."""
        if self._unsure:
            self._settle(slots, raw)
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

    def _settle(self, slots: Int64s, raw: NDArray[np.uint8]) -> None:
        """A trailer counts that was written, though the disk said that it was not."""
        for i, slot in enumerate(slots.tolist()):
            if slot not in self._unsure:
                continue
            generation, checksum = self._unsure[slot]
            one = np.array([generation], dtype=np.uint64)
            stored, same = parse_trailers(self._layout, one, raw[i : i + 1])
            if same[0] and int(roots_of(stored)[0]) == checksum:
                self._index.generations[slot], self._index.checksums[slot] = generation, checksum
                del self._unsure[slot]
