"""Planner: makes the plan of a step and gets hold of all it needs, or leaves everything as it was.

Where leases say that everything is hot, that costs a few native calls a batch (`plan_resident`); else every page
is looked at (`make_plan`), in batches too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tiermem.core import Core
from tiermem.device.protocol import Direction
from tiermem.device_work import release_when_over
from tiermem.errors import OutOfPagesError
from tiermem.plan import NO_PAGE, NO_PAGES, Pin, Plan, Share
from tiermem.pools import NO_SLOT, VALID, Ids, Slots, Tier
from tiermem.sequence import Sequence
from tiermem.trace import traced


@traced("plan")
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
        undo(core, plan)
        raise
    return plan


def undo(core: Core, plan: Plan, *used: object) -> None:
    """Let go of all that the plan of a failed step holds, once nothing can write there any more.

    Where that misses its deadline, it happens when it is over. What the device uses besides is kept as long.
    """
    kept = list(used)

    def release() -> None:
        kept.clear()
        plan.release_pins(core)
        plan.discard_created(core)

    streams = [
        core.device.compute_stream(),
        core.mover.to_host,
        core.mover.to_device,
        core.mover.checks,
    ]
    release_when_over(core.in_flight, "an undone step", streams, release, core.mover.has_no_late_io)


@traced("plan")
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


Places = list[tuple[Share, Slots]]
"""Shares, each with the indices of some of its pages."""


def _homeless(share: Share, start: int, end: int) -> Slots:
    """Indices in [start, end) of the pages that have no home."""
    return start + np.flatnonzero(share.homes[start:end] == NO_SLOT)


def _take_homes(places: Places, count: int, tier: Tier) -> Ids:
    """The first `count` of `places` have their home in `tier` from now on; their pages."""
    taken = [NO_PAGES]
    for share, indices in places:
        now = indices[:count]
        share.homes[now] = tier
        taken.append(share.pages[now])
        count -= len(now)
    return np.concatenate(taken)


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

    def _homeless_tails(self) -> Places:
        return [(s, _homeless(s, len(s.pages) - 1, len(s.pages))) for s in self._plan.shares]

    def _place_rest(self) -> None:
        """As many as fit of the other written pages, then of the old ones that are not hot."""
        written = [(s, _homeless(s, s.first_written, len(s.pages) - 1)) for s in self._plan.shares]
        self._place_hot(written)
        self._promote_missing()

    def _place_hot(self, places: Places) -> bool:
        """Give the first of `places` hot slots, as many as can be had; whether all got one."""
        wanted = sum(len(indices) for _, indices in places)
        got = self._core.room.gain(Tier.GPU, wanted)
        ids = _take_homes(places, got, Tier.GPU)
        self._table.reserve(ids, Tier.GPU)
        self._table.commit(ids, Tier.GPU)  # open and VALID: the step itself fills it
        self._plan.pin(self._core, ids, Tier.GPU)
        return got == wanted

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
        if got == 0:
            return
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
        wanted = self._count_unplaced()
        for tier in (Tier.RAM, Tier.SSD):
            got = self._core.room.gain(tier, self._count_unplaced())
            self._table.reserve(_take_homes(self._unplaced(), got, tier), tier)
        if missing := self._count_unplaced():
            raise OutOfPagesError(
                f"the step writes {wanted} pages beyond the free hot slots, {missing} of them find "
                f"no room in any tier; {self._core.room.describe()}"
            )

    def _unplaced(self) -> Places:
        """Written pages without a home."""
        return [(s, _homeless(s, s.first_written, len(s.pages))) for s in self._plan.shares]

    def _count_unplaced(self) -> int:
        return sum(len(indices) for _, indices in self._unplaced())

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
            base = share.bases[:1].copy()
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
        copied, every = [], range(layout.num_layers)
        if tier == Tier.SSD:
            for layer in every:
                self._plan.checks.append(
                    core.ring.load(0, layer, src, np.array([tier], dtype=np.int64))
                )
                copied.append(core.ring.copy_out(0, target + layer * layout.layer_bytes))
        else:
            there = self._table.slots(src, tier)
            source = core.pools[tier].addresses(there)
            direction = Direction.DEVICE_TO_DEVICE if tier == Tier.GPU else Direction.HOST_TO_DEVICE
            core.device.copy(direction, target, source, layout.page_bytes, stream)
            copied.append(stream.record())
        for event in copied:
            core.device.compute_stream().wait_event(event)
            event.done()  # raises if it is known by now to have failed
        if tier != Tier.SSD:
            rows, tiers = core.mover.sums.rows(tier, there), np.array([tier], dtype=np.int64)
            check = core.mover.sums.check(target, rows, src, tiers, there)
            core.mover.sums.verify(check, every, core.device.compute_stream())
            self._plan.checks.append(check)
