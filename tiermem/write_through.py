"""WriteThrough: pages of a step that are filled in a lower tier, layer by layer from the ring."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tiermem.chunks import Chunk
from tiermem.core import Core
from tiermem.device.protocol import Event, Slices
from tiermem.page_sums import Sums
from tiermem.pools import Tier


class WriteThrough:
    """Of one step: copies and writes that were started, and the pages' sums, born with each layer."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._saves: list[Event] = []
        self._born: dict[int, tuple[Slices, Sums | None]] = {}
        """By the first page of a chunk; sums of their own where the pages go to the SSD."""

    def save(self, chunk: Chunk, layer: int) -> None:
        """Bring the filled slices of one layer to their home; waits where that is on the SSD."""
        ring, slots = self._core.ring, self._core.table.slots(chunk.written, chunk.home)
        slices = self._slices(chunk)
        if chunk.home == Tier.RAM:
            self._saves.append(ring.save(chunk.half, slices, layer, slots))
        else:
            ring.save_cold(chunk.half, slices, layer, slots)

    def commit(self, chunks: SequenceOf[Chunk]) -> None:
        """All layers were saved: wait until they are there; the pages are VALID then.

        Raises
        ------
        TransferError: a copy or a write failed.
        """
        core = self._core
        for saved in self._saves:
            saved.wait()
        for chunk in chunks:
            if chunk.token_slots is None:
                continue
            if chunk.home == Tier.SSD:
                sums = self._born[int(chunk.written[0])][1]
                assert sums is not None
                core.mover.finish_write_through(chunk.written, sums)
            core.table.commit(chunk.written, chunk.home)

    def _slices(self, chunk: Chunk) -> Slices:
        """Where the chunk's slices lie in the ring, and where their sums go."""
        first = int(chunk.written[0])
        if first not in self._born:
            page_sums = self._core.mover.sums
            if chunk.home == Tier.RAM:
                slots = self._core.table.slots(chunk.written, Tier.RAM)
                sums, rows = None, page_sums.rows(Tier.RAM, slots)
            else:
                sums, rows = page_sums.new_rows(chunk.num_pages)
            self._born[first] = self._core.ring.slices_of(chunk.half, rows), sums
        return self._born[first][0]
