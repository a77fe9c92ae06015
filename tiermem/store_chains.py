"""Chains: how the pages of a store follow each other, from what the index says of each of them.

A *chain* is a stored prompt: the pages from a first one to one that no page follows. Chains that begin alike share
pages, so that all of them are a forest. A *stretch* is a run of pages in it without a fork: what one prompt alone
has, or what the same prompts share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Keys = NDArray[np.uint8]

NO_PAGE = -1
"""In place of a row: there is no such page, or no such stretch."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Runs of pages without a fork; arrays of equal length, one item a stretch.

    firsts, lasts: rows of its first and its last page. before: the stretch that it continues, or NO_PAGE.
    num_pages: how many it has. is_end: whether no page follows, so that a chain ends here.
    """

    firsts: Int64s
    lasts: Int64s
    before: Int64s
    num_pages: Int64s
    is_end: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """How n pages follow each other; arrays of n items, one a page.

    before: the row of the page before, or NO_PAGE. num_after: how many pages follow it directly.
    is_cut: it is no first page, and the page before it is not stored, so that nobody can find it.
    stretch_of: its place in `stretches`.
    """

    before: Int64s
    num_after: Int64s
    is_cut: NDArray[np.bool_]
    stretch_of: Int64s
    stretches: Stretches

    @classmethod
    def of(cls, keys: Keys, parents: Keys, positions: Int64s) -> Forest:
        """The forest of pages with these keys and those of the pages before them, (n, 32) each.

        A page counts as the one before only where its position is one less, so that no damage makes a circle.
        """
        before = rows_of(parents, keys)
        fits = (before != NO_PAGE) & (positions > 0) & (positions[before] == positions - 1)
        before = np.where(fits, before, NO_PAGE)
        num_after = np.bincount(before[fits], minlength=len(keys)).astype(np.int64)
        heads = _heads(before, num_after)
        stretches = _stretches(heads, before, num_after, positions)
        return cls(
            before=before,
            num_after=num_after,
            is_cut=(positions > 0) & ~fits,
            stretch_of=np.searchsorted(stretches.firsts, heads).astype(np.int64),
            stretches=stretches,
        )

    def chain_to(self, row: int) -> list[int]:
        """The rows from the first page to `row`."""
        rows = []
        while row != NO_PAGE:
            rows.append(row)
            row = int(self.before[row])
        return rows[::-1]

    def stretches_to(self, stretch: int) -> list[int]:
        """The stretches from the beginning of a chain to `stretch`."""
        found = []
        while stretch != NO_PAGE:
            found.append(stretch)
            stretch = int(self.stretches.before[stretch])
        return found[::-1]


def rows_of(wanted: Keys, keys: Keys) -> Int64s:
    """For each of `wanted`, (m, 32), its row in `keys`, (n, 32); NO_PAGE where it is not there."""
    if len(keys) == 0 or len(wanted) == 0:
        return np.full(len(wanted), NO_PAGE, dtype=np.int64)
    heads, wanted_heads = first_words(keys), first_words(wanted)
    order = np.argsort(heads, kind="stable")
    places = np.searchsorted(heads[order], wanted_heads)
    rows = order[np.minimum(places, len(keys) - 1)]
    same = (keys[rows] == wanted).all(axis=1)
    for i in np.flatnonzero(~same & (heads[rows] == wanted_heads)):  # 8 bytes alike, 32 not
        alike = np.flatnonzero((keys == wanted[i]).all(axis=1))
        rows[i], same[i] = (alike[0], True) if len(alike) else (NO_PAGE, False)
    return np.where(same, rows, NO_PAGE).astype(np.int64)


def first_words(keys: Keys) -> NDArray[np.uint64]:
    """The first 8 bytes of each key as a number that sorts as the bytes do."""
    heads: NDArray[np.uint64] = (
        np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    )
    return heads


def _heads(before: Int64s, num_after: Int64s) -> Int64s:
    """The row of the first page of each page's stretch."""
    every = np.arange(len(before))
    starts = (before == NO_PAGE) | (num_after[before] != 1)
    heads = np.where(starts, every, before)
    while True:  # the distance doubles each time
        further = heads[heads]
        if np.array_equal(further, heads):
            return heads.astype(np.int64)
        heads = further


def _stretches(heads: Int64s, before: Int64s, num_after: Int64s, positions: Int64s) -> Stretches:
    firsts, places = np.unique(heads, return_inverse=True)
    num_pages = np.bincount(places, minlength=len(firsts)).astype(np.int64)
    lasts = np.zeros(len(firsts), dtype=np.int64)
    order = np.argsort(positions, kind="stable")
    lasts[places[order]] = order  # of several, the last one stays: the greatest position
    outer = before[firsts]
    return Stretches(
        firsts=firsts.astype(np.int64),
        lasts=lasts,
        before=np.where(outer == NO_PAGE, NO_PAGE, places[outer]).astype(np.int64),
        num_pages=num_pages,
        is_end=num_after[lasts] == 0,
    )
