"""StoreContent: everything that the index of a store says, at one moment, as arrays and small tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.index_image import IndexImage
from tiermem.store_chains import Forest, Int64s, Keys, first_words
from tiermem.store_names import KEY_BYTES, ChainRoot
from tiermem.store_records import Entry, Gone


@dataclass(frozen=True, slots=True, eq=False)
class StoreContent:
    """The pages of a store; `entries` and `keys` have one item a page, by ascending slot.

    keys: (n, 32) uint8, each page's chain hash. entries: the records of ENTRY.
    roots, labels: what their numbers in the entries stand for. gone: what became of pages that are stored no
    more, by key; the newest where a page went several times. strays: keys of records that are damaged.
    """

    keys: Keys
    entries: NDArray[np.void]
    roots: dict[int, ChainRoot]
    labels: dict[int, str]
    gone: dict[bytes, Gone]
    strays: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, image: IndexImage) -> StoreContent:
        """What this image of an index says."""
        rows = image.entries[np.argsort(image.entries["entry"]["slot"], kind="stable")]
        return cls(
            keys=np.ascontiguousarray(rows["key"]).view(np.uint8).reshape(-1, KEY_BYTES),
            entries=np.ascontiguousarray(rows["entry"]),
            roots=image.roots,
            labels=image.labels,
            gone={gone.key: gone for _, gone in image.gone},
            strays=image.strays,
        )

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self) -> Int64s:
        """Every page."""
        return np.arange(len(self), dtype=np.int64)

    def forest(self) -> Forest:
        """How the pages follow each other."""
        return Forest.of(self.keys, self.parents, self.positions)

    @property
    def parents(self) -> Keys:
        """The key of the page before each, (n, 32); of a first page, the hash of its chain's root."""
        raw = np.ascontiguousarray(self.entries["parent"])
        return raw.view(np.uint8).reshape(-1, KEY_BYTES)

    @property
    def positions(self) -> Int64s:
        """Each page's place in its chain."""
        return self.entries["position"].astype(np.int64)

    @property
    def slots(self) -> Int64s:
        """Where each page lies in the slot file."""
        return self.entries["slot"].astype(np.int64)

    @property
    def generations(self) -> NDArray[np.uint64]:
        """The generation of each page's write: ns since 1970, made unique."""
        return self.entries["generation"].astype(np.uint64)

    @property
    def last_use_s(self) -> Int64s:
        """When each page was last used, seconds since 1970; that it was written counts as a use."""
        written = (self.generations // np.uint64(10**9)).astype(np.int64)
        return np.maximum(self.entries["last_use_s"].astype(np.int64), written)

    @property
    def hits(self) -> Int64s:
        """How often each page was attached."""
        return self.entries["hits"].astype(np.int64)

    def key(self, row: int) -> bytes:
        """A page's chain hash."""
        return bytes(self.keys[row].tobytes())

    def entry(self, row: int) -> Entry:
        """A page's record."""
        return Entry(*self.entries[row].item()[:9])

    def label(self, row: int) -> str:
        """The label of the session that stored a page; empty for none."""
        return self.labels.get(int(self.entries["label"][row]), "")

    def root(self, row: int) -> ChainRoot | None:
        """What a page's chain belongs to; None where the index does not say."""
        return self.roots.get(int(self.entries["root"][row]))

    def find(self, digits: str) -> Int64s:
        """The rows of the pages whose key begins with these hexadecimal digits, in the order of their keys.

        Raises
        ------
        ValueError: they are no hexadecimal digits, or more than a key has.
        """
        if not 1 <= len(digits) <= 2 * KEY_BYTES or not set(digits) <= set("0123456789abcdef"):
            raise ValueError(f"{digits[:70]!r} must be 1 to 64 hexadecimal digits, lower case")
        words = first_words(self.keys)
        low = np.uint64(int(digits[:16].ljust(16, "0"), 16))
        high = np.uint64(int(digits[:16].ljust(16, "f"), 16))
        near = np.flatnonzero((words >= low) & (words <= high)).tolist()
        named = sorted((self.key(row).hex(), row) for row in near)
        return np.array([row for key, row in named if key.startswith(digits)], dtype=np.int64)
