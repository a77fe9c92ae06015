"""Plan: where each page of a step's sequences is read and written.

A page is either *hot* (read and written in its slot of the hot pool), *streamed* (old, read layer by layer
through the ring) or *write-through* (new, filled layer by layer in a lower tier, because the hot tier has no
slot for it). Pages that a step writes are new or open; a sealed last page that must grow is continued in a new
page that starts with its bytes (`base`).

Where leases say that everything is hot, the plan costs native calls per batch only (`plan_resident`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tiermem.core import Core
from tiermem.device.protocol import Direction
from tiermem.errors import OutOfPagesError, TransferError
from tiermem.lease import Lease
from tiermem.pools import FILLING, NO_SLOT, VALID, Ids, Slots, Tier
from tiermem.sequence import Sequence
from tiermem.transfer import Transfer

NO_PAGE = 0
"""Not an id: where a write-through page has no base."""
NO_PAGES: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Copies of `ids` in `tier`, each held once; compared by identity."""

    ids: Ids
    tier: Tier


@dataclass(slots=True, eq=False)
class Share:
    """One sequence's part of a step: `new_tokens` rows from `first_row` on.

    `pages` are all pages after the step; the ones from `first_written` on are written by it. `bases` names, for
    each written page, the page whose bytes it continues, or NO_PAGE. `homes` is the tier each page is read and
    written in during the step: GPU for hot ones.
    """

    sequence: Sequence
    new_tokens: int
    first_row: int
    pages: Ids
    first_written: int
    bases: Ids
    homes: Slots
    replaced: Ids

    @property
    def is_hot(self) -> bool:
        """Whether every page is read and written in the hot pool."""
        return bool((self.homes == Tier.GPU).all())

    @property
    def past_tokens(self) -> int:
        """Tokens stored before the step."""
        return self.sequence.num_tokens

    @property
    def written(self) -> Ids:
        """The pages that the step writes."""
        return self.pages[self.first_written :]


@dataclass(slots=True, eq=False)
class Plan:
    """Shares of a step and what it holds: pins until the step was reaped, created pages until it failed.

    `is_resident` says that every page is hot, old and written.
    """

    shares: list[Share] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    created: list[Ids] = field(default_factory=list)
    promotions: list[Transfer] = field(default_factory=list)
    reads: dict[Tier, int] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    is_resident: bool = False

    @property
    def num_rows(self) -> int:
        """New tokens of all sequences."""
        return sum(share.new_tokens for share in self.shares)

    def pin(self, core: Core, ids: Ids, tier: Tier) -> Pin:
        """Hold copies until `release_pins`, or until `unpin` of what this returns."""
        core.table.pin(ids, tier)
        pin = Pin(ids, tier)
        self.pins.append(pin)
        return pin

    def unpin(self, core: Core, pin: Pin) -> None:
        """Let go of some copies before the step has begun."""
        self.pins.remove(pin)
        core.table.unpin(pin.ids, pin.tier)

    def release_pins(self, core: Core) -> None:
        """The step was reaped, or never began."""
        while self.pins:
            self.unpin(core, self.pins[-1])
        while self.leases:
            self.leases.pop().end_use()

    def discard_created(self, core: Core) -> None:
        """The step failed: its new pages die. No pin of the step may be left."""
        while self.created:
            ids = self.created.pop()
            for tier in (Tier.RAM, Tier.SSD):
                core.table.abort(ids[core.table.states(ids, tier) == FILLING], tier)
            core.table.release(ids)


def make_plan(core: Core, sequences: list[Sequence], new_tokens: list[int]) -> Plan:
    """Plan a step and get hold of all it needs; on an error everything is as before.

    Raises
    ------
    OutOfPagesError: all tiers together have no room for the new pages.
    CorruptPageError, TransferError: an old page could not be brought back.
    """
    plan = Plan()
    try:
        Planner(core, plan).run(sequences, new_tokens)
    except BaseException:
        with contextlib.suppress(TransferError):
            core.mover.to_device.synchronize()  # nothing may still be written into the new pages
        plan.release_pins(core)
        plan.discard_created(core)
        raise
    return plan


def plan_resident(core: Core, sequences: list[Sequence], new_tokens: list[int]) -> Plan | None:
    """The plan of a step whose old pages are all held hot by leases, without looking at each of them.

    None where that is not so, or where the new pages find no room without waiting; nothing has changed then but
    that clean copies may have been dropped.
    """
    page_tokens = core.layout.page_tokens
    firsts = [sequence.num_tokens // page_tokens for sequence in sequences]
    leases = [core.leases.of(sequence) for sequence in sequences]
    held = [lease for lease in leases if lease is not None]
    if [0 if lease is None else lease.num_pages for lease in leases] != firsts:
        return None
    tails = [s.pages[first:] for s, first in zip(sequences, firsts, strict=True)]
    open_tails = np.concatenate(tails)
    if core.table.is_sealed(open_tails).any():
        return None
    counts = [
        core.layout.pages_for(sequence.num_tokens + count) - len(sequence.pages)
        for sequence, count in zip(sequences, new_tokens, strict=True)
    ]
    num_new = sum(counts)
    if not _has_free(core, num_new):
        return None
    reads = {Tier.GPU: sum(firsts) + len(open_tails), Tier.RAM: 0, Tier.SSD: 0}
    plan = Plan(reads=reads, leases=held, is_resident=True)
    for lease in held:
        lease.begin_use()
    new = core.table.create(num_new)
    plan.created.append(new)
    core.table.reserve(new, Tier.GPU)
    core.table.commit(new, Tier.GPU)  # open and VALID: the step itself fills it
    plan.pin(core, np.concatenate([open_tails, new]), Tier.GPU)
    row, taken = 0, 0
    for i, sequence in enumerate(sequences):
        pages = sequence.pages
        if counts[i]:
            pages = np.concatenate([pages, new[taken : taken + counts[i]]])
            taken += counts[i]
        bases, homes = _without_bases(len(pages) - firsts[i]), _all_hot(len(pages))
        plan.shares.append(
            Share(sequence, new_tokens[i], row, pages, firsts[i], bases, homes, NO_PAGES)
        )
        row += new_tokens[i]
    return plan


def _has_free(core: Core, num_pages: int) -> bool:
    """Whether as many hot slots are free, after dropping what is clean."""
    missing = num_pages - core.table.counts(Tier.GPU).free
    return missing <= 0 or core.room.evict(Tier.GPU, missing) == missing


@lru_cache(maxsize=256)
def _all_hot(num_pages: int) -> Slots:
    return np.broadcast_to(np.int64(Tier.GPU), num_pages)


@lru_cache(maxsize=256)
def _without_bases(num_pages: int) -> Ids:
    return np.broadcast_to(np.int64(NO_PAGE), num_pages)


class Planner:
    """Fills a plan, in the order that keeps R4: what is needed is pinned before room is made for the next."""

    def __init__(self, core: Core, plan: Plan) -> None:
        self._core = core
        self._table = core.table
        self._plan = plan

    def run(self, sequences: list[Sequence], new_tokens: list[int]) -> None:
        """All of it; `Plan.shares` has every field set afterwards."""
        row = 0
        old = np.unique(np.concatenate([np.empty(0, np.int64), *(s.pages for s in sequences)]))
        self._core.settle_filling(old, Tier.GPU)
        tiers = self._core.best_tiers(old)
        self._plan.reads = {tier: int((tiers == tier).sum()) for tier in Tier}
        for sequence in sequences:
            self._core.touch(sequence.pages)
        for sequence, count in zip(sequences, new_tokens, strict=True):
            self._plan.shares.append(self._outline(sequence, count, row))
            row += count
        self._pin_hot()
        self._place_tails()
        self._place_rest()
        self._place_write_through()
        self._pin_streamed()
        self._fill_bases()

    # ---- which pages -------------------------------------------------------------------------------

    def _outline(self, sequence: Sequence, new_tokens: int, row: int) -> Share:
        """The share with its pages; nothing has a home yet but an open last page."""
        layout, table = self._core.layout, self._table
        total = layout.pages_for(sequence.num_tokens + new_tokens)
        first = sequence.num_tokens // layout.page_tokens
        kept = sequence.pages[:first]
        tail = sequence.pages[first:]
        bases = np.full(total - first, NO_PAGE, dtype=np.int64)
        homes = np.full(total, NO_SLOT, dtype=np.int64)
        if len(tail) and not table.is_sealed(tail)[0]:
            self._plan.pin(self._core, tail, Tier.GPU)
            homes[first] = Tier.GPU
            pages = np.concatenate([kept, tail, self._create(total - first - 1)])
            return Share(sequence, new_tokens, row, pages, first, bases, homes, tail[:0])
        bases[: len(tail)] = tail
        for tier in Tier:  # whatever room is made for, the bytes to continue stay where they are
            self._plan.pin(self._core, tail[table.states(tail, tier) == VALID], tier)
        pages = np.concatenate([kept, self._create(total - first)])
        return Share(sequence, new_tokens, row, pages, first, bases, homes, tail)

    def _create(self, count: int) -> Ids:
        ids = self._table.create(count)
        self._plan.created.append(ids)
        return ids

    # ---- which place -------------------------------------------------------------------------------

    def _place_tails(self) -> None:
        """The last page of every sequence should be hot: between steps it is open."""
        if self._place_hot(self._homeless_tails()):
            return
        # the step's own old pages make way; they will be streamed
        for share, pin in self._hot_pins:
            self._plan.unpin(self._core, pin)
            share.homes[: share.first_written] = NO_SLOT
        self._place_hot(self._homeless_tails())
        self._pin_hot()

    def _homeless_tails(self) -> list[tuple[Share, int]]:
        return [(s, len(s.pages) - 1) for s in self._plan.shares if s.homes[-1] == NO_SLOT]

    def _place_rest(self) -> None:
        """As many as fit of the other written pages, then of the old ones that are not hot."""
        written = [
            (share, index)
            for share in self._plan.shares
            for index in range(share.first_written, len(share.pages) - 1)
            if share.homes[index] == NO_SLOT
        ]
        self._place_hot(written)
        self._promote_missing()

    def _place_hot(self, places: list[tuple[Share, int]]) -> bool:
        """Give the first of `places` hot slots, as many as can be had; whether all got one."""
        got = self._core.room.gain(Tier.GPU, len(places))
        ids = np.array([share.pages[index] for share, index in places[:got]], dtype=np.int64)
        self._table.reserve(ids, Tier.GPU)
        self._table.commit(ids, Tier.GPU)  # open and VALID: the step itself fills it
        self._plan.pin(self._core, ids, Tier.GPU)
        for share, index in places[:got]:
            share.homes[index] = Tier.GPU
        return got == len(places)

    def _pin_hot(self) -> None:
        """What is on the GPU already stays there."""
        self._hot_pins: list[tuple[Share, Pin]] = []
        for share in self._plan.shares:
            old = share.pages[: share.first_written]
            hot = self._table.states(old, Tier.GPU) == VALID
            self._hot_pins.append((share, self._plan.pin(self._core, old[hot], Tier.GPU)))
            share.homes[: share.first_written][hot] = Tier.GPU

    def _promote_missing(self) -> None:
        missing = self._missing()
        if len(missing) == 0:
            return
        got = self._core.room.gain(Tier.GPU, len(missing))
        self._plan.promotions = self._core.promote(missing[:got])
        for transfer in self._plan.promotions:
            transfer.check()  # one that failed may have been reaped: its pages have no copy to pin
        for share in self._plan.shares:
            old = share.pages[: share.first_written]
            new = np.isin(old, missing[:got]) & (share.homes[: share.first_written] == NO_SLOT)
            self._plan.pin(self._core, old[new], Tier.GPU)
            share.homes[: share.first_written][new] = Tier.GPU
        compute = self._core.device.compute_stream()
        for transfer in self._plan.promotions:
            if transfer.event is not None:
                compute.wait_event(transfer.event)  # R3
            transfer.check()

    def _missing(self) -> Ids:
        """Old pages without a home, each once, in the order of the sequences."""
        parts = [
            s.pages[: s.first_written][s.homes[: s.first_written] == NO_SLOT]
            for s in self._plan.shares
        ]
        ids = np.concatenate([np.empty(0, np.int64), *parts])
        return ids[np.sort(np.unique(ids, return_index=True)[1])]

    def _place_write_through(self) -> None:
        """Written pages that found no hot slot are filled in RAM, then on the SSD."""
        places = [
            (share, index)
            for share in self._plan.shares
            for index in range(share.first_written, len(share.pages))
            if share.homes[index] == NO_SLOT
        ]
        wanted = len(places)
        for tier in (Tier.RAM, Tier.SSD):
            got = self._core.room.gain(tier, len(places))
            now, places = places[:got], places[got:]
            if now:
                ids = np.array([share.pages[index] for share, index in now], dtype=np.int64)
                self._table.reserve(ids, tier)
                for share, index in now:
                    share.homes[index] = tier
        if places:
            raise OutOfPagesError(
                f"the step writes {wanted} pages beyond the free hot slots, {len(places)} of them find "
                f"no room in any tier; {self._core.room.describe()}"
            )

    def _pin_streamed(self) -> None:
        for share in self._plan.shares:
            old = share.pages[: share.first_written]
            cold = np.flatnonzero(share.homes[: share.first_written] == NO_SLOT)
            tiers = self._core.best_tiers(old[cold])
            share.homes[cold] = tiers
            for tier in (Tier.RAM, Tier.SSD):
                self._plan.pin(self._core, old[cold][tiers == tier], tier)

    # ---- what a page continues ---------------------------------------------------------------------

    def _fill_bases(self) -> None:
        """Copy the bytes that a hot written page continues into its slot."""
        for share in self._plan.shares:
            base = share.bases[:1]
            if base[0] != NO_PAGE and share.homes[share.first_written] == Tier.GPU:
                self._copy_page(base, share.written[:1])
                share.bases[0] = NO_PAGE

    def _copy_page(self, src: Ids, dst: Ids) -> None:
        core, layout = self._core, self._core.layout
        tier = Tier(int(core.best_tiers(src)[0]))
        target = core.pools[Tier.GPU].addresses(self._table.slots(dst, Tier.GPU))
        stream = core.mover.to_device
        # the slot's last reader and the base's writer were reaped, or ran on the compute stream before
        stream.wait_event(core.device.compute_stream().record())
        copied = []
        if tier == Tier.SSD:
            for layer in range(layout.num_layers):
                core.ring.load(0, layer, src, np.array([tier], dtype=np.int64))
                copied.append(core.ring.copy_out(0, target + layer * layout.layer_bytes))
        else:
            source = core.pools[tier].addresses(self._table.slots(src, tier))
            direction = Direction.DEVICE_TO_DEVICE if tier == Tier.GPU else Direction.HOST_TO_DEVICE
            core.device.copy(direction, target, source, layout.page_bytes, stream)
            copied.append(stream.record())
        for event in copied:
            core.device.compute_stream().wait_event(event)
            event.done()  # raises if it is known by now to have failed
