"""The records of a store's index, an LMDB database of one table: what each key and value is, byte by byte.

A key is one letter and what it names; a value ends in the CRC-32 of its key and of what is before it in the value.
Numbers in keys are big-endian, in values little-endian::

    key                       value
    "p" + chain hash (32)     ENTRY, 80 bytes: slot 4, position in the chain 4, generation 8, checksum over those
                              of the layers 8, parent's chain hash 32, root number 4 (0: unknown), label number 4
                              (0: none), last use 4 (seconds since 1970), hits 4 (how often it was attached),
                              zeros 4, CRC 4
    "r" + root number (4)     root: hash 32, fingerprint of the model id 16, of the salt 8, shard 4, shards 4,
                              model id (UTF-8, at most MAX_MODEL_ID_BYTES), CRC 4
    "l" + label number (4)    label: UTF-8, at most MAX_LABEL_BYTES, CRC 4
    "g" + place (4)           GONE, 48 bytes: chain hash 32, when 8 (nanoseconds since 1970), why 4 (GoneReason),
                              CRC 4. A ring: the newest takes the place of the oldest. A page that came back
                              has an entry besides

An entry is a hint: whether a slot holds that page is decided by its trailer (same generation) and the checksums.
The hash in a trailer or entry is the page's identity; numbers of roots and labels mean something within one index
only. Last use and hits are in memory while a store is open, and written by `flush`, `close` and now and then.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np

from tiermem.store_names import (
    KEY_BYTES,
    MODEL_BYTES,
    SALT_BYTES,
    ChainRoot,
    GoneReason,
)

PAGE, ROOT, LABEL, GONE_PAGE = b"p", b"r", b"l", b"g"
MAX_MODEL_ID_BYTES = 400
MAX_LABEL_BYTES = 800
UNKNOWN = 0
"""The number of no root and of no label."""
MAX_HITS = 2**32 - 1
_CRC_BYTES = 4

ENTRY = np.dtype(
    [
        ("slot", "<u4"),
        ("position", "<u4"),
        ("generation", "<u8"),
        ("checksum", "<u8"),
        ("parent", f"V{KEY_BYTES}"),
        ("root", "<u4"),
        ("label", "<u4"),
        ("last_use_s", "<u4"),
        ("hits", "<u4"),
        ("reserved", "<u4"),
        ("crc", "<u4"),
    ]
)
ENTRY_ROW = np.dtype([("kind", "S1"), ("key", f"V{KEY_BYTES}"), ("entry", ENTRY)])
"""Key and value of a page's record behind each other."""
_ENTRY = struct.Struct("<IIQQ32sIIIII")
_ROOT = struct.Struct(f"<{KEY_BYTES}s{MODEL_BYTES}s{SALT_BYTES}sII")
_GONE = struct.Struct(f"<{KEY_BYTES}sQI")
_NUMBER = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the page called by the record's key lies, and what is known of it."""

    slot: int
    position: int
    generation: int
    checksum: int
    parent: bytes
    root: int
    label: int = UNKNOWN
    last_use_s: int = 0
    hits: int = 0

    def pack(self, key: bytes) -> bytes:
        """The value of the record of the page called `key`."""
        fields = (self.slot, self.position, self.generation, self.checksum, self.parent)
        counts = (self.root, self.label, self.last_use_s, self.hits, 0)
        return sealed(page_key(key), _ENTRY.pack(*fields, *counts))

    def used(self, when_s: int, hits: int) -> Entry:
        """The record after so many more hits, the last of them at `when_s`."""
        total = min(self.hits + hits, MAX_HITS)
        return replace(self, last_use_s=max(when_s, self.last_use_s), hits=total)

    @classmethod
    def parse(cls, key: bytes, value: bytes) -> Entry | None:
        """The record of the page called `key`, or None where this cannot be one."""
        body = opened(page_key(key), value)
        if len(key) != KEY_BYTES or body is None or len(body) != _ENTRY.size:
            return None
        return cls(*_ENTRY.unpack(body)[:9])


@dataclass(frozen=True, slots=True)
class Gone:
    """A page that the index named once: when it went, nanoseconds since 1970, and why."""

    key: bytes
    when_ns: int
    why: GoneReason

    def pack(self, place: int) -> bytes:
        """The value of the record at `place` of the ring."""
        return sealed(
            number_key(GONE_PAGE, place), _GONE.pack(self.key, self.when_ns, int(self.why))
        )

    @classmethod
    def parse(cls, place: int, value: bytes) -> Gone | None:
        """The record at `place` of the ring, or None where this cannot be one."""
        body = opened(number_key(GONE_PAGE, place), value)
        if body is None or len(body) != _GONE.size:
            return None
        key, when_ns, why = _GONE.unpack(body)
        return cls(key, when_ns, GoneReason(why)) if why in iter(GoneReason) else None


# ---- keys ------------------------------------------------------------------------------------------------


def page_key(key: bytes) -> bytes:
    """The record's key of the page called `key`."""
    return PAGE + key


def number_key(kind: bytes, number: int) -> bytes:
    """The key of a root, a label or a place in the ring."""
    return kind + _NUMBER.pack(number)


def number_in(key: bytes) -> int | None:
    """The number in such a key, or None where there cannot be one."""
    return int(_NUMBER.unpack_from(key, 1)[0]) if len(key) == 1 + _NUMBER.size else None


# ---- values ----------------------------------------------------------------------------------------------


def sealed(key: bytes, body: bytes) -> bytes:
    """`body` and the CRC of key and body."""
    return body + zlib.crc32(key + body).to_bytes(_CRC_BYTES, "little")


def opened(key: bytes, value: bytes) -> bytes | None:
    """The body of a value, or None where it is damaged or another key's."""
    body, crc = value[:-_CRC_BYTES], value[-_CRC_BYTES:]
    return body if crc == zlib.crc32(key + body).to_bytes(_CRC_BYTES, "little") else None


def pack_root(number: int, root: ChainRoot) -> bytes:
    """The value of the record of root `number`."""
    shard = root.shard[0], root.shard[1]
    body = _ROOT.pack(root.hash, root.model, root.salt, *shard)
    return sealed(number_key(ROOT, number), body + _text_bytes(root.model_id, MAX_MODEL_ID_BYTES))


def parse_root(number: int, value: bytes) -> ChainRoot | None:
    """Root `number`, or None where this cannot be its record."""
    body = opened(number_key(ROOT, number), value)
    if body is None or not _ROOT.size <= len(body) <= _ROOT.size + MAX_MODEL_ID_BYTES:
        return None
    root, model, salt, index, count = _ROOT.unpack_from(body)
    model_id = _text_in(body[_ROOT.size :])
    return None if model_id is None else ChainRoot(root, model, (index, count), salt, model_id)


def pack_label(number: int, label: str) -> bytes:
    """The value of the record of label `number`."""
    return sealed(number_key(LABEL, number), _text_bytes(label, MAX_LABEL_BYTES))


def parse_label(number: int, value: bytes) -> str | None:
    """Label `number`, or None where this cannot be its record."""
    body = opened(number_key(LABEL, number), value)
    return None if body is None or len(body) > MAX_LABEL_BYTES else _text_in(body)


def _text_bytes(text: str, most: int) -> bytes:
    """`text` in UTF-8, cut at a whole character to at most so many bytes."""
    raw = text.encode("utf-8", "replace")[:most]
    return raw.decode("utf-8", "ignore").encode()


def _text_in(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
