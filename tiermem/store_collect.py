"""Collect: which pages of a store are to go, so that what stays can still be found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.store_chains import NO_PAGE, Forest, Int64s
from tiermem.store_content import StoreContent
from tiermem.store_names import GoneReason

Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Wish:
    """Which pages somebody wants gone: those that fit all that is given; None for what is not.

    unused_since_s: last used then or before, seconds since 1970. model: a model id, or the beginning of one or
    of its fingerprint. salt: the beginning of a salt's fingerprint, hexadecimal. label: of the session that
    stored it.
    most_pages: of those that stay, no more than these, the ones used last; applies besides.
    """

    unused_since_s: int | None = None
    model: str | None = None
    salt: str | None = None
    label: str | None = None
    most_pages: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether anything says which pages are meant."""
        return any(
            given is not None for given in (self.unused_since_s, self.model, self.salt, self.label)
        )


@dataclass(frozen=True, slots=True)
class Collection:
    """reasons: why each row is to go. num_needed: pages that were meant, but others that stay follow them."""

    reasons: dict[int, GoneReason]
    num_needed: int


def collect(content: StoreContent, wish: Wish) -> Collection:
    """The pages that are to go: those meant, those over the cap, and those that nobody can find anyway.

    A page that another one needs to be found stays; no page goes without those that follow it.
    """
    forest = content.forest()
    order = np.argsort(-content.positions, kind="stable")  # what follows a page comes before it
    lost = unreachable(forest, content.positions, forest.is_cut)
    meant = _meant(content, wish) & ~lost
    kept = _with_those_before(forest, order, ~meant & ~lost)
    goes = {int(row): GoneReason.UNREACHABLE for row in np.flatnonzero(lost)}
    goes |= {int(row): GoneReason.COLLECTED for row in np.flatnonzero(meant & ~kept)}
    if wish.most_pages is not None:
        over = _coldest(content, forest, order, kept, wish.most_pages)
        goes |= {int(row): GoneReason.CAP for row in over}
    return Collection(goes, int((meant & kept).sum()))


def unreachable(forest: Forest, positions: Int64s, lost: Rows) -> Rows:
    """`lost` and every page that is found through one of those."""
    found = lost.copy()
    before = forest.before
    for row in np.argsort(positions, kind="stable").tolist():
        if before[row] != NO_PAGE and found[before[row]]:
            found[row] = True
    return found


def _meant(content: StoreContent, wish: Wish) -> Rows:
    if not wish.chooses:
        return np.zeros(len(content), dtype=np.bool_)
    meant = np.ones(len(content), dtype=np.bool_)
    if wish.unused_since_s is not None:
        meant &= content.last_use_s <= wish.unused_since_s
    if wish.model is not None or wish.salt is not None:
        meant &= np.isin(content.entries["root"], _roots(content, wish))
    if wish.label is not None:
        numbers = [number for number, text in content.labels.items() if text == wish.label]
        meant &= np.isin(content.entries["label"], numbers)
    return meant


def _roots(content: StoreContent, wish: Wish) -> list[int]:
    """Numbers of the roots of the model and salt that are meant."""
    found = []
    for number, root in content.roots.items():
        names = (root.model_id, root.model.hex())
        is_model = wish.model is None or any(name.startswith(wish.model) for name in names if name)
        if is_model and (wish.salt is None or root.salt.hex().startswith(wish.salt)):
            found.append(number)
    return found


def _with_those_before(forest: Forest, order: Int64s, rows: Rows) -> Rows:
    """`rows` and every page that they are found through."""
    found, before = rows.copy(), forest.before
    for row in order.tolist():
        if found[row] and before[row] != NO_PAGE:
            found[before[row]] = True
    return found


def _coldest(
    content: StoreContent, forest: Forest, order: Int64s, kept: Rows, most_pages: int
) -> Int64s:
    """Which of `kept` are too many, used least recently first, each before those it is found through."""
    used, before = content.last_use_s.copy(), forest.before
    for row in order.tolist():  # a page is in use while one that follows it is
        if kept[row] and before[row] != NO_PAGE:
            used[before[row]] = max(used[before[row]], used[row])
    rows = np.flatnonzero(kept)
    coldest_first = rows[np.lexsort((-content.positions[rows], used[rows]))]
    return coldest_first[: max(0, len(rows) - most_pages)].astype(np.int64)
