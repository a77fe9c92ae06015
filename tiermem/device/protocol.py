"""What tiermem asks of a device: memory by address, streams, events and batches of copies.

Every device keeps the same promises, whether it is a GPU, the host alone or a simulation:

* work given to one stream runs in the order given; streams run beside each other in any order;
* a copy reads its source when it runs, not when it is submitted, so the source must stay as it is
  until an event recorded behind the copy is done;
* nothing that takes a stream waits on the host; only ``Event.wait`` and ``Stream.synchronize`` do;
* the host may not assume that a copy has ended before it has seen ``done()`` or returned from
  ``wait()``;
* no wait on the host is longer than ``copy_timeout_s``: what has not ended by then goes on, and its
  memory may not be given back.

A device and everything made by it belong to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

COPY_TIMEOUT_S = 120.0
"""Until a device is told otherwise: much longer than any copy, and than most passes of a model."""

MEMORY_ALIGN_BYTES = 4096
"""Every allocation, hot or host, starts at a multiple of this: what direct file I/O needs."""

Addresses: TypeAlias = NDArray[np.int64]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


class DeviceKind(Enum):
    """What carries out the work."""

    CUDA = "cuda"
    CPU = "cpu"
    SIMULATED = "simulated"


class Direction(Enum):
    """What a copy reads and what it writes: host is pinned memory, device is hot memory."""

    HOST_TO_DEVICE = "h2d"
    DEVICE_TO_HOST = "d2h"
    DEVICE_TO_DEVICE = "d2d"


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Hot memory as the device reports it now, bytes; other processes' use is counted."""

    free_bytes: int
    total_bytes: int


@runtime_checkable
class Event(Protocol):
    """A point in a stream's work; holding one means that it was recorded and may be asked about."""

    def done(self) -> bool:
        """Whether all work given to the stream before this event has ended.

        Never blocks. Once true it stays true.

        Raises
        ------
        TransferError: the device reports that the work failed; raised again by every later call.
        """
        ...

    def wait(self) -> None:
        """Hold the calling thread until `done()`, up to `copy_timeout_s` after the event was recorded.

        Raises
        ------
        TransferError: as `done()`. DeadlineError: it is not done by then; it may be later.
        """
        ...

    def is_late(self) -> bool:
        """Whether it is not done `copy_timeout_s` after it was recorded; never blocks."""
        ...


@runtime_checkable
class Stream(Protocol):
    """A queue of work that runs in order, beside other streams."""

    def record(self) -> Event:
        """An event that is done when everything given to this stream so far has ended."""
        ...

    def wait_event(self, event: Event) -> None:
        """Let work given to this stream from now on start only when `event` is done.

        The host does not wait. `event` must come from the same device; one that failed or was
        already seen done holds nothing back.
        """
        ...

    def synchronize(self) -> None:
        """Hold the calling thread until everything given to this stream has ended.

        Raises
        ------
        TransferError: the device reports that some of the work failed.
        DeadlineError: it has not ended `copy_timeout_s` from now; it may later.
        """
        ...


@runtime_checkable
class Memory(Protocol):
    """One allocation, of hot memory or of pinned host memory, owned by the device that made it."""

    @property
    def address(self) -> int:
        """First byte, for the device and (of host memory) the host; a multiple of 4,096."""
        ...

    @property
    def num_bytes(self) -> int:
        """Usable bytes, as asked for."""
        ...

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as a flat uint8 tensor of shape (num_bytes,), without a copy.

        On the device's `torch_device` for hot memory, on the CPU for host memory. It and every view
        of it must not be used after `free()`.

        Raises
        ------
        ClosedError: the memory was freed.
        """
        ...

    def free(self) -> None:
        """Give the bytes back; later calls do nothing.

        Ordering: all work that reads or writes the bytes must have been seen done.
        """
        ...

    def abandon(self) -> None:
        """Never give the bytes back, because something may use them for ever; `free` does nothing then."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Slices of pages whose checksums are to be stored or compared, where the device sees what it needs of them.

    Parameters
    ----------
    pages: (n,) int64, addresses of each page's first slice; the others follow it.
    rows: (n,) int64, addresses in host memory of each page's row of sums, one uint64 a layer.
    marks: (n,) int32, for pages that were compared: 0, or one more than a layer whose sum was another one.
    slice_bytes: of one slice, a multiple of 16.

    They must be kept until what was given to a stream with them has ended.
    """

    pages: torch.Tensor
    rows: torch.Tensor
    marks: torch.Tensor
    slice_bytes: int

    def marked(self) -> NDArray[np.int32]:
        """The marks, for the host: valid once the comparisons were seen done."""
        return self.marks.numpy()


@runtime_checkable
class Device(Protocol):
    """Hot memory, the host memory beside it, and what moves bytes between them.

    `copy_timeout_s`: deadline of what streams were given, from when it was; may be set at any time.
    """

    copy_timeout_s: float

    @property
    def kind(self) -> DeviceKind: ...

    @property
    def name(self) -> str:
        """The hardware's own name, for reports."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """Where torch finds hot memory; with an index for CUDA."""
        ...

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(major, minor) of a GPU; None without one."""
        ...

    @property
    def staging_bytes(self) -> int:
        """Hot memory that copies use besides what was allocated."""
        ...

    def allocate(self, num_bytes: int) -> Memory:
        """Hot memory of `num_bytes` bytes with arbitrary content, aligned to 4,096.

        Raises
        ------
        ValueError: `num_bytes` is below 1.
        ConfigError: there is no room; names the bytes asked for and the free bytes.
        ClosedError: the device is closed.
        """
        ...

    def allocate_host(self, num_bytes: int, *, progress: Progress | None = None) -> Memory:
        """Page-aligned host memory with arbitrary content, for copies, file I/O and attention.

        Every page of it is backed when this returns, and on CUDA pinned, so that it serves direct
        file I/O and copies alike. That takes seconds for a large pool: `progress(done, total)` is
        called with bytes from time to time, at last with all of them.

        Raises
        ------
        As `allocate`. When a limit forbids the memory, the error names the bytes asked for and
        those allowed, and everything is given back.
        """
        ...

    def new_stream(self) -> Stream:
        """A stream for copies that waits for no other stream unless told; lives until `close()`."""
        ...

    def compute_stream(self) -> Stream:
        """The stream that torch launches this device's kernels on at the moment of the call."""
        ...

    def copy(
        self,
        direction: Direction,
        dst: Addresses,
        src: Addresses,
        num_bytes: Addresses | int,
        stream: Stream,
    ) -> None:
        """Give `stream` a batch of copies; returns before they have run.

        Parameters
        ----------
        direction: the same for the whole batch.
        dst, src: (n,) int64, addresses inside memory of this device; n may be 0.
        num_bytes: (n,) int64, or one number for all pieces.

        Raises
        ------
        TypeError: an array that is not a one-dimensional int64 array.
        ValueError: lengths that differ, or a piece of fewer than 1 byte; nothing was submitted.
        TransferError: the device refused the batch; none of it is running any more, but some pieces
            may have been copied.

        Ordering: after everything given to `stream` before; among themselves the pieces have no
        order, so none may write what another reads or writes. The host does not wait, up to what
        the driver queues: a GPU's takes some 25,000 pieces on a stream that is held, and lets the
        caller wait before it takes more.
        """
        ...

    def slices(self, pages: Addresses, rows: Addresses, slice_bytes: int) -> Slices:
        """What `sum_slices` and `verify_slices` take; their memory must stay as long as it is used.

        Parameters
        ----------
        pages: (n,) int64, in hot memory, each a multiple of 16.
        rows: (n,) int64, in host memory of this device, each a multiple of 8.
        slice_bytes: a multiple of 16.

        Raises
        ------
        ValueError: lengths that differ, or another slice_bytes.
        """
        ...

    def sum_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        """Store the checksums (`_core.checksum`) of consecutive slices of each page in its row, at `layers`.

        Ordering: as a copy that reads the slices and writes the rows.
        """
        ...

    def verify_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        """Compare the checksums of consecutive slices of each page with its row's at `layers`; mark other ones.

        Ordering: as a copy that reads the slices and the rows, and writes the marks.
        """
        ...

    def write_word(self, address: int, value: int) -> None:
        """Set a 32-bit word of this device's host memory to `value`, on the compute stream.

        Who sees it there sees what the stream was given before as well.
        """
        ...

    def wait_word(self, address: int, value: int) -> None:
        """Let the compute stream go on only when a 32-bit word of host memory has reached `value`.

        Reached is (word - value) mod 2^32 < 2^31. Whoever is to set the word must do so in every case.
        Where work runs as it is given, the caller waits.
        """
        ...

    def view(self, memory: Memory) -> torch.Tensor:
        """This device's host memory as a flat uint8 tensor on `torch_device`, without a copy.

        On a GPU kernels read it over the link. Not to be used after `memory.free()`.
        """
        ...

    def memory_info(self) -> MemoryInfo:
        """Free and total bytes of hot memory now."""
        ...

    def drain(self) -> None:
        """Hold the calling thread until everything given to any of its streams has ended, well or not.

        Raises
        ------
        DeadlineError: it has not, `copy_timeout_s` from now: none of the device's memory may be freed.
        """
        ...

    def close(self) -> None:
        """Wait for all work, then destroy streams and events and free what is left.

        Later calls do nothing; every other use of the device raises ClosedError.

        Raises
        ------
        DeadlineError: work has not ended `copy_timeout_s` from now. The device is closed, and everything
        that the work may use stays allocated for the life of the process.
        """
        ...
