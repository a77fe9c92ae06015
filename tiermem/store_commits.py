"""Commits: when what was written to a store becomes durable, and what becomes of a commit that fails or hangs."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable

from tiermem.backoff import Backoff
from tiermem.breaker import Use
from tiermem.errors import DeadlineError, TransferError
from tiermem.guarded_io import GuardedEngine
from tiermem.patience import PatientCall
from tiermem.store_index import Records, StoreIndex
from tiermem.store_payload import Payload

log = logging.getLogger("tiermem")

SYNC_S = 1.0
SYNC_RECORDS = 4096
"""Entries and deletions become durable when the oldest is so many seconds old, or when there are so many."""
MOST_PARTS = 1
"""Of about 8 MiB that are written again where nobody waits for it."""
LONGEST_PAUSE_S = 300.0
"""After commits that failed, until the next one that nobody asked for."""


class Commits:
    """Of one store. A commit makes the payload durable, then the entries that name it.

    What an earlier sync left in doubt is written again first, so that no entry is durable before its page.

    It runs in a thread of its own, because the calls of the system have no deadline, while the caller waits. The
    thread is given its records and touches nothing else of the index: so one that is late can go on while more is
    published, and how it ended is noted when that is known, before the next one begins.

    Parameters
    ----------
    payload: the pages and trailers in the slots.
    timeout_s: deadline of one commit, seconds.
    clock: seconds that never run backwards.
    """

    def __init__(
        self,
        payload: Payload,
        index: StoreIndex,
        engine: GuardedEngine,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._payload = payload
        self._index = index
        self._engine = engine
        self._timeout_s = timeout_s
        self._clock = clock
        self._last_s = clock()
        self._backoff = Backoff(SYNC_S, LONGEST_PAUSE_S, clock)
        self._running: PatientCall | None = None
        """The commit whose end was not noted yet."""
        self._is_payload_synced = False
        """By that commit."""

    @property
    def is_idle(self) -> bool:
        """Whether no thread uses the index or the slots."""
        return self._running is None or self._running.poll()

    def join(self) -> None:
        """Wait for the commit that runs, if any, as long as it takes."""
        if self._running is not None:
            self._running.join()

    def sync(self) -> None:
        """Return when every page and entry written so far is durable.

        Raises
        ------
        TransferError: the disk or the index refused. DeadlineError: it is not over by the deadline; it goes on.
        """
        self._engine.settle_late()
        breaker = self._engine.breaker
        if breaker.num_late:
            raise TransferError(errno.EIO, breaker.describe())
        if self._running is not None:  # one that was late, or that an interrupt left
            with contextlib.suppress(TransferError):
                self._wait(self._running)
            if self._running is not None:
                raise TransferError(errno.EIO, breaker.describe())
        self._write_again()
        records = self._index.begin_commit()
        self._is_payload_synced = False
        self._payload.begin_sync()
        try:
            self._running = PatientCall(
                lambda: self._make_durable(records), "making the SSD tier durable"
            )
        except RuntimeError as error:  # as Python tells of a thread that cannot be had
            self._index.end_commit(is_good=False)
            self._backoff.note_failure()
            raise TransferError(errno.EAGAIN, f"the SSD tier was not synced: {error}") from error
        self._wait(self._running)

    def poll(self) -> None:
        """Make what was published and deleted durable when it is enough or old enough; now and then, a few ms.

        What cannot be made durable now is logged, and tried again after a pause that grows.
        """
        if not self._engine.breaker.allows(Use.WRITE) or not self._backoff.is_over:
            return
        now_s = self._clock()
        if now_s - self._last_s < SYNC_S and self._index.num_pending < SYNC_RECORDS:
            return
        if self._index.num_pending == 0:
            self._last_s = now_s
            return
        try:
            if self._write_again(MOST_PARTS):
                self.sync()
        except TransferError as error:
            log.error("%s; tried again in %g s", error, self._backoff.pause_s)

    def _write_again(self, most_parts: int | None = None) -> bool:
        """Write what is in doubt again; whether none is left."""
        try:
            return self._payload.write_again(most_parts)
        except TransferError:
            self._backoff.note_failure()
            raise

    def _wait(self, call: PatientCall) -> None:
        """Wait for a commit, and note its end where it has one."""
        is_good = False
        try:
            call.wait(self._timeout_s)
            is_good = True
        except DeadlineError as error:
            self._engine.keep_late(call, str(error))
            raise
        finally:
            if call.poll():
                self._running = None
                self._end(is_good=is_good)
            else:
                self._backoff.note_failure()

    def _make_durable(self, records: Records) -> None:
        self._payload.sync()
        self._is_payload_synced = True
        self._index.write(records)

    def _end(self, *, is_good: bool) -> None:
        """Note the end of the commit that began last."""
        self._payload.end_sync(is_good=self._is_payload_synced)
        self._index.end_commit(is_good=is_good)
        if is_good:
            self._last_s = self._clock()
            self._backoff.note_good()
        else:
            self._backoff.note_failure()
