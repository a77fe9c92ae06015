"""Leases: pins of a sequence's full hot pages that stand between steps.

While the hot tier has room, the pages that a step has found there stay pinned, so that the next step of their
sequence need not look at them one by one. Leases end when room is wanted, and when their sequence has been in no
step for a while: LRU order is then off by that while at most.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tiermem import _core
from tiermem.pools import VALID, Ids, Tier
from tiermem.prefix import Prefixes

IDLE_STEPS = 16
"""A lease ends after so many steps without its sequence: enough for prefills in between the steps of a batch."""


class Lease:
    """The first `num_pages` pages of one sequence, each pinned once in the hot tier.

    Steps in flight that count on it are its users: pins that are given up meanwhile end with the last of them
    (R1, R2). `low_mark` is the least number of pages held since it was last set to `num_pages`; `last_step` counts
    the manager's steps up to the last one with the sequence.
    """

    def __init__(self, table: _core.PageTable, prefixes: Prefixes) -> None:
        self.num_pages = 0
        self.low_mark = 0
        self.last_step = 0
        self._table = table
        self._prefixes = prefixes
        self._pages: Ids = np.empty(0, dtype=np.int64)
        self._given_up: list[Ids] = []
        self._num_users = 0

    def extend(self, pages: Ids) -> None:
        """Hold `pages`, of which the first `num_pages` are held already; the others are VALID and sealed."""
        self._table.pin(pages[self.num_pages :], Tier.GPU)
        self._pages = pages
        self.num_pages = len(pages)

    def trim(self, num_pages: int) -> None:
        """Hold no more than the first `num_pages` pages."""
        if num_pages >= self.num_pages:
            return
        self._given_up.append(self._pages[num_pages : self.num_pages])
        self.num_pages = num_pages
        self.low_mark = min(self.low_mark, num_pages)
        self._let_go()

    def begin_use(self) -> None:
        """A step counts on the pages until `end_use`."""
        self._num_users += 1

    def end_use(self) -> None:
        """That step was reaped, or never began."""
        self._num_users -= 1
        self._let_go()

    def note_use(self) -> None:
        """The pages were used now: what LRU order among named pages goes by."""
        self._prefixes.note_use(self._pages[: self.num_pages])

    def _let_go(self) -> None:
        while self._given_up and self._num_users == 0:
            ids = self._given_up.pop()
            self._prefixes.note_use(ids)
            leaf_first = ids[::-1].copy()  # parents stay hotter than their children
            self._table.unpin(leaf_first, Tier.GPU)
            self._table.touch(leaf_first[self._table.alive(leaf_first)])


class Leases:
    """The leases of one manager, by sequence, the one used longest ago first."""

    def __init__(self, table: _core.PageTable, prefixes: Prefixes) -> None:
        self._table = table
        self._prefixes = prefixes
        self._leases: dict[object, Lease] = {}
        self._num_steps = 0

    def of(self, sequence: object) -> Lease | None:
        """The lease of `sequence`."""
        return self._leases.get(sequence)

    def grant(self, sequence: object, pages: Ids) -> None:
        """Hold `pages`, the full pages of `sequence`, all in the hot tier; not while one is on its way there.

        A copy that may still fail must not be held: its transfer waits until nobody counts on it.
        """
        lease = self._leases.get(sequence)
        held = lease.num_pages if lease is not None else 0
        new = pages[held:]
        if len(new) == 0 or (self._table.states(new, Tier.GPU) != VALID).any():
            return
        if lease is None:
            lease = self._leases[sequence] = Lease(self._table, self._prefixes)
            lease.last_step = self._num_steps
        lease.extend(pages)

    def trim(self, sequence: object, num_pages: int) -> None:
        """`sequence` keeps only its first `num_pages` pages under its lease; with 0 the lease ends."""
        lease = self._leases.get(sequence)
        if lease is not None:
            lease.trim(num_pages)
            if num_pages == 0:
                del self._leases[sequence]

    def step_begins(self, sequences: Iterable[object]) -> None:
        """A step of `sequences` begins: leases of others that were idle for long end."""
        self._num_steps += 1
        for sequence in sequences:
            lease = self._leases.pop(sequence, None)
            if lease is not None:
                lease.last_step = self._num_steps
                self._leases[sequence] = lease
        self.end_idle(IDLE_STEPS)

    def end_idle(self, num_steps: int = 1) -> None:
        """The leases end of sequences that were in none of the last `num_steps` steps."""
        while self._leases:
            sequence, lease = next(iter(self._leases.items()))
            if self._num_steps - lease.last_step < num_steps:
                return
            self.trim(sequence, 0)

    def end_all(self) -> None:
        """Room is wanted; what was used last stays hottest."""
        for sequence in list(self._leases):
            self.trim(sequence, 0)

    def note_use(self) -> None:
        """Every page that is held was used now."""
        for lease in self._leases.values():
            lease.note_use()
