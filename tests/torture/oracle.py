"""Oracle: what a process knew when it was killed, in memory that outlives it."""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum

import numpy as np

from torture.content import NUM_PROMPTS, SALTS
from torture.tally import Tally

COUNTED = ("operations", "refused", "bytes_checked", "wrong_bytes", "lost_pages", "corrupt_found")
"""Of a Tally, what processes add up here."""

_FIGURES = np.dtype(
    [
        ("least_pages", "<i8"),
        ("has_opened", "<i8"),
        ("operations", "<i8"),
        ("refused", "<i8"),
        ("bytes_checked", "<i8"),
        ("wrong_bytes", "<i8"),
        ("lost_pages", "<i8"),
        ("corrupt_found", "<i8"),
        ("open_s", "<f8"),
        ("call_s", "<f8"),
        ("covered", "<i8", (NUM_PROMPTS, len(SALTS))),
    ]
)
_TEXT_BYTES = 16 * 1024


class Phase(IntEnum):
    """What the process is about to do."""

    OPENING = 0
    CHECKING = 1
    WORKING = 2
    FLUSHING = 3
    FLUSHED = 4
    CLOSING = 5
    CLOSED = 6


class Oracle:
    """Figures of one store, kept by the processes that own it one after the other.

    covered: for each prompt and salt, how many leading pages a flush() has returned for: they are never lost while
    nothing is evicted. least_pages: how many pages the store holds at least, as long as nothing was done since
    flush() returned; 0 when that is not known.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _FIGURES.itemsize + _TEXT_BYTES)
        self.figures = np.frombuffer(self._memory, dtype=_FIGURES, count=1)[0]

    @property
    def text(self) -> str:
        """Why the last process ended by itself; empty if it did not."""
        (length,) = struct.unpack_from("<i", self._memory, _FIGURES.itemsize)
        start = _FIGURES.itemsize + 4
        return self._memory[start : start + length].decode(errors="replace")

    def tell(self, text: str) -> None:
        """Say why this process ends."""
        data = text.encode()[-(_TEXT_BYTES - 4) :]
        struct.pack_into(f"<i{len(data)}s", self._memory, _FIGURES.itemsize, len(data), data)

    def add_to(self, tally: Tally) -> None:
        """Count what all processes did."""
        for name in COUNTED:
            setattr(tally, name, getattr(tally, name) + int(self.figures[name]))
        tally.reopened += int(self.figures["has_opened"])
        tally.open_s = max(tally.open_s, float(self.figures["open_s"]))
        tally.call_s = max(tally.call_s, float(self.figures["call_s"]))
