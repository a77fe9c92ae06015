"""GuardedEngine: an I/O engine behind a breaker, which keeps the memory of what is late."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from typing import Protocol

from tiermem import _core
from tiermem.breaker import Breaker, Use
from tiermem.disk_rates import DiskOptions, open_engine
from tiermem.errors import TransferError

log = logging.getLogger("tiermem")

NO_FAULT = (errno.ECANCELED, errno.ENOSPC, errno.EDQUOT)
"""Errors that say nothing against a disk; one that is full is looked after by `disk_budget`."""

REGISTER_BYTES = 1 << 30
"""Of memory registered with io_uring at once: what the kernel takes."""
REGISTER_S = 1.0
"""Registering saves a little of every transfer; a start must not wait for it. 2 GiB of huge pages took 36 ms."""

ENGINE_KINDS = {
    "auto": _core.EngineKind.AUTO,
    "uring": _core.EngineKind.IO_URING,
    "threads": _core.EngineKind.THREADS,
}


class LateWork(Protocol):
    """What missed its deadline; it holds the memory that is still read or written."""

    def poll(self) -> bool: ...


class GuardedEngine:
    """What a store uses of an engine. Nothing is given to a tier that is off, or has something late.

    Late transfers are kept, with their memory, until they end: here, or for the life of the process.
    """

    def __init__(self, engine: _core.IoEngine, breaker: Breaker) -> None:
        self.breaker = breaker
        self._engine = engine
        self._uses: dict[int, Use] = {}
        self._registered: list[tuple[int, int]] = []
        self._late: list[LateWork] = []

    @property
    def kind(self) -> _core.EngineKind:
        """As the engine's."""
        return self._engine.kind

    def submit_read(self, *operations: object) -> int:
        """As the engine's; OSError where the tier is off."""
        return self._submit(Use.READ, operations)

    def submit_write(self, *operations: object) -> int:
        """As the engine's; OSError where the tier may not be written."""
        return self._submit(Use.WRITE, operations)

    def poll(self, ticket: int) -> _core.IoResult:
        """As the engine's."""
        return self._engine.poll(ticket)

    def wait(self, ticket: int, timeout_s: float) -> _core.IoResult:
        """As the engine's."""
        return self._engine.wait(ticket, timeout_s)

    def forget(self, ticket: int) -> None:
        """As the engine's; what became of the operation is told to the breaker."""
        result = self._engine.poll(ticket)
        self._engine.forget(ticket)
        use = self._uses.pop(ticket)
        if result.status is _core.IoStatus.OK:
            self.breaker.note_good(use)
        elif result.status is _core.IoStatus.FAILED and result.errno not in NO_FAULT:
            self.breaker.note_failure(use, result.message)

    def keep_late(self, transfer: LateWork, reason: str) -> None:
        """`transfer` missed its deadline."""
        if not any(other is transfer for other in self._late):
            self._late.append(transfer)
            self.breaker.note_late(reason)

    def settle_late(self) -> None:
        """Let go of what was late and has ended; never blocks."""
        for transfer in list(self._late):
            if _has_ended(transfer):
                self._late = [other for other in self._late if other is not transfer]
                self.breaker.late_ended()

    def counters(self) -> _core.IoCounters:
        """As the engine's."""
        return self._engine.counters()

    def register_memory(self, address: int, num_bytes: int) -> int:
        """Let the kernel pin memory that pages are often moved from and to once, not for every transfer.

        It must stay mapped until `unregister_memory` or `close`. Returns how many bytes from `address` on it
        is: pages move as well without. Fewer where the kernel or the limit of locked memory refuses, where
        it would take longer than REGISTER_S, and none without io_uring.
        """
        start_s = time.monotonic()
        done = error = 0
        while done < num_bytes and not error and time.monotonic() < start_s + REGISTER_S:
            piece = min(REGISTER_BYTES, num_bytes - done)
            registered, error = self._engine.register_memory(address + done, piece)
            if registered == 0:
                break
            self._registered.append((address + done, registered))
            done += registered
        if error:
            log.info(
                "io_uring: %d of %d bytes of pinned memory registered (%s)",
                done, num_bytes, os.strerror(error),
            )  # fmt: skip
        return done

    def unregister_memory(self) -> None:
        """Undo every `register_memory`, before the memory is given back; nothing may be in flight there."""
        for address, num_bytes in self._registered:
            self._engine.unregister_memory(address, num_bytes)
        self._registered.clear()

    def close(self, timeout_s: float) -> bool:
        """As the engine's; where something is late it is not waited for again."""
        self.settle_late()
        if self._engine.close(0.0 if self._late else timeout_s):
            return True
        _LEFT_BEHIND.append(self)
        return False

    def join(self) -> None:
        """Wait until nothing is in flight, as long as it takes; after `close`."""
        self._engine.close(math.inf)

    def _submit(self, use: Use, operations: tuple[object, ...]) -> int:
        self.settle_late()
        self.breaker.check(use)
        submit = self._engine.submit_read if use is Use.READ else self._engine.submit_write
        try:
            ticket = submit(*operations)  # type: ignore[arg-type]
        except OSError as error:
            self.breaker.note_failure(use, str(error))
            raise
        self._uses[ticket] = use
        return ticket


_LEFT_BEHIND: list[GuardedEngine] = []
"""With transfers that never ended: their memory stays mapped for the life of the process."""


def _has_ended(transfer: LateWork) -> bool:
    try:
        return transfer.poll()
    except TransferError:
        return True


def open_guarded(name: str, options: DiskOptions | None, breaker: Breaker) -> GuardedEngine:
    """The engine that was measured as `options`; without them, or where it cannot be had, the one of this name."""
    return GuardedEngine(_open_engine(ENGINE_KINDS[name], options), breaker)


def _open_engine(kind: _core.EngineKind, options: DiskOptions | None) -> _core.IoEngine:
    if options is None:
        return _core.IoEngine(kind)
    try:
        return open_engine(options)
    except OSError as error:
        log.warning("%s was measured, but cannot be had now (%s)", options, error)
        return _core.IoEngine(kind)
