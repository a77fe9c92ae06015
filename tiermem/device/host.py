"""HostMemory: page-aligned anonymous memory, the bytes behind every host allocation."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from tiermem._core import MemoryToucher
from tiermem.device import cgroup
from tiermem.device.copies import check_num_bytes
from tiermem.device.protocol import Progress
from tiermem.errors import ClosedError, ConfigError, DeadlineError

HUGE_PAGE_BYTES = 2 << 20
PIECE_BYTES = 1 << 30
"""Progress of the first touch is told after each of these."""
MAX_TOUCH_THREADS = 16
"""With huge pages 16 threads touched 64 GB/s of a server's memory, 8 threads 43, 32 no more than 16."""

WORD = 1 << 32
WORD_NAP_S = 20e-6
_ABANDONED: list[torch.Tensor] = []
"""Memory that something may still write: mapped for the life of the process."""


class HostMemory:
    """An anonymous mapping, backed by memory when the constructor returns.

    Starts at a multiple of 4,096, from 2 MiB on at a multiple of 2 MiB with huge pages asked for,
    which keeps direct I/O fast. The bytes are unmapped when `free()` was called and no view of
    `tensor` is left, so a view that outlives its memory reads stale bytes and never another
    allocation's.
    """

    __slots__ = ("_address", "_num_bytes", "_on_abandon", "_on_free", "_tensor")

    def __init__(
        self,
        num_bytes: int,
        *,
        fill: int = 0,
        on_free: Callable[[HostMemory], None] | None = None,
        on_abandon: Callable[[HostMemory], None] | None = None,
        on_piece: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map `num_bytes` bytes, all equal to `fill`; `on_free` runs once, before the bytes go;
        `on_abandon` instead of it where they stay for ever.

        `on_piece(address, num_bytes)` runs for every piece of the memory, one after the other, as
        soon as the piece is backed. What it raises ends the constructor.

        Raises
        ------
        TypeError, ValueError: `num_bytes` is not an int of at least 1.
        ConfigError: the host has no room; names the bytes asked for and the available bytes.
        """
        check_num_bytes(num_bytes)
        self._num_bytes = num_bytes
        tensor = _map(num_bytes)
        self._tensor: torch.Tensor | None = tensor
        self._address = tensor.data_ptr()
        self._on_free = on_free
        self._on_abandon = on_abandon
        _touch(self._address, num_bytes, fill, on_piece)

    @property
    def address(self) -> int:
        return self._address

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            raise ClosedError(f"host memory of {self._num_bytes} bytes was freed")
        return self._tensor

    def free(self) -> None:
        if self._tensor is None:
            return
        if self._on_free is not None:
            self._on_free(self)
        self._tensor = None

    def abandon(self) -> None:
        if self._tensor is None:
            return
        _ABANDONED.append(self._tensor)
        if self._on_abandon is not None:
            self._on_abandon(self)
        self._tensor = None


def set_word(address: int, value: int) -> None:
    """Set a 32-bit word of host memory, after everything that this thread wrote before."""
    ctypes.c_uint32.from_address(address).value = value % WORD


def wait_for_word(address: int, value: int, timeout_s: float) -> None:
    """Hold the calling thread until another one has set the word to `value` or past it.

    Raises
    ------
    DeadlineError: none has within `timeout_s` seconds.
    """
    word = ctypes.c_uint32.from_address(address)
    deadline_s = time.monotonic() + timeout_s
    while (word.value - value) % WORD >= WORD // 2:
        if time.monotonic() > deadline_s:
            raise DeadlineError(f"a word was not set within copy_timeout_s={timeout_s:g}")
        time.sleep(WORD_NAP_S)


def host_free_bytes() -> int:
    """Bytes this process can still take: what the system has, within the cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    room = cgroup.room_bytes()
    return available if room is None else min(available, room)


def host_total_bytes() -> int:
    """Bytes of memory this process may use at most: the machine's, within the cgroup's limit."""
    total = int(psutil.virtual_memory().total)
    limit = cgroup.limit_bytes()
    return total if limit is None else min(total, limit)


def host_name() -> str:
    """The processor's name as Linux shows it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def piece_starts(num_bytes: int) -> range:
    """Where the pieces of memory of `num_bytes` bytes start, from its first byte."""
    return range(0, num_bytes, PIECE_BYTES)


def reporting(
    num_bytes: int, progress: Progress | None, share: float = 1.0
) -> Callable[[int, int], None] | None:
    """An `on_piece` that tells `progress` how much of memory of `num_bytes` bytes is ready.

    `share` of the work is done when everything was touched.
    """
    if progress is None:
        return None
    touched = 0

    def report(_: int, piece_bytes: int) -> None:
        nonlocal touched
        touched += piece_bytes
        progress(int(touched * share), num_bytes)

    return report


def locked_limit_text() -> str:
    """How many bytes this process may lock in memory."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "any number of bytes" if limit == resource.RLIM_INFINITY else f"{limit} bytes"


def touch_threads() -> int:
    """Threads for the first touch, and for copies within host memory."""
    return min(MAX_TOUCH_THREADS, len(os.sched_getaffinity(0)))


def _touch(
    address: int, num_bytes: int, fill: int, on_piece: Callable[[int, int], None] | None
) -> None:
    toucher = MemoryToucher(address, num_bytes, value=fill, num_threads=touch_threads())
    try:
        for start in piece_starts(num_bytes):
            end = min(start + PIECE_BYTES, num_bytes)
            toucher.wait(end)
            if on_piece is not None:
                on_piece(address + start, end - start)
    finally:
        toucher.stop()


def _map(num_bytes: int) -> torch.Tensor:
    free_bytes = host_free_bytes()
    if num_bytes > free_bytes:
        # Linux grants more than it has and kills the process at the touch, so ask before.
        raise _no_room(num_bytes, free_bytes, "not enough memory is available")
    padding = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else 0
    try:
        mapping = mmap.mmap(-1, num_bytes + padding, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise _no_room(num_bytes, free_bytes, str(error)) from error
    # A fork copies pinned pages at once, so a child of a process with a large pool would double it.
    _advise(mapping, "MADV_DONTFORK")
    if not padding:
        return torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes)
    _advise(mapping, "MADV_HUGEPAGE")
    offset = -_address_of(mapping) % HUGE_PAGE_BYTES
    return torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes, offset=offset)


def _advise(mapping: mmap.mmap, advice: str) -> None:
    """Ask the kernel for `advice`; a system without it is slower, and right all the same."""
    option = getattr(mmap, advice, None)
    if option is not None:
        with suppress(OSError):
            mapping.madvise(option)


def _address_of(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()


def _no_room(num_bytes: int, free_bytes: int, reason: str) -> ConfigError:
    return ConfigError(
        f"cannot allocate {num_bytes} bytes of host memory: {free_bytes} bytes are free ({reason})"
    )
