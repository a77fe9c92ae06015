"""Prefixes: pages of finished prompts by content, so that the next prompt finds them.

A published page is called by its chain hash: a cryptographic hash over (page layout, model id, shard, salt) and
all its tokens from the start of the sequence. An entry names a sealed page whose tokens equal the key's (I7).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.layout import PageLayout
from tiermem.pools import NO_SLOT, Ids, Tier
from tiermem.store import ColdStore
from tiermem.store_format import KEY_BYTES, PageName

INDEX_MASK = 2**32 - 1
"""The lower half of a page id: small numbers, used again by later pages."""


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
        self._identity = [
            layout.fingerprint(), model_id.encode(), shard[0].to_bytes(4, "little"),
            shard[1].to_bytes(4, "little"),
        ]  # fmt: skip
        self._clock = 0
        self._last_use = np.zeros(0, dtype=np.int64)
        if store is not None:
            self._adopt(store)

    def __len__(self) -> int:
        return self._index.size

    # ---- finding -----------------------------------------------------------------------------------

    def root(self, salt: bytes) -> bytes:
        """The parent of every first page under `salt`: never equal for other layouts, models, shards or salts."""
        return self._index.root_hash([*self._identity, salt])

    def chain(self, parent: bytes, tokens: NDArray[np.int64]) -> list[bytes]:
        """The chain hash of each whole page of `tokens`, 32 bytes each."""
        return [row.tobytes() for row in self._index.chain(parent, tokens)]

    def match(self, keys: list[bytes]) -> Ids:
        """The pages of the longest stored prefix of the chain `keys`; each has an intact copy."""
        ids = self._index.match(_rows(keys))
        lost = np.flatnonzero(self._table.is_lost(ids))
        return ids[: lost[0]] if len(lost) else ids

    # ---- publishing --------------------------------------------------------------------------------

    def publish(self, pages: Ids, parent: bytes, keys: list[bytes], position: int) -> None:
        """Name sealed pages, the first at `position` in its chain; names that are taken stay where they are.

        Pages that were written to the store before they had a name get it in the store by the next `flush`.
        """
        # a page that two sequences share may have its name from the other one already
        nameless = ~(self._index.names(pages)[3] | self._table.is_lost(pages))
        for i in np.flatnonzero(nameless):
            above = keys[i - 1] if i else parent
            if self._index.insert(above, keys[i], int(pages[i]), position + int(i)):
                self._table.publish(pages[i : i + 1])
        self.note_use(pages)

    def names_of(self, ids: Ids) -> list[PageName | None]:
        """What each page is called; None for one without a name."""
        keys, parents, positions, named = self._index.names(ids)
        return [
            PageName(keys[i].tobytes(), parents[i].tobytes(), int(positions[i]))
            if named[i]
            else None
            for i in range(len(ids))
        ]

    def pages(self) -> Ids:
        """Every published page, least recently used first, children before their parents."""
        leaf_first = self._index.pages()[::-1]
        return leaf_first[np.argsort(self._last_use[leaf_first & INDEX_MASK], kind="stable")]

    def note_use(self, ids: Ids) -> None:
        """These pages are used now. Kept for pages without a name too: they may get one."""
        places = ids & INDEX_MASK
        if len(places) and int(places.max()) >= len(self._last_use):
            grown = np.zeros(2 * int(places.max()) + 1024, dtype=np.int64)
            grown[: len(self._last_use)] = self._last_use
            self._last_use = grown
        self._clock += 1
        self._last_use[places] = self._clock

    # ---- forgetting --------------------------------------------------------------------------------

    def forget_copies(self, tier: Tier, dropped: Ids, dead: Ids) -> None:
        """Copies of `dropped` in `tier` are gone, and the pages `dead` with them.

        What is gone from the SSD leaves the store's index before its slot is written again. Pages that can
        no longer be found, because a page before them is gone, go too.
        """
        if tier == Tier.SSD and self._store is not None and len(dropped):
            self._store.unpublish_keys(name.key for name in self.names_of(dropped) if name)
        self.forget(dead)

    def forget(self, ids: Ids) -> None:
        """Take pages that died or were lost, and all that follow them, out of the index."""
        if len(ids) == 0:
            return
        removed = self._index.remove(ids)
        self._unpublish(removed[self._table.alive(removed)])

    # ---- a store that is opened again --------------------------------------------------------------

    def _adopt(self, store: ColdStore) -> None:
        stored = store.stored
        ids = self._table.create_stored(Tier.SSD, stored.slots)
        self.note_use(ids)
        orphans = self._index.insert_many(stored.parents, stored.keys, ids, stored.positions)
        self._unpublish(orphans)

    def _unpublish(self, ids: Ids) -> None:
        """Pages that can no longer be found lose their entry in the store, then their name."""
        slots = self._table.slots(ids, Tier.SSD)
        if self._store is not None:
            self._store.unpublish(slots[slots != NO_SLOT])
        self._table.unpublish(ids[self._table.is_published(ids)])


def _rows(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
