"""StoreTransfer: pages on their way to or from the slot file, in parts whose checksums overlap with the disk."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.errors import DeadlineError, TransferError
from tiermem.guarded_io import GuardedEngine
from tiermem.store_format import TRAILER_BYTES

Int64s = NDArray[np.int64]

PART_BYTES = 8 << 20
"""Of one ticket, about: while one part is on its way to or from the disk, another's checksums are computed."""

Operations = tuple[object, ...]
"""Arguments of an engine's submit functions."""

CheckPart = Callable[[Int64s], NDArray[np.bool_]]
"""Which pages of a part, given by their places in the transfer, arrived as they were written."""


def parts_of(slots: Int64s, page_bytes: int) -> Iterator[Int64s]:
    """Places within `slots`, by ascending slot, in parts of about PART_BYTES: neighbours become one transfer."""
    step = max(1, PART_BYTES // page_bytes)
    order = np.argsort(slots, kind="stable")
    for start in range(0, len(order), step):
        yield order[start : start + step]


class StoreTransfer:
    """Pages being read from or written to the store. Owns the trailers' memory until it has ended.

    One that misses its deadline is kept by the engine until it has ended, and fails then.

    With `check`, a part is checked as soon as `poll` or `wait` sees that it has arrived.
    """

    def __init__(
        self,
        engine: GuardedEngine,
        slots: Int64s,
        addresses: Int64s,
        tails: mmap.mmap | None,
        timeout_s: float,
        check: CheckPart | None = None,
    ) -> None:
        self.slots = slots
        self.addresses = addresses
        self.tails = tails
        self.sums = np.empty((0, 0), dtype=np.uint64)
        """Of a read of whole pages: the layers' checksums in the trailers, (pages, layers), once it ended."""
        self.memory: mmap.mmap | None = None
        """Where the pages are, if it is the transfer's own: kept until it has ended."""
        self._engine = engine
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._check = check
        self._good = np.zeros(len(slots), dtype=np.bool_)
        self._parts: list[tuple[int, Int64s]] = []
        self._num_ended = 0
        self._error: TransferError | None = None

    def start_part(
        self, submit: Callable[..., int], operations: Operations, places: Int64s
    ) -> None:
        """Submit what moves the pages at these places of `slots`.

        What cannot be submitted fails the transfer, once the parts before have ended.
        """
        if self._error is not None:
            return
        try:
            self._parts.append((submit(*operations), places))
        except OSError as error:
            self._error = _refused(error)

    def leave_unchecked(self) -> None:
        """For benchmarks: compare nothing from now on. What was not compared never counts as intact."""
        self._check = None

    @property
    def trailers(self) -> NDArray[np.uint8]:
        """The trailers of whole pages, (pages, 4096), where they lie; those of ended parts, of a read."""
        assert self.tails is not None
        return np.frombuffer(self.tails, dtype=np.uint8).reshape(-1, TRAILER_BYTES)

    def refuse(self, error: TransferError) -> None:
        """What was to be submitted cannot be: the transfer fails, once the parts before have ended."""
        self._error = self._error or error

    @property
    def has_ended(self) -> bool:
        """Whether no part that was submitted is on its way any more, as far as `poll` and `wait` have seen."""
        return self._num_ended == len(self._parts)

    @property
    def has_succeeded(self) -> bool:
        """Whether something was moved, and all that was to be, as far as `poll` and `wait` have seen."""
        return self.has_ended and bool(self._parts) and self._error is None

    def poll(self) -> bool:
        """Whether all parts have ended; raises TransferError then if one failed."""
        while self._num_ended < len(self._parts):
            ticket, places = self._parts[self._num_ended]
            if not self._take(ticket, places):
                return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        """Block until `poll` has an answer; raises DeadlineError at the deadline."""
        while self._num_ended < len(self._parts):
            ticket, places = self._parts[self._num_ended]
            left_s = max(0.0, self._deadline_s - time.monotonic())
            if self._engine.wait(ticket, left_s).status is _core.IoStatus.PENDING:
                raise self.expire()
            self._take(ticket, places)

    def complete(self) -> None:
        """Block until it has ended, where nobody else will ask for it; raises as `wait` and `poll`.

        An interrupt is raised when it has ended too: nothing else may come before to what it uses. At a second one
        it is kept as one that is late.
        """
        try:
            self.wait()
        except TransferError:
            raise
        except BaseException:
            self._let_end()
            raise
        self.poll()

    def _let_end(self) -> None:
        self.leave_unchecked()  # nobody will use what arrives
        try:
            with contextlib.suppress(TransferError):
                self.wait()
        finally:
            if not self.has_ended:
                self._engine.keep_late(self, "waiting for it was interrupted")

    def is_late(self) -> bool:
        """Whether the deadline is over and it was not seen to have ended."""
        is_running = self._num_ended < len(self._parts)
        return is_running and time.monotonic() >= self._deadline_s

    def expire(self) -> DeadlineError:
        """The deadline is over: what is told to who waits."""
        error = DeadlineError(
            f"the SSD tier did not answer within io_timeout_s={self._timeout_s:g} "
            f"({len(self._parts) - self._num_ended} parts of {len(self.slots)} pages)"
        )
        self.leave_unchecked()  # nobody will use what arrives
        self._error = self._error or error
        self._engine.keep_late(self, str(error))
        return error

    def intact(self) -> NDArray[np.bool_]:
        """Which pages of an ended read are the very bytes that were written, in the order of `slots`."""
        return self._good

    def _take(self, ticket: int, places: Int64s) -> bool:
        """Whether a part has ended; then it is forgotten, and checked if it is to be."""
        result = self._engine.poll(ticket)
        if result.status is _core.IoStatus.PENDING:
            return False
        self._engine.forget(ticket)
        self._num_ended += 1
        if result.status is _core.IoStatus.FAILED:
            # The other parts still use their memory: the error is told when all have ended.
            self._error = self._error or TransferError(result.errno, result.message)
        elif self._check is not None and self._error is None:
            self._good[places] = self._check(places)
        return True


def too_late(timeout_s: float) -> DeadlineError:
    """What is raised at a deadline."""
    return DeadlineError(f"the SSD tier did not answer within io_timeout_s={timeout_s:g}")


def _refused(error: OSError) -> TransferError:
    return TransferError(error.errno, f"the SSD tier's I/O engine refuses: {error.strerror}")


def roots_of(sums: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One checksum over those of the layers, for each row."""
    rows = np.ascontiguousarray(sums)
    return _core.checksum_slices(rows.ctypes.data, rows.shape[1] * rows.itemsize, len(rows))
