"""Prefixes: pages of finished prompts by content, so that the next prompt finds them.

A published page is called by its chain hash: a cryptographic hash over (page layout, model id, shard, salt) and
all its tokens from the start of the sequence. An entry names a sealed page whose tokens equal the key's (I7).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.layout import PageLayout
from tiermem.pools import Ids, Tier
from tiermem.store import ColdStore, StoredPages
from tiermem.store_names import (
    KEY_BYTES,
    NO_ROOT,
    ChainRoot,
    GoneReason,
    PageName,
    root_hash,
)

INDEX_MASK = 2**32 - 1
"""The lower half of a page id: small numbers, used again by later pages."""
MANY_PAGES = 100_000
"""From so many on, what loading a store took is given back to the system: about 90 bytes a page."""
MIN_ORIGINS = 4096
"""Roots and labels are kept for pages that are named no longer up to this many, or twice those in use."""


class Prefixes:
    """The prefix index of one manager, kept in step with the page table and the store."""

    def __init__(
        self,
        layout: PageLayout,
        model_id: str,
        shard: tuple[int, int],
        table: _core.PageTable,
        store: ColdStore | None,
    ) -> None:
        self._table = table
        self._store = store
        self._index = _core.PrefixIndex(layout.page_tokens)
        self._layout, self._model_id, self._shard = layout, model_id, shard
        self._clock = 0
        self._last_use = np.zeros(0, dtype=np.int64)  # both by the lower half of a page's id
        self._origin = np.zeros(0, dtype=np.int32)
        self._origins = [(NO_ROOT, "")]
        self._origin_places = {(NO_ROOT.hash, ""): 0}
        self._most_origins = MIN_ORIGINS
        if store is not None:
            self._adopt(store)

    def __len__(self) -> int:
        return self._index.size

    # ---- finding -----------------------------------------------------------------------------------

    def root(self, salt: bytes) -> bytes:
        """The parent of every first page under `salt`: never equal for other layouts, models, shards or salts."""
        return root_hash(self._layout, self._model_id, self._shard, salt)

    def chain_root(self, salt: bytes) -> ChainRoot:
        """That root with what it is made of, as stored pages tell it."""
        return ChainRoot.of(self.root(salt), self._model_id, self._shard, salt)

    def chain(self, parent: bytes, tokens: NDArray[np.int64]) -> list[bytes]:
        """The chain hash of each whole page of `tokens`, 32 bytes each."""
        return [row.tobytes() for row in self._index.chain(parent, tokens)]

    def match(self, keys: list[bytes]) -> Ids:
        """The pages of the longest stored prefix of the chain `keys`; each has an intact copy."""
        ids = self._index.match(_rows(keys))
        lost = np.flatnonzero(self._table.is_lost(ids))
        return ids[: lost[0]] if len(lost) else ids

    def note_attached(self, pages: Ids, keys: list[bytes]) -> None:
        """These pages, called so, are used by one more sequence that did not compute them."""
        self.note_use(pages)
        if self._store is not None:
            self._store.index.note_hits(keys)

    # ---- publishing --------------------------------------------------------------------------------

    def publish(
        self,
        pages: Ids,
        parent: bytes,
        keys: list[bytes],
        position: int,
        root: ChainRoot,
        label: str = "",
    ) -> None:
        """Name sealed pages, the first at `position` in its chain; names that are taken stay where they are.

        `root` is where the chain starts, `label` the sequence's: stored pages tell both.
        Pages that were written to the store before they had a name get it in the store by the next `flush`.
        """
        # a page that two sequences share may have its name from the other one already
        nameless = ~(self._index.names(pages)[3] | self._table.is_lost(pages))
        self.note_use(pages)
        origin = self._origin_place(root, label) if nameless.any() else 0
        for i in np.flatnonzero(nameless):
            above = keys[i - 1] if i else parent
            if self._index.insert(above, keys[i], int(pages[i]), position + int(i)):
                self._table.publish(pages[i : i + 1])
                self._origin[pages[i] & INDEX_MASK] = origin

    def names_of(self, ids: Ids) -> list[PageName | None]:
        """What each page is called; None for one without a name."""
        keys, parents, positions, named = self._index.names(ids)
        names: list[PageName | None] = [None] * len(ids)
        for i in np.flatnonzero(named).tolist():
            root, label = self._origins[self._origin[ids[i] & INDEX_MASK]]
            key, above = keys[i].tobytes(), parents[i].tobytes()
            names[i] = PageName(key, above, int(positions[i]), root, label)
        return names

    def pages(self) -> Ids:
        """Every published page, least recently used first, children before their parents.

        A page counts as used whenever one that follows it was: without it, that one could not be found.
        """
        self._index.raise_parents(self._last_use)
        leaf_first = self._index.pages()[::-1]
        return leaf_first[np.argsort(self._last_use[leaf_first & INDEX_MASK], kind="stable")]

    def note_use(self, ids: Ids) -> None:
        """These pages are used now. Kept for pages without a name too: they may get one."""
        places = ids & INDEX_MASK
        self._reserve(ids)
        self._clock += 1
        self._last_use[places] = self._clock

    # ---- forgetting --------------------------------------------------------------------------------

    def forget_copies(self, tier: Tier, dropped: Ids, dead: Ids) -> None:
        """Copies of `dropped` in `tier` are gone, and the pages `dead` with them.

        What is gone from the SSD leaves the store's index. Pages that can no longer be found, because a page
        before them is gone, go too.
        """
        if tier == Tier.SSD and self._store is not None and len(dropped):
            keys = [name.key for name in self.names_of(dropped) if name]
            self._store.index.unpublish_keys(keys, GoneReason.EVICTED)
        self.forget(dead)

    def forget(self, ids: Ids) -> None:
        """Take pages that died or were lost, and all that follow them, out of the index."""
        if len(ids) == 0:
            return
        removed, keys = self._index.remove(ids)
        alive = self._table.alive(removed)
        self._unpublish(removed[alive], keys[alive])

    # ---- a store that is opened again --------------------------------------------------------------

    def _adopt(self, store: ColdStore) -> None:
        self._take_over(store.index.take_stored())
        if len(self) >= MANY_PAGES:
            _give_memory_back()

    def _take_over(self, stored: StoredPages) -> None:
        created = self._table.create_stored(Tier.SSD, stored.slots[stored.order])
        ids = np.empty_like(created)
        ids[stored.order] = created
        self._reserve(ids)
        last_use_s = stored.last_use_s[stored.order]
        rises = np.diff(last_use_s, prepend=last_use_s[:1]) > 0
        self._last_use[created & INDEX_MASK] = np.cumsum(rises)
        self._clock = int(rises.sum())
        places = [self._origin_place(root, label) for root, label in stored.names]
        self._origin[ids & INDEX_MASK] = np.array(places, dtype=np.int32)[stored.origins]
        orphans = self._index.insert_many(stored.parents, stored.keys, ids, stored.positions)
        self._unpublish(orphans, stored.keys[np.isin(ids, orphans)])
        if self._index.raise_parents(self._last_use):
            self._table.touch(self.pages())

    # ---- inside ------------------------------------------------------------------------------------

    def _reserve(self, ids: Ids) -> None:
        """Have a place for each of `ids` in the arrays."""
        count = int((ids & INDEX_MASK).max(initial=-1)) + 1
        if count > len(self._last_use):
            more = count + count // 8 + 1024 - len(self._last_use)
            self._last_use = np.pad(self._last_use, (0, more))
            self._origin = np.pad(self._origin, (0, more))

    def _origin_place(self, root: ChainRoot, label: str) -> int:
        """The place of root and label among `_origins`, where pages have it from."""
        place = self._origin_places.get((root.hash, label))
        if place is None:
            if len(self._origins) >= self._most_origins:
                self._drop_origins()
            place = len(self._origins)
            self._origins.append((root, label))
            self._origin_places[root.hash, label] = place
        return place

    def _drop_origins(self) -> None:
        """Forget the roots and labels that no page has any more."""
        places = self._index.pages() & INDEX_MASK
        used, new = np.unique(self._origin[places], return_inverse=True)
        self._origin[places] = new + 1
        self._origins = [(NO_ROOT, ""), *(self._origins[place] for place in used)]
        self._origin_places = {
            (root.hash, label): place for place, (root, label) in enumerate(self._origins)
        }
        self._most_origins = max(MIN_ORIGINS, 2 * len(self._origins))

    def _unpublish(self, ids: Ids, keys: NDArray[np.uint8]) -> None:
        """Pages that can no longer be found, called `keys`, lose their entry in the store, then their name."""
        if self._store is not None:
            self._store.index.unpublish_keys(
                (key.tobytes() for key in keys), GoneReason.UNREACHABLE
            )
        self._table.unpublish(ids[self._table.is_published(ids)])


def _rows(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


def _give_memory_back() -> None:
    """Have the C library return what was freed, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
