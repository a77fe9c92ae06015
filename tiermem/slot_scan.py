"""SlotScan: reads many slots of a store's slot file in order, the next ones while the last are looked at."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.errors import TransferError
from tiermem.layout import PageLayout
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_transfer import Int64s, too_late

BATCH_BYTES = 16 << 20
"""Of one batch, about; two of them are in memory at once."""
READ_TIMEOUT_S = 60.0


class Part(Enum):
    """What is read of each slot."""

    WHOLE = "whole"
    TRAILER = "trailer"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Slots that were read; valid until the next batch is asked for.

    payloads: (n, slot_bytes) uint8, or (n, 0) where only trailers were read. tails: (n, 4096) uint8.
    errors: what the system said of slots that could not be read, by their place in `slots`.
    """

    slots: Int64s
    payloads: NDArray[np.uint8]
    tails: NDArray[np.uint8]
    errors: dict[int, str]


class SlotScan:
    """Reads from `file`, the slot file of a store of `layout`, which stays the caller's. A context that closes."""

    def __init__(self, file: _core.BlockFile, layout: PageLayout, part: Part) -> None:
        self._file = file
        self._stride = layout.slot_bytes + TRAILER_BYTES
        self._head = layout.slot_bytes if part is Part.TRAILER else 0
        self._length = self._stride - self._head
        self._most = max(1, BATCH_BYTES // self._length)
        self._engine = _core.IoEngine(_core.EngineKind.AUTO)
        self._buffers: list[mmap.mmap] = []

    def __enter__(self) -> SlotScan:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close(READ_TIMEOUT_S)  # nothing is written to the buffers any more

    @property
    def bytes_each(self) -> int:
        """What is read of one slot."""
        return self._length

    def batches(self, slots: Int64s) -> Iterator[Batch]:
        """What lies in `slots`, in their order.

        Raises
        ------
        TransferError: the disk did not answer in time.
        """
        size = min(self._most, max(1, len(slots)))
        self._buffers = [mmap.mmap(-1, size * self._length) for _ in range(2)]
        parts = [slots[start : start + size] for start in range(0, len(slots), size)]
        tickets = [self._start(part, i) for i, part in enumerate(parts[:1])]
        for i, part in enumerate(parts):
            if i + 1 < len(parts):
                tickets.append(self._start(parts[i + 1], i + 1))
            errors = self._end(tickets[i], part, i)
            yield self._batch(part, i, errors)

    def _start(self, slots: Int64s, turn: int) -> int:
        offsets = slots * self._stride + self._head
        lengths = np.full(len(slots), self._length, dtype=np.int64)
        return self._engine.submit_read(self._file, offsets, self._addresses(slots, turn), lengths)

    def _end(self, ticket: int, slots: Int64s, turn: int) -> dict[int, str]:
        """Wait for a batch; where it failed, read its slots one by one to find out which do."""
        if not self._waited(ticket):
            return {}
        errors = {}
        for i in range(len(slots)):
            offset = slots[i : i + 1] * self._stride + self._head
            place = self._addresses(slots, turn)[i : i + 1]
            length = np.array([self._length], dtype=np.int64)
            said = self._waited(self._engine.submit_read(self._file, offset, place, length))
            if said:
                errors[i] = said
        return errors

    def _waited(self, ticket: int) -> str:
        """What the system says went wrong; empty where nothing did."""
        result = self._engine.wait(ticket, READ_TIMEOUT_S)
        if result.status is _core.IoStatus.PENDING:
            raise too_late(READ_TIMEOUT_S)
        self._engine.forget(ticket)
        return result.message if result.status is _core.IoStatus.FAILED else ""

    def _addresses(self, slots: Int64s, turn: int) -> Int64s:
        return self._rows(turn).ctypes.data + np.arange(len(slots), dtype=np.int64) * self._length

    def _rows(self, turn: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._buffers[turn % 2], dtype=np.uint8).reshape(-1, self._length)

    def _batch(self, slots: Int64s, turn: int, errors: dict[int, str]) -> Batch:
        rows = self._rows(turn)[: len(slots)]
        return Batch(slots, rows[:, :-TRAILER_BYTES], rows[:, -TRAILER_BYTES:], errors)


def read_slot(file: _core.BlockFile, layout: PageLayout, slot: int) -> tuple[bytes, bytes]:
    """The payload and the trailer in one slot.

    Raises
    ------
    TransferError: it cannot be read.
    """
    with SlotScan(file, layout, Part.WHOLE) as scan:
        for batch in scan.batches(np.array([slot], dtype=np.int64)):
            if batch.errors:
                raise TransferError(f"slot {slot}: {batch.errors[0]}")
            return batch.payloads.tobytes(), batch.tails.tobytes()
    raise AssertionError("one slot makes one batch")
