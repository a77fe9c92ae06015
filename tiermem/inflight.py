"""The one list of work in flight: copies, reads, writes and decode steps.

Each entry holds pins and has something to wait for. `reap` walks the list; it is the only place where pins
are released and FILLING copies become VALID (rule R1).

What misses its deadline is not waited for any more. It stays, with its pins, slots and buffers, until it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from tiermem.errors import DeadlineError, TransferError
from tiermem.trace import traced

log = logging.getLogger("tiermem")


class Work(Protocol):
    """Something in flight.

    `poll` never blocks: it advances the work where it has several stages and answers whether it has ended; it
    raises TransferError when it failed. After that exactly one of `finish` and `fail` is called, once.
    `wait` blocks until `poll` can make progress, or raises DeadlineError at the work's deadline.
    `held`: the error of one that has ended, but that others must let go of before `poll` says so; None else.
    `is_late`: the deadline of what is running is over; never blocks. `expire` is called once, when it was first
    found to be, and answers what is told to who waits.
    """

    def poll(self) -> bool: ...

    def wait(self) -> None: ...

    def held(self) -> TransferError | None: ...

    def is_late(self) -> bool: ...

    def expire(self) -> DeadlineError: ...

    def finish(self) -> None: ...

    def fail(self, error: TransferError) -> None: ...


class InFlight:
    """The list, in order of submission. Single-threaded: the manager's thread owns it."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self._late: list[tuple[Work, DeadlineError]] = []
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self._works) + len(self._late)

    @property
    def num_late(self) -> int:
        """Of those that missed their deadline and still run."""
        return len(self._late)

    @property
    def can_wait(self) -> bool:
        """Whether there is something that `wait_any` would wait for."""
        return self._next() is not None

    def add(self, work: Work) -> None:
        """Take `work`, whose pins are already held."""
        self._works.append(work)

    @traced("reap")
    def reap(self) -> None:
        """Settle every work that has ended; never blocks."""
        for work in [*(late for late, _ in self._late), *self._works]:
            if not self._settle(work) and self._error_of(work) is None and work.is_late():
                self._expire(work)

    def wait_any(self) -> None:
        """Block until the oldest work that can has moved on, or missed its deadline; then reap.

        Raises
        ------
        TransferError: nothing is left but what failed, and the running step counts on.
        DeadlineError: nothing is left but what missed its deadline before.
        """
        work = self._next()
        if work is None:
            self.check_held()
            raise DeadlineError(
                f"{self.num_late} pieces of work missed their deadline and still run: "
                + "; ".join(str(error) for _, error in self._late[:3])
            )
        try:
            work.wait()
        except DeadlineError:
            self._expire(work)
        self.reap()

    def wait_for(self, works: Iterable[Work]) -> None:
        """Block until each of `works` has left the list (reaped, or failed).

        Raises
        ------
        DeadlineError: one missed its deadline; it stays in the list and keeps its pins.
        """
        for work in works:
            while self._has(work):
                error = self._error_of(work)
                if error is not None:
                    raise error
                if work.held() is not None:
                    self.wait_any()
                    continue
                try:
                    work.wait()
                except DeadlineError:
                    self._expire(work)
                self._settle(work)

    def drain(self) -> None:
        """Block until nothing is in the list but what missed its deadline, or counts on that."""
        self.reap()
        while self.can_wait:
            self.wait_any()

    def check_held(self) -> None:
        """Raise the error of work that only the running step can let go of."""
        for work in self._works:
            error = work.held()
            if error is not None:
                raise error

    def check_late(self) -> None:
        """Raise DeadlineError where something missed its deadline and still runs."""
        if self._late:
            raise self._late[0][1]

    def _next(self) -> Work | None:
        return next((work for work in self._works if work.held() is None), None)

    def _has(self, work: Work) -> bool:
        return any(other is work for other in self._works) or self._error_of(work) is not None

    def _error_of(self, work: Work) -> DeadlineError | None:
        return next((error for other, error in self._late if other is work), None)

    def _expire(self, work: Work) -> None:
        error = work.expire()
        log.error("a piece of work missed its deadline, what it uses stays as it is: %s", error)
        self._works = [other for other in self._works if other is not work]
        self._late.append((work, error))
        self.num_failed += 1

    def _settle(self, work: Work) -> bool:
        """Whether it has left the list."""
        try:
            if not work.poll():
                return False
        except TransferError as error:
            if self._error_of(work) is None:
                log.error("a transfer failed, its pages are as before: %s", error)
                self.num_failed += 1
            self._remove(work)
            work.fail(error)
            return True
        self._remove(work)
        work.finish()
        return True

    def _remove(self, work: Work) -> None:
        self._works = [other for other in self._works if other is not work]
        self._late = [(other, error) for other, error in self._late if other is not work]
