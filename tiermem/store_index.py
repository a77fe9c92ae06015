"""StoreIndex: which page is in which slot of the cold tier, by chain hash; the LMDB side of a store.

The entry is the publication: it is written after the payload, and deleted before its slot is written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.private_files import PrivateDirectory
from tiermem.store_files import open_index
from tiermem.store_format import KEY_BYTES, Entry, PageName
from tiermem.store_transfer import Int64s


@dataclass(frozen=True, slots=True)
class StoredPages:
    """The index at opening, oldest write first; arrays of equal length."""

    keys: NDArray[np.uint8]  # (n, 32)
    parents: NDArray[np.uint8]  # (n, 32)
    slots: Int64s
    positions: Int64s


class StoreIndex:
    """The entries of a store, and what was written last to each slot; LMDB's files are in `directory`.

    `generations` and `roots` have the number and the root checksum of the last write of every slot; whoever
    writes a slot sets them. `stored` is what was there at opening; entries that make no sense were deleted.
    """

    def __init__(self, directory: PrivateDirectory, num_slots: int) -> None:
        self.num_slots = num_slots
        self.generations = np.zeros(num_slots, dtype=np.uint64)
        self.roots = np.zeros(num_slots, dtype=np.uint64)
        self._published = np.zeros(num_slots, dtype=np.bool_)
        self._keys = np.zeros((num_slots, KEY_BYTES), dtype=np.uint8)
        self._lmdb = open_index(directory, num_slots)
        self.stored = self._load()

    def publish(self, slots: Int64s, names: Sequence[PageName | None]) -> None:
        """Make the named pages in `slots`, whose writes have ended, findable after a restart."""
        with self._lmdb.begin(write=True) as txn:
            for slot, name in zip(slots, names, strict=True):
                if name is not None:
                    entry = Entry(
                        slot=int(slot),
                        generation=int(self.generations[slot]),
                        position=name.position,
                        root=int(self.roots[slot]),
                        parent=name.parent,
                    )
                    txn.put(name.key, entry.pack())
                    self._published[slot] = True
                    self._keys[slot] = np.frombuffer(name.key, dtype=np.uint8)

    def unpublish(self, slots: Int64s) -> None:
        """Delete the entries that name what is in `slots`, where there are any."""
        self.unpublish_keys(self._keys[slot].tobytes() for slot in slots if self._published[slot])

    def unpublish_keys(self, keys: Iterable[bytes]) -> None:
        """Delete the entries of `keys`, where there are any, before their slots are written again."""
        with self._lmdb.begin(write=True) as txn:
            for key in keys:
                entry = Entry.parse(key, txn.pop(key) or b"", self.num_slots)
                if entry is not None:
                    self._published[entry.slot] = False

    def is_published(self, slots: Int64s) -> NDArray[np.bool_]:
        """Whether there is an entry for what was written to each slot."""
        return self._published[slots]

    def sync(self) -> None:
        """Return when every entry written so far is durable."""
        self._lmdb.sync(True)

    def close(self) -> None:
        """Give the index up."""
        self._lmdb.close()

    def _load(self) -> StoredPages:
        entries: list[tuple[bytes, Entry]] = []
        strays: list[bytes] = []
        taken: set[int] = set()
        with self._lmdb.begin() as txn:
            for key, value in txn.cursor():
                entry = Entry.parse(key, value, self.num_slots)
                if entry is None or entry.slot in taken:
                    strays.append(key)
                    continue
                taken.add(entry.slot)
                entries.append((key, entry))
        with self._lmdb.begin(write=True) as txn:
            for key in strays:
                txn.delete(key)
        entries.sort(key=lambda pair: pair[1].generation)
        slots = np.array([entry.slot for _, entry in entries], dtype=np.int64)
        self.generations[slots] = [entry.generation for _, entry in entries]
        self.roots[slots] = [entry.root for _, entry in entries]
        self._published[slots] = True
        self._keys[slots] = keys = _key_array(key for key, _ in entries)
        return StoredPages(
            keys=keys,
            parents=_key_array(entry.parent for _, entry in entries),
            slots=slots,
            positions=np.array([entry.position for _, entry in entries], dtype=np.int64),
        )


def _key_array(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
