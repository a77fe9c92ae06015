"""Probe: one page written to a tier that was switched off and read again, to find out whether it works."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from tiermem import _core
from tiermem.errors import DeadlineError, TransferError
from tiermem.inflight import InFlight
from tiermem.pools import Ids, Tier
from tiermem.store import ColdStore, StoreTransfer

PROBE_BYTE = b"\x5a"


class Probe:
    """In the list of work in flight; its page has no name, and its memory is its own.

    `stages` start one after the other.
    """

    def __init__(
        self,
        store: ColdStore,
        table: _core.PageTable,
        page: Ids,
        stages: list[Callable[[], StoreTransfer]],
        memory: mmap.mmap,
    ) -> None:
        self._store = store
        self._table = table
        self._page = page
        self._stages = stages
        self._memory = memory
        self._running: StoreTransfer | None = None

    def poll(self) -> bool:
        """Whether all stages have ended."""
        while self._running is None or self._running.poll():
            if not self._stages:
                return self._check()
            with self._store.breaker.probing():
                self._running = self._stages.pop(0)()
        return False

    def wait(self) -> None:
        """Block until the stage in progress has ended."""
        if self._running is not None:
            self._running.wait()

    def held(self) -> TransferError | None:
        """Nobody counts on it."""
        return None

    def is_late(self) -> bool:
        """Whether the deadline of the stage in progress is over."""
        return self._running is not None and self._running.is_late()

    def expire(self) -> DeadlineError:
        """It goes on, and fails when it ends."""
        assert self._running is not None
        return self._running.expire()

    def finish(self) -> None:
        """The tier works."""
        self._give_back()
        self._store.breaker.probe_ended(None)

    def fail(self, error: TransferError) -> None:
        """It does not."""
        self._give_back()
        self._store.breaker.probe_ended(error)

    def _check(self) -> bool:
        assert self._running is not None
        if not self._running.intact().all():
            raise TransferError("what was written to the SSD tier as a probe is not what was read")
        return True

    def _give_back(self) -> None:
        self._table.abort(self._page, Tier.SSD)
        self._table.release(self._page)


def start_probe(store: ColdStore, table: _core.PageTable, in_flight: InFlight) -> None:
    """Write one page to a slot that is free; never waits.

    Where none is free the tier is taken to work: what follows will tell. Without memory for the page it is tried
    another time.
    """
    if table.counts(Tier.SSD).free == 0:
        store.breaker.probe_ended(None)
        return
    num_bytes = store.layout.slot_bytes
    try:
        memory = mmap.mmap(-1, 2 * num_bytes)
    except OSError:
        return
    store.breaker.begin_probe()
    page = table.create(1)
    slots = table.reserve(page, Tier.SSD)
    memory[:num_bytes] = PROBE_BYTE * num_bytes  # and zeros where it is to come back
    written = np.array([np.frombuffer(memory, dtype=np.uint8).ctypes.data], dtype=np.int64)
    stages: list[Callable[[], StoreTransfer]] = [
        lambda: store.write(slots, written, [None]),
        lambda: store.read(slots, written + num_bytes),
    ]
    in_flight.add(Probe(store, table, page, stages, memory))
