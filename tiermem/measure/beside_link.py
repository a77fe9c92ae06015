"""BesideLink: how fast the CPU gets through host memory while the link streams other parts of it to the device."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tiermem.device.protocol import Device, Direction, Event, Memory, Stream
from tiermem.errors import InvariantError

PIECE_BYTES = 32 << 20
"""Of one copy: large enough for the link's full rate and for the driver's queue, which holds some 500 of them with
their events; small enough to count what arrived in a short time."""
WORK_S = 0.1
"""What one timed run takes by itself, about, in whole passes."""
MARGIN = 3.0
"""Copies are queued for so many times what the work takes alone, since both slow each other down."""
MOST_TRIES = 4
"""With twice as many copies each; where the link still ends first, the device does not copy by itself."""


@dataclass(frozen=True, slots=True)
class HostWork:
    """What the CPU does beside the link: `once` reads `num_bytes` of host memory, by itself at `rate` bytes/s."""

    once: Callable[[], object]
    num_bytes: int
    rate: float


@dataclass(frozen=True, slots=True)
class BesideLink:
    """Bytes/s that the CPU reads, and that cross the link to the device at the same time."""

    ram: float
    link: float

    @property
    def total(self) -> float:
        """Both together: what a step can get at of what is not resident."""
        return self.ram + self.link

    @property
    def ram_share(self) -> float:
        """The CPU's part of the total, 0 to 1: the share of work that ends both at once."""
        return self.ram / self.total


def beside_link(
    device: Device, hot: Memory, host: Memory, work: HostWork, link_rate: float, repeats: int
) -> BesideLink:
    """Do `work` while the first half of `host` is copied to `hot`, over and over.

    Parameters
    ----------
    work: reads what it reads of the second half of `host`.
    link_rate: of the link by itself, bytes/s, which says how many copies are needed.
    repeats: at least 1; the one with the median total counts.

    Raises
    ------
    InvariantError: copies end before the work does, however many are queued. TransferError: a copy failed.
    """
    copies = _Copies(device, hot, host, host.num_bytes // 2)
    passes = math.ceil(WORK_S * work.rate / work.num_bytes)
    work.once()
    work_s = passes * work.num_bytes / work.rate
    count = int(MARGIN * work_s * link_rate / copies.piece_bytes) + 2
    found = [_once(copies, count, work, passes) for _ in range(repeats)]
    return sorted(found, key=lambda each: each.total)[len(found) // 2]


def _once(copies: _Copies, count: int, work: HostWork, passes: int) -> BesideLink:
    for _ in range(MOST_TRIES):
        events = copies.queue(count)
        events[0].wait()
        before = _arrived(events)  # queueing takes time, and a driver's queue may be full meanwhile
        start_s = time.perf_counter()
        for _ in range(passes):
            work.once()
        seconds = time.perf_counter() - start_s
        after = _arrived(events)
        copies.stream.synchronize()
        if after < len(events):
            crossed = (after - before) * copies.piece_bytes
            return BesideLink(passes * work.num_bytes / seconds, crossed / seconds)
        count *= 2
    raise InvariantError(f"all of {count // 2} copies ended before the CPU was done beside them")


def _arrived(events: list[Event]) -> int:
    """How many are done, of events of one stream in their order: a few looks, since copies go on meanwhile."""
    return bisect_left(events, 1, key=lambda event: 0 if event.done() else 1)


class _Copies:
    """Copies of pieces from the first bytes of host memory to the device, one after the other."""

    def __init__(self, device: Device, hot: Memory, host: Memory, num_bytes: int) -> None:
        self.piece_bytes = min(PIECE_BYTES, num_bytes, hot.num_bytes)
        self.stream: Stream = device.new_stream()
        self._device = device
        self._places = min(num_bytes, hot.num_bytes) // self.piece_bytes
        self._hot, self._host = hot.address, host.address

    def queue(self, count: int) -> list[Event]:
        """Give the stream `count` copies; the event behind each."""
        events = []
        for i in range(count):
            offset = i % self._places * self.piece_bytes
            dst, src = (
                np.array([address + offset], dtype=np.int64) for address in (self._hot, self._host)
            )
            self._device.copy(Direction.HOST_TO_DEVICE, dst, src, self.piece_bytes, self.stream)
            events.append(self.stream.record())
        return events
