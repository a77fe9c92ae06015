"""Types of the native core. Arrays are one-dimensional, C-contiguous NumPy arrays on the CPU.

Arguments of another dtype, rank or stride raise ``TypeError``; nothing is cast silently.
"""

import enum
from typing import Final, final

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
UInt8s = npt.NDArray[np.uint8]

# -- Page table -----------------------------------------------------------------------------------

NO_SLOT: Final[int]
"""The slot of an ABSENT copy, -1."""

class Tier(enum.IntEnum):
    """Where a copy can be, highest first. The methods below take these or plain ints 0 to 2."""

    GPU = 0
    RAM = 1
    SSD = 2

class CopyState(enum.IntEnum):
    """What `PageTable.states` answers."""

    ABSENT = 0
    FILLING = 1
    VALID = 2

@final
class TierCounts:
    """Slots of one tier by what they are used for; everything but `slots` adds up to `slots`."""

    @property
    def slots(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def filling(self) -> int: ...
    @property
    def droppable(self) -> int: ...
    @property
    def redundant(self) -> int: ...
    @property
    def dirty(self) -> int: ...
    @property
    def pinned(self) -> int:
        """VALID and pinned; a pinned FILLING copy counts as filling."""

    @property
    def open(self) -> int:
        """VALID, open and not pinned."""

@final
class PageTable:
    """Which page has a copy where, and what may be dropped.

    A page id is ``generation << 32 | index``, never 0 or negative; ids of pages that died are
    stale and never name a new page. A copy is ABSENT, FILLING or VALID; a VALID one is pinned,
    open, or in one of three LRU lists: droppable (clean, or unreferenced in the lowest tier),
    redundant (a VALID copy in a higher tier exists), dirty. Copies join the MRU end of their list
    when they are unpinned, touched, or change lists.

    Every call takes a batch, is O(1) a page, and either does all it is asked or raises and changes
    nothing. Calls that may end a page's life return the ids that died, in order of death. One
    thread owns a table.

    Raises
    ------
    InvariantError: a stale id, or a state that does not allow the call (see each method).
    ValueError: a tier, count or number of slots out of range.
    TypeError: an array of the wrong dtype, rank or stride.
    """

    def __init__(self, gpu: int, ram: int, ssd: int) -> None:
        """Slots per tier, in pages. 0 is legal, not for all; the last with slots is the lowest."""

    # Life of a page
    def create(self, count: int) -> Int64s:
        """New open pages without a copy, refs 1 each."""

    def create_stored(self, tier: int, slots: Int64s) -> Int64s:
        """Sealed, published, unreferenced pages, VALID in these free slots; oldest first."""

    def add_ref(self, ids: Int64s) -> None:
        """One more sequence refers to each page. Refused for a dying page."""

    def release(self, ids: Int64s) -> Int64s:
        """One sequence less refers to each; give the tail of a sequence first. Returns the dead.

        At refs 0 an unpublished page dies, as soon as no copy is pinned or FILLING; a published one
        goes to the MRU end of its lists.
        """

    def publish(self, ids: Int64s) -> None:
        """The prefix index names these pages: sealed, not published, not lost, not dying."""

    def unpublish(self, ids: Int64s) -> Int64s:
        """It does no longer; unreferenced pages die as in `release`. Returns the dead."""

    def seal(self, ids: Int64s) -> None:
        """Open pages, VALID in the GPU tier, become read-only."""

    def reopen(self, ids: Int64s) -> None:
        """Sealed pages become writable: refs 1, not published or lost, VALID in GPU alone."""

    def mark_lost(self, ids: Int64s) -> None:
        """The bytes of these pages are gone; the mark stays until the page dies."""

    # Life of a copy
    def reserve(self, ids: Int64s, tier: int) -> Int64s:
        """ABSENT to FILLING; returns the slots, lowest free first. All or nothing.

        Refused for a dying page, and for an open page that has a copy in any tier.
        """

    def commit(self, ids: Int64s, tier: int) -> Int64s:
        """FILLING to VALID; seals an open page below the GPU tier. Returns the dead."""

    def abort(self, ids: Int64s, tier: int) -> Int64s:
        """FILLING and unpinned to ABSENT. Returns the dead."""

    def drop(self, ids: Int64s, tier: int) -> None:
        """VALID and unpinned to ABSENT. Refused for the last VALID copy of a page."""

    def discard(self, ids: Int64s, tier: int) -> Int64s:
        """VALID and unpinned to ABSENT. Returns the dead.

        Even the last: a page that is referred to is then lost, another dies.
        """

    def pin(self, ids: Int64s, tier: int) -> None:
        """Holds VALID or FILLING copies in place; pins count."""

    def unpin(self, ids: Int64s, tier: int) -> Int64s:
        """Ends one pin of each. Returns the dead: dying pages that this pin held."""

    # Choice of victims
    def touch(self, ids: Int64s) -> None:
        """Moves the copies of each page to the MRU end of their lists, in every tier."""

    def evict(self, tier: int, count: int) -> tuple[Int64s, Int64s]:
        """Drops up to `count` droppable copies, coldest first: (dropped, the dead of them)."""

    def evict_redundant(self, tier: int, count: int) -> tuple[Int64s, Int64s]:
        """Drops up to `count` redundant copies, coldest first: (dropped, dead); none dies."""

    def coldest_dirty(self, tier: int, count: int) -> Int64s:
        """Up to `count` pages from the cold end of the dirty list. Changes nothing."""

    # Questions
    def slots(self, ids: Int64s, tier: int) -> Int64s:
        """Slots of VALID and FILLING copies, `NO_SLOT` for ABSENT."""

    def states(self, ids: Int64s, tier: int) -> UInt8s:
        """`CopyState` of each copy."""

    def pins(self, ids: Int64s, tier: int) -> Int64s: ...
    def refs(self, ids: Int64s) -> Int64s: ...
    def has_pins(self, ids: Int64s) -> Bools:
        """Whether a copy in any tier is pinned."""

    def is_sealed(self, ids: Int64s) -> Bools: ...
    def is_published(self, ids: Int64s) -> Bools: ...
    def is_lost(self, ids: Int64s) -> Bools: ...
    def alive(self, ids: Int64s) -> Bools:
        """Whether each number names a page, dying ones included. Raises nothing for stale ids."""

    def counts(self, tier: int) -> TierCounts: ...
    def check(self) -> None:
        """Verifies every invariant by brute force, O(pages + slots); raises `InvariantError`."""

    @property
    def num_pages(self) -> int:
        """Pages alive, dying ones included."""

    @property
    def lowest_tier(self) -> Tier: ...
