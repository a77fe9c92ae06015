"""Lookahead: the loads of a step's chunks, started in the order of their use and as early as the ring allows.

So the link has work across the borders of layers, and before the first one.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tiermem.chunks import Chunk
from tiermem.streaming import Ring


class Lookahead:
    """The chunks of one step, each of them once a layer.

    Where pages are written through, the halves are wanted for them between two layers: then nothing is started
    for a layer before the first chunk of it is used.
    """

    def __init__(self, ring: Ring, chunks: SequenceOf[Chunk], num_layers: int) -> None:
        self._ring = ring
        self._chunks = chunks
        self._end = len(chunks) * num_layers
        self._next = 0
        self._layer = -1
        self._is_across = all(chunk.token_slots is None for chunk in chunks)

    def advance(self) -> None:
        """Start what comes next, up to the first that needs a half which has slices nobody used yet.

        Of slices from the SSD only the reads are started, so that this waits for none.

        Raises
        ------
        TransferError: a copy or read failed.
        """
        while self._next < self._end:
            layer, i = divmod(self._next, len(self._chunks))
            chunk = self._chunks[i]
            is_late = layer > self._layer and not self._is_across
            if is_late or chunk.token_slots is not None or chunk.load is None:
                return
            if chunk.load.cold is not None:
                self._ring.read_ahead(chunk.load, layer)
                return
            if self._ring.is_waiting(chunk.half):
                return
            self._ring.start(chunk.load, layer)
            self._next += 1

    def begin_use(self, layer: int, i: int) -> None:
        """Bring the old slices of chunk `i` if they are not there; the compute stream waits for them.

        Raises
        ------
        CorruptPageError: a slice read from the SSD is not what was written there.
        TransferError: a copy or read failed.
        """
        self._layer = layer
        load = self._chunks[i].load
        if load is None or not self._ring.holds(load, layer):
            self._next = layer * len(self._chunks) + i + 1
        if load is not None:
            self._ring.begin_use(load, layer)

    def end_use(self, i: int) -> None:
        """The compute stream was given all that uses chunk `i`."""
        self._ring.end_use(self._chunks[i].half)
        self.advance()
