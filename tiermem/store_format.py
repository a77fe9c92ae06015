"""What the store's bytes on disk look like: the header, a page's trailer, an index entry.

Everything here parses untrusted bytes with bounds: a record that is not what it should be is an error, never
data.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.errors import ConfigError
from tiermem.layout import MAX_LAYERS, SLOT_ALIGN_BYTES, PageLayout

FORMAT_NAME = "tiermem-store"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
TRAILER_BYTES = SLOT_ALIGN_BYTES
KEY_BYTES = 32
UNNAMED = bytes(KEY_BYTES)
"""The key in the trailer of a page that has no name (yet)."""

_MAGIC = b"tiermemP"
_TRAILER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("num_layers", "<u4"),
        ("layout", "V32"),
        ("key", "V32"),
        ("parent", "V32"),
        ("position", "<u8"),
        ("generation", "<u8"),
        ("cipher_tag", "V16"),
        ("checksums", "<u8", (MAX_LAYERS,)),
        ("reserved", "V364"),
        ("crc", "<u4"),
    ]
)
_ENTRY = struct.Struct("<QQQQ32s")


@dataclass(frozen=True, slots=True)
class PageName:
    """What a published page is called: its chain hash, its parent's, and its place in the chain."""

    key: bytes
    parent: bytes
    position: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the index: where the page called by the record's key lies."""

    slot: int
    generation: int
    position: int
    root: int
    parent: bytes

    def pack(self) -> bytes:
        """The record's bytes."""
        return _ENTRY.pack(self.slot, self.generation, self.position, self.root, self.parent)

    @classmethod
    def parse(cls, key: bytes, value: bytes, num_slots: int) -> Entry | None:
        """The record, or None where key or value cannot be one of a store of `num_slots` slots."""
        if len(key) != KEY_BYTES or len(value) != _ENTRY.size:
            return None
        entry = cls(*_ENTRY.unpack(value))
        return entry if entry.slot < num_slots else None


def pack_header(layout: PageLayout) -> bytes:
    """The text of header.json."""
    header = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "layout": layout.fingerprint().hex(),
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "dtype": layout.dtype,
        "page_tokens": layout.page_tokens,
    }
    return (json.dumps(header, indent=2) + "\n").encode()


def check_header(path: str, text: bytes, layout: PageLayout) -> None:
    """Raise ConfigError unless `text` is the header of a store of this version and `layout`."""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"ssd_path={path!r}: its header.json is damaged ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT_NAME:
        raise ConfigError(f"ssd_path={path!r}: its header.json is not that of a {FORMAT_NAME}")
    if header.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"ssd_path={path!r}: store format version {header.get('version')!r}, this tiermem "
            f"reads {FORMAT_VERSION} only; choose an empty directory"
        )
    if header.get("layout") != layout.fingerprint().hex():
        names = ("num_layers", "num_kv_heads", "head_dim", "dtype", "page_tokens")
        there = ", ".join(f"{name}={header.get(name)!r}" for name in names)
        here = ", ".join(f"{name}={getattr(layout, name)!r}" for name in names)
        raise ConfigError(
            f"ssd_path={path!r}: written with another page layout ({there}), this one is "
            f"({here}); choose another directory"
        )


def pack_trailers(
    layout: PageLayout,
    names: Sequence[PageName | None],
    first_generation: int,
    checksums: NDArray[np.uint64],
) -> NDArray[np.uint8]:
    """The 4,096 bytes behind each page, (pages, 4096): what it is, and the checksum of each of its layers.

    `checksums` is (pages, layers). Generations count up from the first.
    """
    records = np.zeros(len(names), dtype=_TRAILER)
    records["magic"] = _MAGIC
    records["version"] = FORMAT_VERSION
    records["num_layers"] = layout.num_layers
    records["layout"] = np.void(layout.fingerprint())
    for i, name in enumerate(names):
        if name is not None:
            records["key"][i] = np.void(name.key)
            records["parent"][i] = np.void(name.parent)
            records["position"][i] = name.position
    records["generation"] = np.arange(first_generation, first_generation + len(names))
    records["checksums"][:, : layout.num_layers] = checksums
    raw = records.view(np.uint8).reshape(-1, TRAILER_BYTES)
    records["crc"] = [zlib.crc32(row) for row in raw[:, :-4]]
    return raw


def pack_trailer(
    layout: PageLayout, name: PageName | None, generation: int, checksums: NDArray[np.uint64]
) -> bytes:
    """One page's trailer."""
    return pack_trailers(layout, [name], generation, checksums[None]).tobytes()


def parse_trailers(
    layout: PageLayout, generations: NDArray[np.uint64], raw: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The checksums of each page's layers, and which rows of `raw` are the trailers of those very writes.

    `raw` is (pages, 4096). Checksums of other rows mean nothing.
    """
    records = np.ascontiguousarray(raw).view(_TRAILER)[:, 0]
    same = (
        (records["magic"] == _MAGIC)
        & (records["version"] == FORMAT_VERSION)
        & (records["num_layers"] == layout.num_layers)
        & (records["layout"] == np.void(layout.fingerprint()))
        & (records["generation"] == generations)
        & (records["crc"] == np.array([zlib.crc32(row) for row in raw[:, :-4]], dtype=np.uint32))
    )
    return records["checksums"][:, : layout.num_layers], same


def parse_trailer(layout: PageLayout, generation: int, raw: bytes) -> NDArray[np.uint64] | None:
    """The checksum of each layer, or None unless `raw` is the trailer of that very write."""
    if len(raw) != TRAILER_BYTES:
        return None
    row = np.frombuffer(raw, dtype=np.uint8)[None]
    sums, same = parse_trailers(layout, np.array([generation], dtype=np.uint64), row)
    return sums[0].copy() if same[0] else None
