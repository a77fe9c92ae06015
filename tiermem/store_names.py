"""What pages of a store are called, where they come from, and why they went."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

from tiermem import _core
from tiermem.layout import PageLayout

KEY_BYTES = 32
UNNAMED = bytes(KEY_BYTES)
"""The key of a page that has no name (yet)."""
MODEL_BYTES = 16
SALT_BYTES = 8


@dataclass(frozen=True, slots=True)
class ChainRoot:
    """Where chains of pages start: what all pages below it have in common besides their layout.

    Parameters
    ----------
    hash: the parent of every first page, 32 bytes: over layout, model id, shard and salt.
    model: fingerprint of the model id, 16 bytes.
    shard: (index, count).
    salt: fingerprint of the salt, 8 bytes, zeros for the empty one. The salt itself is nowhere in a store.
    model_id: as text, at most MAX_MODEL_ID_BYTES of it; empty where only the fingerprint is known.
    """

    hash: bytes
    model: bytes
    shard: tuple[int, int]
    salt: bytes
    model_id: str = ""

    @classmethod
    def of(cls, root: bytes, model_id: str, shard: tuple[int, int], salt: bytes) -> ChainRoot:
        """The root with this hash, of pages of this model, shard and salt."""
        return cls(root, model_fingerprint(model_id), shard, salt_fingerprint(salt), model_id)


NO_ROOT = ChainRoot(UNNAMED, bytes(MODEL_BYTES), (0, 1), bytes(SALT_BYTES))
"""Of a page without a name."""


@dataclass(frozen=True, slots=True)
class PageName:
    """What a published page is called: its chain hash, its parent's, and its place in the chain.

    `root` is where its chain starts, `label` that of the sequence which published it first.
    """

    key: bytes
    parent: bytes
    position: int
    root: ChainRoot = NO_ROOT
    label: str = ""


class GoneReason(enum.IntEnum):
    """Why a page that the index named is there no longer."""

    EVICTED = 1
    """Colder than others when a slot was wanted."""
    UNREACHABLE = 2
    """A page before it in its chain went, so that nothing would have found it."""
    QUARANTINED = 3
    """Its bytes were found damaged."""
    CAP = 4
    """The store was opened with a smaller cap."""
    COLLECTED = 5
    """Somebody asked for it (`tiermem gc`, `tiermem verify --repair`)."""


def root_hash(layout: PageLayout, model_id: str, shard: tuple[int, int], salt: bytes) -> bytes:
    """What stands before the first page of a chain: never equal for other layouts, models, shards or salts."""
    index, count = (number.to_bytes(4, "little") for number in shard)
    parts = [layout.fingerprint(), model_id.encode(), index, count, salt]
    return _core.PrefixIndex.root_hash(parts)


def model_fingerprint(model_id: str) -> bytes:
    """16 bytes that tell model ids apart."""
    return hashlib.sha256(b"tiermem model id\0" + model_id.encode()).digest()[:MODEL_BYTES]


def salt_fingerprint(salt: bytes) -> bytes:
    """8 bytes that tell salts apart; zeros for none."""
    if not salt:
        return bytes(SALT_BYTES)
    return hashlib.sha256(b"tiermem salt\0" + salt).digest()[:SALT_BYTES]
