"""Room: how a slot becomes free. Demote ahead of need, drop at need.

`make_room` waits only while something is in flight, and work in flight never waits for the host; so it ends, and
when nothing is in flight and nothing can be dropped the answer is OutOfPagesError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.breaker import Use
from tiermem.disk_budget import DiskGuard
from tiermem.errors import OutOfPagesError, TransferError
from tiermem.inflight import InFlight
from tiermem.lease import Leases
from tiermem.mover import Mover
from tiermem.pools import ABSENT, VALID, Ids, Tier
from tiermem.prefix import Prefixes

log = logging.getLogger("tiermem")

_NO_IDS: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Of one tier, in pages that are free or can be dropped at once: below `low`, demote up to `high`."""

    low: int
    high: int


class Room:
    """Frees slots of one manager's tiers: evicts what is clean, demotes what is dirty.

    `seal_idle` seals the open page of a sequence that is in no step, so that it can be demoted, and answers
    whether there was one. `open_pages` names the pages of all sequences, each once. `guard` says what may be
    written to the SSD though nobody needs it yet; None where there is no SSD tier.
    """

    def __init__(
        self,
        table: _core.PageTable,
        in_flight: InFlight,
        mover: Mover,
        prefixes: Prefixes,
        leases: Leases,
        watermarks: dict[Tier, Watermarks],
        seal_idle: Callable[[], bool],
        open_pages: Callable[[], Ids],
        guard: DiskGuard | None = None,
    ) -> None:
        self._table = table
        self._in_flight = in_flight
        self._mover = mover
        self._prefixes = prefixes
        self._leases = leases
        self._watermarks = watermarks
        self._seal_idle = seal_idle
        self._open_pages = open_pages
        self._guard = guard
        self._lower_tiers = {
            tier: [t for t in Tier if t > tier and table.counts(t).slots > 0] for tier in Tier
        }
        self.evictions = dict.fromkeys(Tier, 0)
        self.demotions = dict.fromkeys(Tier, 0)

    def make_room(self, tier: Tier, wanted: int) -> None:
        """Return when `wanted` slots of `tier` are free.

        Raises
        ------
        OutOfPagesError: they cannot be freed; with the counts of every tier.
        """
        got = self.gain(tier, wanted)
        if got < wanted:
            raise OutOfPagesError(
                f"{tier.name}: {wanted} pages wanted, {got} can be freed; {self.describe()}"
            )

    def gain(self, tier: Tier, wanted: int) -> int:
        """Free up to `wanted` slots of `tier`, waiting for work in flight; how many are free, at most `wanted`."""
        failed = self._in_flight.num_failed
        if not self._may_fill(tier):
            return 0
        if tier == Tier.GPU and wanted > self._table.counts(tier).free:
            self._leases.end_all()
        while (missing := wanted - self._table.counts(tier).free) > 0:
            self.evict(tier, missing)
            missing = wanted - self._table.counts(tier).free
            if missing <= 0:
                break
            if self._in_flight.num_failed > failed:
                return wanted - missing  # the way down is broken: trying again would not end
            started = self.demote(tier, missing - self._mover.leaving[tier])
            if self._in_flight.can_wait:
                self._in_flight.wait_any()
                continue
            self._in_flight.check_held()
            if not started and not self._take_last_resort(tier, missing):
                return wanted - missing
        return wanted

    def is_short(self, tier: Tier) -> bool:
        """Whether copies should go down ahead of need: fewer slots can be had at once than the low watermark."""
        if not self._lower(tier):
            return False
        return self.spare(tier) + self._mover.leaving[tier] < self._watermarks[tier].low

    def spare(self, tier: Tier) -> int:
        """Slots of `tier` that can be had at once."""
        counts = self._table.counts(tier)
        return int(counts.free + counts.droppable)

    def evict(self, tier: Tier, count: int) -> int:
        """Drop up to `count` of the coldest copies that lose nothing; how many."""
        kept = self._kept_while_off(tier)
        self._table.pin(kept, tier)
        try:
            return self._note_dropped(tier, *self._table.evict(tier, count))
        finally:
            self._table.unpin(kept, tier)

    def demote(self, tier: Tier, count: int) -> int:
        """Start copying up to `count` of the coldest dirty pages down, making room for them; how many."""
        started = 0
        for lower in self._lower(tier):
            ids = self._to_demote(tier, lower, count - started)
            if len(ids) == 0:
                break
            if lower == Tier.SSD:
                ids, given_up = self._needed(ids, tier)
                started += given_up
            self._table.pin(ids, tier)  # R4: hold the source while making room for the destination
            try:
                room = self.gain(lower, len(ids))
                started += self._submit_down(ids[:room], tier, lower)
            finally:
                self._table.unpin(ids, tier)
        return started

    def move_down(self, ids: Ids, tier: Tier) -> None:
        """Take the copies of `ids` out of `tier`, after those that have none lower were copied; waits.

        Raises
        ------
        OutOfPagesError: the lower tiers cannot take all of them; some may have moved.
        TransferError: a copy or write failed, or work beyond its deadline still holds pages, which stay.
        """
        held = 0
        while len(ids):
            is_held = self._table.pins(ids, tier) > 0
            held += int(is_held.sum())
            ids = ids[~is_held]
            clean = self._has_lower_copy(ids, tier)
            self._table.drop(ids[clean], tier)
            ids = ids[~clean]
            if len(ids):
                self._copy_some_down(ids, tier)
        if held:
            raise TransferError(
                f"{held} pages stay in {tier.name}: work beyond its deadline still holds them"
            )

    def _copy_some_down(self, ids: Ids, tier: Tier) -> None:
        self._table.pin(ids, tier)  # R4
        try:
            room, lower = 0, tier
            for lower in self._lower(tier):
                if room := self.gain(lower, len(ids)):
                    break
            if not room:
                raise OutOfPagesError(
                    f"{len(ids)} pages cannot leave {tier.name}; {self.describe()}"
                )
            transfers = self._mover.submit(ids[:room], tier, lower)
        finally:
            self._table.unpin(ids, tier)
        self.demotions[tier] += room
        self._in_flight.wait_for(transfers)
        for transfer in transfers:
            if transfer.error is not None:
                raise transfer.error

    def demote_ahead(self) -> None:
        """Background work: where a tier is below its low watermark, start demoting; never waits."""
        for tier in Tier:
            if not self.is_short(tier):
                continue
            lower = self._lower(tier)[0]
            if tier == Tier.GPU:
                self._leases.end_all()  # what they held may be clean, or can be copied now
            ready = self.spare(tier) + self._mover.leaving[tier]
            wanted = max(0, self._watermarks[tier].high - ready)
            ids = self._table.coldest_dirty(tier, wanted)
            missing = len(ids) - self._table.counts(lower).free
            if missing > 0:
                self.evict(lower, missing)
            ids = ids[: self._table.counts(lower).free]
            if lower == Tier.SSD:
                ids = ids[: self.allow(len(ids))]
            self._submit_down(ids[: self._mover.most_without_waiting(tier, lower)], tier, lower)

    def allow(self, num_pages: int) -> int:
        """How many of `num_pages` may be written to the SSD though nobody needs it yet."""
        return num_pages if self._guard is None else self._guard.allow(num_pages)

    def wanted(self, ids: Ids) -> Ids:
        """Those of `ids` that still have someone who refers to them or a name.

        Making room may end the life of pages that can be found through an evicted page alone.
        """
        ids = ids[self._table.alive(ids)]
        return ids[(self._table.refs(ids) > 0) | self._table.is_published(ids)]

    def describe(self) -> str:
        """The counts of every tier, for messages."""
        parts = []
        for tier in Tier:
            c = self._table.counts(tier)
            parts.append(
                f"{tier.name} {c.slots} slots: {c.free} free, {c.droppable + c.redundant} clean, "
                f"{c.dirty} dirty, {c.pinned} pinned, {c.filling} filling, {c.open} open"
            )
        return "; ".join(parts)

    # ---- inside ------------------------------------------------------------------------------------

    def _lower(self, tier: Tier) -> list[Tier]:
        """Where copies of `tier` may go down to now."""
        return [lower for lower in self._lower_tiers[tier] if self._may_fill(lower)]

    def _may_fill(self, tier: Tier) -> bool:
        """Whether the tier is not switched off."""
        return tier != Tier.SSD or self._mover.allows(Use.WRITE)

    def _kept_while_off(self, tier: Tier) -> Ids:
        """Copies of pages in use whose only other ones are in an SSD tier that is switched off."""
        if tier == Tier.SSD or self._mover.allows(Use.READ):
            return _NO_IDS
        ids = self._open_pages()
        here = self._table.states(ids, tier) == VALID
        others = [t for t in Tier if t not in (tier, Tier.SSD)]
        elsewhere = np.logical_or.reduce([self._table.states(ids, t) == VALID for t in others])
        kept: Ids = ids[here & ~elsewhere & (self._table.states(ids, Tier.SSD) == VALID)]
        return kept

    def _to_demote(self, tier: Tier, lower: Tier, count: int) -> Ids:
        """Up to `count` of the coldest dirty pages, then of those that are kept."""
        if count <= 0:
            return _NO_IDS
        ids = self._table.coldest_dirty(tier, count)
        kept = self._kept_while_off(tier)
        kept = kept[
            (self._table.states(kept, lower) == ABSENT) & (self._table.pins(kept, tier) == 0)
        ]
        return np.concatenate([ids, kept[: count - len(ids)]])

    def _has_lower_copy(self, ids: Ids, tier: Tier) -> NDArray[np.bool_]:
        has_lower = np.zeros(len(ids), dtype=np.bool_)
        for lower in self._lower(tier):
            has_lower |= self._table.states(ids, lower) == VALID
        return has_lower

    def _needed(self, ids: Ids, tier: Tier) -> tuple[Ids, int]:
        """Those of `ids` in `tier` that are to be written to the SSD.

        Pages that nobody refers to are given up where the disk is to be spared; how many were.
        """
        unreferenced = np.flatnonzero(self._table.refs(ids) == 0)
        spared = unreferenced[self.allow(len(unreferenced)) :]
        if len(spared) == 0:
            return ids, 0
        given_up = ids[spared]
        self._note_dropped(tier, given_up, self._table.discard(given_up, tier))
        return np.delete(ids, spared), len(spared)

    def _submit_down(self, ids: Ids, tier: Tier, lower: Tier) -> int:
        ids = self.wanted(ids)
        try:
            self._mover.submit(ids, tier, lower)
        except TransferError as error:
            log.error("%s pages stay in %s: %s", len(ids), tier.name, error)
            return 0
        self.demotions[tier] += len(ids)
        return len(ids)

    def _take_last_resort(self, tier: Tier, missing: int) -> bool:
        """Nothing is in flight and nothing is clean or can go down: give up a duplicate, or an idle open page."""
        if self._note_dropped(tier, *self._table.evict_redundant(tier, missing)):
            return True
        return tier == Tier.GPU and self._seal_idle()

    def _note_dropped(self, tier: Tier, dropped: Ids, dead: Ids) -> int:
        self.evictions[tier] += len(dropped)
        self._prefixes.forget_copies(tier, dropped, dead)
        return len(dropped)
