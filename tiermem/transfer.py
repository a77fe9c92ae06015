"""Transfer: pages on their way from one tier to another, as an entry in the list of work in flight.

A transfer pins its source and holds its destination FILLING from its submission until the list reaps it (rules
R1, R2).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tiermem import _core
from tiermem.device.protocol import Event
from tiermem.errors import CorruptPageError, DeadlineError, TransferError
from tiermem.page_sums import Damage
from tiermem.pools import Ids, Tier, as_ids
from tiermem.quarantine import Quarantine
from tiermem.store import StoreTransfer

Running = Event | StoreTransfer


@dataclass(frozen=True, slots=True)
class Stages:
    """What a transfer has started, and what follows.

    `running` is what was started; `then` starts a second stage when it has ended. `settle` is called once at
    a good end, before the copies become VALID, and answers what was found damaged.
    """

    running: Running
    then: Callable[[], Running] | None
    settle: Callable[[], list[Damage]]


class TransferOwner(Protocol):
    """Who starts transfers, as they see it."""

    @property
    def table(self) -> _core.PageTable: ...

    @property
    def quarantine(self) -> Quarantine: ...

    @property
    def copy_timeout_s(self) -> float: ...

    def note_end(self, transfer: Transfer, num_pages: int) -> None: ...

    def note_full(self) -> None: ...


class Transfer:
    """Pages `ids` moving from `src` to `dst` by `stages`. `release` is called once at any end."""

    def __init__(
        self,
        owner: TransferOwner,
        ids: Ids,
        src: Tier,
        dst: Tier,
        stages: Stages,
        release: Callable[[], None],
    ) -> None:
        self.ids = ids
        self.src = src
        self.dst = dst
        self.error: TransferError | None = None
        self._owner = owner
        self._running: Running | None = stages.running
        self._then = stages.then
        self._settle = stages.settle
        self._release = release
        self._damages: list[Damage] | None = None
        self._damage: CorruptPageError | None = None

    @property
    def event(self) -> Event | None:
        """What a compute stream may wait for instead of the host (R3): a copy in its last stage."""
        running = self._running
        return None if self._then is not None or isinstance(running, StoreTransfer) else running

    def poll(self) -> bool:
        """Whether the last stage has ended and was settled; starts the second when the first has."""
        while self._running is not None and self._advance():
            pass
        if self._running is not None or self.held() is not None:
            return False  # a step that counts on a copy that failed lets go of it first
        if self.error is not None:
            raise self.error
        return True

    def held(self) -> TransferError | None:
        """The error of one that has ended, where a step that counts on it has yet to let go of it."""
        error = self.error or self._damage
        if self._running is not None or error is None:
            return None
        ids = self.ids if self.error is not None else self._damaged_ids()
        return error if self._owner.table.pins(ids, self.dst).any() else None

    def is_late(self) -> bool:
        """Whether the deadline of the stage in progress is over."""
        return self._running is not None and self._running.is_late()

    def expire(self) -> DeadlineError:
        """Nothing that arrives from now on is used: when it ends, it fails."""
        if isinstance(self._running, StoreTransfer):
            error = self._running.expire()
        else:
            error = DeadlineError(
                f"{len(self.ids)} pages were not copied from {self.src.name} towards {self.dst.name} "
                f"within copy_timeout_s={self._owner.copy_timeout_s:g}"
            )
        self.error = self.error or error
        return error

    def check(self) -> None:
        """Raise the TransferError if it is known by now to have failed, or to be late; never blocks."""
        with contextlib.suppress(TransferError):
            self.poll()
        error = self.error or self._damage
        if error is not None:
            raise error

    def wait(self) -> None:
        """Block until the stage in progress has ended; raises DeadlineError at its deadline."""
        if self._running is None:
            return
        try:
            self._running.wait()
        except DeadlineError:
            raise
        except TransferError:
            return  # `poll` raises it again, and the work is settled as failed

    def finish(self) -> None:
        """The copies become VALID, except those that were found damaged, which are quarantined."""
        table, damaged = self._owner.table, self._damaged_ids()
        table.commit(np.setdiff1d(self.ids, damaged, assume_unique=True), self.dst)
        table.abort(damaged, self.dst)
        table.unpin(self.ids, self.src)
        self.error = self._damage
        self._owner.quarantine.drop_found()
        self._end(len(self.ids) - len(damaged))

    def fail(self, error: TransferError) -> None:
        """The pages are as they were before."""
        self.error = error
        if error.errno == errno.ENOSPC and self.dst == Tier.SSD:
            self._owner.note_full()
        self._owner.table.abort(self.ids, self.dst)
        self._owner.table.unpin(self.ids, self.src)
        self._end(0)

    def _advance(self) -> bool:
        """Go on to the next stage where the one in progress has ended, well or not."""
        try:
            if not self._ended():
                return False
            self._running = self._next_stage()
        except TransferError as error:
            self._running = None
            self.error = self.error or error
        return True

    def _next_stage(self) -> Running | None:
        """What was started behind the stage that has ended; None where it was the last, and is settled."""
        then, self._then = self._then, None
        if then is not None and self.error is None:
            return then()
        if self.error is None:
            self._damages = self._settle()
            if self._damages:
                self._damage = self._owner.quarantine.report(self._damages)
        return None

    def _damaged_ids(self) -> Ids:
        return as_ids([damage.page for damage in self._damages or ()])

    def _ended(self) -> bool:
        running = self._running
        assert running is not None
        return running.poll() if isinstance(running, StoreTransfer) else running.done()

    def _end(self, num_pages: int) -> None:
        self._release()
        self._owner.note_end(self, num_pages)
