"""Listing: what a store holds as rows, chosen and put in order; nothing of how they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tiermem.store_chains import NO_PAGE, Forest, Int64s
from tiermem.store_content import StoreContent


class SortBy(Enum):
    """What comes first: used last, written last, largest, or found most often."""

    USED = "used"
    AGE = "age"
    SIZE = "size"
    HITS = "hits"


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Of groups of pages, one item a group: how many, the newest write and use (s since 1970), the most hits."""

    num_pages: Int64s
    stored_s: Int64s
    last_use_s: Int64s
    hits: Int64s

    @classmethod
    def of(cls, content: StoreContent, groups: Int64s, num_groups: int) -> Figures:
        """Figures of `num_groups` groups; `groups` says to which each page belongs."""

        def most(values: Int64s) -> Int64s:
            found = np.zeros(num_groups, dtype=np.int64)
            np.maximum.at(found, groups, values)
            return found

        return cls(
            num_pages=np.bincount(groups, minlength=num_groups).astype(np.int64),
            stored_s=most((content.generations // np.uint64(10**9)).astype(np.int64)),
            last_use_s=most(content.last_use_s),
            hits=most(content.hits),
        )

    def order(self, chosen: Int64s, sort: SortBy, sizes: Int64s | None = None) -> Int64s:
        """The groups `chosen`, what comes first by `sort` first; `sizes` in place of num_pages."""
        values = {
            SortBy.USED: self.last_use_s,
            SortBy.AGE: self.stored_s,
            SortBy.SIZE: self.num_pages if sizes is None else sizes,
            SortBy.HITS: self.hits,
        }[sort]
        ties = self.stored_s[chosen]
        order: Int64s = chosen[np.lexsort((chosen, -ties, -values[chosen]))]
        return order


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a listing: some pages and what they have in common.

    row: of the last of these pages, in the content. first_page: the place of the first one in its chain.
    outline: for each fork above, whether more follows below it there; empty outside trees.
    is_end: whether a stored prompt ends here. is_cut: whether a page before is missing, so that nobody finds it.
    """

    row: int
    first_page: int
    num_pages: int
    stored_s: int
    last_use_s: int
    hits: int
    outline: tuple[bool, ...] = ()
    is_end: bool = True
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The rows that are shown, and how many of the things asked for there are in all."""

    rows: tuple[Row, ...]
    num_shown: int
    num_found: int


def list_pages(content: StoreContent, chosen: Int64s, sort: SortBy, limit: int) -> Listing:
    """The pages `chosen`, one a row."""
    every = np.arange(len(content))
    figures = Figures.of(content, every, len(content))
    # of one size: then in the order of their places in the file
    order = figures.order(chosen, sort) if sort is not SortBy.SIZE else chosen
    shown = order[: limit or None]
    forest = content.forest()
    rows = [
        Row(
            row=row,
            first_page=int(content.positions[row]),
            num_pages=1,
            stored_s=int(figures.stored_s[row]),
            last_use_s=int(content.last_use_s[row]),
            hits=int(content.hits[row]),
            is_end=bool(forest.num_after[row] == 0),
            is_cut=bool(forest.is_cut[row]),
        )
        for row in shown.tolist()
    ]
    return Listing(tuple(rows), len(rows), len(chosen))


def list_sessions(content: StoreContent, chosen: Int64s, sort: SortBy, limit: int) -> Listing:
    """The sessions that stored the pages `chosen`, one a row."""
    labels, groups = np.unique(content.entries["label"], return_inverse=True)
    figures = Figures.of(content, groups.astype(np.int64), len(labels))
    wanted = np.unique(groups[chosen]).astype(np.int64)
    shown = figures.order(wanted, sort)[: limit or None]
    rows = [_group_row(content, figures, group, groups) for group in shown.tolist()]
    return Listing(tuple(rows), len(rows), len(wanted))


def list_chains(content: StoreContent, chosen: Int64s, sort: SortBy, limit: int) -> Listing:
    """The chains with a page of `chosen`, as a tree of their stretches, one a row."""
    tree = _Tree(content, content.forest())
    ends = tree.ends_with(chosen)
    shown = tree.figures.order(ends, sort, tree.chain_pages)[: limit or None]
    rows = tuple(tree.rows(shown))
    return Listing(rows, len(shown), len(ends))


class _Tree:
    """The stretches of a store as rows of a tree."""

    def __init__(self, content: StoreContent, forest: Forest) -> None:
        self._content, self._forest = content, forest
        stretches = forest.stretches
        self.figures = Figures.of(content, forest.stretch_of, len(stretches.firsts))
        self.chain_pages: Int64s = content.positions[stretches.lasts] + 1

    def ends_with(self, chosen: Int64s) -> Int64s:
        """The stretches at the end of a chain that has one of these pages."""
        stretches = self._forest.stretches
        marked: NDArray[np.bool_] = np.zeros(len(stretches.firsts), dtype=np.bool_)
        marked[self._forest.stretch_of[chosen]] = True
        while True:  # what follows a marked one is marked; once a fork on the longest way
            before = stretches.before
            wider = marked | ((before != NO_PAGE) & marked[before])
            if np.array_equal(wider, marked):
                return np.flatnonzero(marked & stretches.is_end).astype(np.int64)
            marked = wider

    def rows(self, ends: Int64s) -> Iterator[Row]:
        """What leads to these ends, each stretch once, before all that follow it."""
        after: dict[int, list[int]] = {}
        seen: set[int] = set()
        for end in ends.tolist():
            for stretch in self._forest.stretches_to(end):
                if stretch not in seen:
                    seen.add(stretch)
                    after.setdefault(int(self._forest.stretches.before[stretch]), []).append(
                        stretch
                    )
        waiting: list[tuple[int, tuple[bool, ...]]] = [
            (s, ()) for s in after.get(NO_PAGE, [])[::-1]
        ]
        while waiting:
            stretch, outline = waiting.pop()
            yield self._row(stretch, outline)
            below = after.get(stretch, [])
            waiting += [(s, (*outline, s != below[-1])) for s in below[::-1]]

    def _row(self, stretch: int, outline: tuple[bool, ...]) -> Row:
        stretches, figures = self._forest.stretches, self.figures
        first = int(stretches.firsts[stretch])
        return Row(
            row=int(stretches.lasts[stretch]),
            first_page=int(self._content.positions[first]),
            num_pages=int(stretches.num_pages[stretch]),
            stored_s=int(figures.stored_s[stretch]),
            last_use_s=int(figures.last_use_s[stretch]),
            hits=int(figures.hits[stretch]),
            outline=outline,
            is_end=bool(stretches.is_end[stretch]),
            is_cut=bool(self._forest.is_cut[first]),
        )


def _group_row(
    content: StoreContent, figures: Figures, group: int, groups: NDArray[np.intp]
) -> Row:
    rows = np.flatnonzero(groups == group)
    return Row(
        row=int(rows[-1]),
        first_page=int(content.positions[rows].min()),
        num_pages=int(figures.num_pages[group]),
        stored_s=int(figures.stored_s[group]),
        last_use_s=int(figures.last_use_s[group]),
        hits=int(figures.hits[group]),
    )
