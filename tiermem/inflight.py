"""The one list of work in flight: copies, reads, writes and decode steps.

Each entry holds pins and has something to wait for. `reap` walks the list; it is the only place where pins
are released and FILLING copies become VALID (rule R1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from tiermem.errors import TransferError
from tiermem.trace import traced

log = logging.getLogger("tiermem")


class Work(Protocol):
    """Something in flight.

    `poll` never blocks: it advances the work where it has several stages and answers whether it has ended; it
    raises TransferError when it failed. After that exactly one of `finish` and `fail` is called, once.
    `wait` blocks until `poll` can make progress, or raises TransferError at the work's deadline, after which
    the work stays in the list: what cannot be cancelled keeps its slots and buffers.
    """

    def poll(self) -> bool: ...

    def wait(self) -> None: ...

    def finish(self) -> None: ...

    def fail(self, error: TransferError) -> None: ...


class InFlight:
    """The list, in order of submission. Single-threaded: the manager's thread owns it."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self._works)

    def add(self, work: Work) -> None:
        """Take `work`, whose pins are already held."""
        self._works.append(work)

    @traced("reap")
    def reap(self) -> None:
        """Settle every work that has ended; never blocks."""
        for work in list(self._works):
            self._settle(work)

    def wait_any(self) -> None:
        """Block until the oldest work has moved on, then reap.

        Raises
        ------
        TransferError: the oldest work passed its deadline; it stays in the list and keeps its pins.
        """
        if self._works:
            self._works[0].wait()
            self.reap()

    def wait_for(self, works: Iterable[Work]) -> None:
        """Block until each of `works` has left the list (reaped, or failed)."""
        for work in works:
            while any(other is work for other in self._works):
                work.wait()
                self._settle(work)

    def drain(self) -> None:
        """Block until the list is empty."""
        while self._works:
            self.wait_any()

    def _settle(self, work: Work) -> None:
        try:
            if not work.poll():
                return
        except TransferError as error:
            log.error("a transfer failed, its pages are as before: %s", error)
            self._remove(work)
            self.num_failed += 1
            work.fail(error)
            return
        self._remove(work)
        work.finish()

    def _remove(self, work: Work) -> None:
        self._works = [other for other in self._works if other is not work]
