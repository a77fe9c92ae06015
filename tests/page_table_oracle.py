"""A page table that is slow and obvious: what `_core.PageTable` must agree with.

Batches are done one page at a time on a copy, which is thrown away if any page is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from tiermem._core import NO_SLOT, CopyState

TIERS = (0, 1, 2)
LISTS = ("droppable", "redundant", "dirty")


class RefusedError(Exception):
    """The oracle does not allow this."""


@dataclass
class Copy:
    state: CopyState = CopyState.ABSENT
    slot: int = NO_SLOT
    pins: int = 0
    used: int = 0  # when it joined the MRU end of its list
    place: str = ""

    @property
    def is_valid(self) -> bool:
        return self.state == CopyState.VALID


@dataclass
class Page:
    refs: int = 1
    sealed: bool = False
    published: bool = False
    lost: bool = False
    copies: list[Copy] = field(default_factory=lambda: [Copy(), Copy(), Copy()])

    @property
    def dying(self) -> bool:
        return self.refs == 0 and not self.published

    @property
    def num_valid(self) -> int:
        return sum(c.is_valid for c in self.copies)

    @property
    def num_copies(self) -> int:
        return sum(c.state != CopyState.ABSENT for c in self.copies)


def need(holds: bool) -> None:
    if not holds:
        raise RefusedError


class Oracle:
    """One method per verb, for one page; `dead` and `slots` collect what the batch answers."""

    def __init__(self, num_slots: tuple[int, int, int]) -> None:
        self.pages: dict[int, Page] = {}
        self.free = [set(range(n)) for n in num_slots]
        self.lowest = max(tier for tier in TIERS if num_slots[tier])
        self.clock = 0
        self.dead: list[int] = []
        self.slots: list[int] = []

    def copy(self, ids: list[int]) -> Oracle:
        """A copy in which only these pages may be changed; it shares the others."""
        other = copy.copy(self)
        other.pages = dict(self.pages)
        for id_ in set(ids) & self.pages.keys():
            p = self.pages[id_]
            copies = [replace(c) for c in p.copies]
            other.pages[id_] = Page(p.refs, p.sealed, p.published, p.lost, copies)
        other.free = [set(free) for free in self.free]
        other.dead, other.slots = [], []
        return other

    def at(self, id_: int) -> Page:
        need(id_ in self.pages)
        return self.pages[id_]

    # -- Verbs of a page

    def add_ref(self, id_: int, _: int) -> None:
        need(not self.at(id_).dying)
        self.at(id_).refs += 1
        self._settle(id_)

    def release(self, id_: int, _: int) -> None:
        need(self.at(id_).refs > 0)
        self.at(id_).refs -= 1
        if self.at(id_).refs == 0:
            self._settle(id_)
            if id_ in self.pages:
                self.touch(id_, 0)

    def publish(self, id_: int, _: int) -> None:
        page = self.at(id_)
        need(page.sealed and not page.published and not page.lost and page.refs > 0)
        page.published = True

    def unpublish(self, id_: int, _: int) -> None:
        need(self.at(id_).published)
        self.at(id_).published = False
        self._settle(id_)

    def seal(self, id_: int, _: int) -> None:
        page = self.at(id_)
        need(not page.sealed and page.refs > 0 and page.copies[0].is_valid)
        page.sealed = True
        self._settle(id_)

    def reopen(self, id_: int, _: int) -> None:
        page = self.at(id_)
        need(page.sealed and page.refs == 1 and not page.published and not page.lost)
        need(page.copies[0].is_valid and page.num_copies == 1)
        page.sealed = False
        self._settle(id_)

    def mark_lost(self, id_: int, _: int) -> None:
        self.at(id_).lost = True

    def touch(self, id_: int, _: int) -> None:
        for c in self.at(id_).copies:
            self.clock += 1
            c.used = self.clock

    def create_stored(self, id_: int, tier: int, slot: int) -> None:
        self.free[tier].remove(slot)
        self.pages[id_] = Page(refs=0, sealed=True, published=True)
        self.pages[id_].copies[tier] = Copy(CopyState.VALID, slot)
        self._settle(id_)

    # -- Verbs of a copy

    def reserve(self, id_: int, tier: int) -> None:
        page = self.at(id_)
        need(page.copies[tier].state == CopyState.ABSENT and not page.dying)
        need(page.sealed or page.num_copies == 0)
        need(bool(self.free[tier]))
        slot = min(self.free[tier])
        self.free[tier].remove(slot)
        page.copies[tier] = Copy(CopyState.FILLING, slot)
        self.slots.append(slot)

    def commit(self, id_: int, tier: int) -> None:
        page = self.at(id_)
        need(page.copies[tier].state == CopyState.FILLING)
        page.copies[tier].state = CopyState.VALID
        page.sealed = page.sealed or tier > 0
        self._settle(id_)

    def abort(self, id_: int, tier: int) -> None:
        c = self.at(id_).copies[tier]
        need(c.state == CopyState.FILLING and c.pins == 0)
        self._remove(id_, tier)
        self._settle(id_)

    def drop(self, id_: int, tier: int) -> None:
        c = self.at(id_).copies[tier]
        need(c.is_valid and c.pins == 0 and self.at(id_).num_valid > 1)
        self._remove(id_, tier)
        self._settle(id_)

    def discard(self, id_: int, tier: int) -> None:
        page = self.at(id_)
        need(page.copies[tier].is_valid and page.copies[tier].pins == 0)
        self._remove(id_, tier)
        page.lost = page.lost or (page.num_valid == 0 and not page.dying)
        self._settle(id_)

    def pin(self, id_: int, tier: int) -> None:
        c = self.at(id_).copies[tier]
        need(c.state != CopyState.ABSENT and not self.at(id_).dying)
        c.pins += 1
        self._settle(id_)

    def unpin(self, id_: int, tier: int) -> None:
        need(self.at(id_).copies[tier].pins > 0)
        self.at(id_).copies[tier].pins -= 1
        self._settle(id_)

    # -- Questions

    def list(self, tier: int, place: str) -> list[int]:
        """Ids of a list, least recently used first."""
        ids = [id_ for id_, page in self.pages.items() if page.copies[tier].place == place]
        return sorted(ids, key=lambda id_: self.pages[id_].copies[tier].used)

    # -- What follows from a change

    def _remove(self, id_: int, tier: int) -> None:
        self.free[tier].add(self.pages[id_].copies[tier].slot)
        self.pages[id_].copies[tier] = Copy()

    def _place(self, page: Page, tier: int) -> str:
        if not page.copies[tier].is_valid:
            return ""
        if page.copies[tier].pins:
            return "pinned"
        if not page.sealed:
            return "open"
        is_clean = any(c.is_valid for c in page.copies[tier + 1 :])
        if is_clean or (tier == self.lowest and page.refs == 0):
            return "droppable"
        return "redundant" if any(c.is_valid for c in page.copies[:tier]) else "dirty"

    def _settle(self, id_: int) -> None:
        page = self.pages[id_]
        for tier in TIERS:
            if page.dying and page.copies[tier].is_valid and page.copies[tier].pins == 0:
                self._remove(id_, tier)
        for tier, c in enumerate(page.copies):
            place = self._place(page, tier)
            if place != c.place:
                self.clock += 1
                c.used, c.place = self.clock, place
        if page.refs == 0 and page.num_copies == 0:
            self.dead.append(id_)
            del self.pages[id_]
