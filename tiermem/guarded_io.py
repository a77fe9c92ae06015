"""GuardedEngine: an I/O engine behind a breaker, which keeps the memory of what is late."""

from __future__ import annotations

import errno
from typing import Protocol

from tiermem import _core
from tiermem.breaker import Breaker, Use
from tiermem.errors import TransferError

NO_FAULT = (errno.ECANCELED, errno.ENOSPC, errno.EDQUOT)
"""Errors that say nothing against a disk; one that is full is looked after by `disk_budget`."""


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

    def register_memory(self, address: int, num_bytes: int) -> tuple[int, int]:
        """As the engine's."""
        return self._engine.register_memory(address, num_bytes)

    def unregister_memory(self, address: int, num_bytes: int) -> None:
        """As the engine's."""
        self._engine.unregister_memory(address, num_bytes)

    def close(self, timeout_s: float) -> bool:
        """As the engine's; where something is late it is not waited for again."""
        self.settle_late()
        if self._engine.close(0.0 if self._late else timeout_s):
            return True
        _LEFT_BEHIND.append(self)
        return False

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
