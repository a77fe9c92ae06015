"""BesideLink: how fast the CPU reads host memory while the link streams other parts of it to the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tiermem.device.protocol import Device, Direction, Event, Memory, Stream
from tiermem.errors import InvariantError

PIECE_BYTES = 16 << 20
"""Of one copy: large enough for the link's full rate, small enough to count what arrived in a short time."""
READ_BYTES = 8 << 30
"""What one timed run reads, in several passes."""
MARGIN = 3.0
"""Copies are queued for so many times what reading takes alone, since both slow each other down."""
MOST_TRIES = 4
"""With twice as many copies each; where the link still ends first, the device does not copy by itself."""


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
    device: Device,
    hot: Memory,
    host: Memory,
    read: Callable[[torch.Tensor], object],
    alone: BesideLink,
    repeats: int,
) -> BesideLink:
    """Read the second half of `host` while the first one is copied to `hot`, over and over.

    Parameters
    ----------
    read: reads a tensor of bytes once, on all threads that are to read.
    alone: the rates of both without the other, which say how many copies are needed.
    repeats: at least 1; the one with the median total counts.

    Raises
    ------
    InvariantError: copies end before reading does, however many are queued. TransferError: a copy failed.
    """
    data = host.tensor[host.num_bytes // 2 :]
    copies = _Copies(device, hot, host, host.num_bytes // 2)
    passes = max(1, READ_BYTES // data.numel())
    read(data)
    read_s = passes * data.numel() / alone.ram
    count = int(MARGIN * read_s * alone.link / copies.piece_bytes) + 2
    found = [_once(copies, count, lambda: read(data), passes, data) for _ in range(repeats)]
    return sorted(found, key=lambda each: each.total)[len(found) // 2]


def _once(
    copies: _Copies, count: int, read: Callable[[], object], passes: int, data: torch.Tensor
) -> BesideLink:
    for _ in range(MOST_TRIES):
        events = copies.queue(count)
        events[0].wait()
        start_s = time.perf_counter()
        for _ in range(passes):
            read()
        seconds = time.perf_counter() - start_s
        arrived = sum(event.done() for event in events[1:])
        copies.stream.synchronize()
        if arrived < len(events) - 1:
            return BesideLink(
                passes * data.numel() / seconds, arrived * copies.piece_bytes / seconds
            )
        count *= 2
    raise InvariantError(f"all of {count // 2} copies ended before the CPU had read beside them")


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
