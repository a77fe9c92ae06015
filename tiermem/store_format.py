"""What the store's bytes on disk look like: the header and a page's trailer (the index: `store_records`).

``header.json``: a JSON object with ``format``, ``version``, ``layout`` (its fingerprint, hex) with the numbers it
is made of, ``cipher_key`` (which key the store is encrypted with, "" for none), and ``checksum``, over everything
else in it.

``slots``: slot s starts at s x (slot_bytes + 4,096): the page, padded to `slot_bytes`, then its trailer. All
numbers are little-endian::

    offset  bytes
         0      8  magic "tiermemP"
         8      4  format version
        12      4  num_layers
        16     32  layout fingerprint
        48     32  hash of the chain's root (zeros: a page without a name)
        80     32  key: the page's chain hash (zeros: without a name)
       112     32  parent: the chain hash before it, the root's for a first page
       144      8  position in the chain, in pages
       152      8  generation: nanoseconds since 1970 when it was written, made unique; never twice in a store
       160     16  fingerprint of the model id
       176      8  fingerprint of the salt (zeros: none)
       184      4  shard
       188      4  number of shards
       192      4  cipher: 0 for none, 1 for AES-256-GCM (`cipher`)
       196     16  id of the cipher's key
       212     12  random bits of this write, which its key comes from
       224     16  tag: of bytes 0 to 224, of the layers' tags, and of the encrypted checksums
       240   3584  a checksum of 8 bytes for each layer, as many as there are, encrypted where there is a cipher;
                   behind them, where there is one, a tag of 16 bytes for each layer
      3824    268  zeros
      4092      4  CRC-32 of the 4,092 bytes before

Everything here parses untrusted bytes with bounds: a record that is not what it should be is an error, never
data. Which write a slot holds is told by the generation: an index entry that names another one is outdated.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiermem.errors import ConfigError
from tiermem.layout import MAX_LAYERS, SLOT_ALIGN_BYTES, PageLayout
from tiermem.store_names import (
    KEY_BYTES,
    MODEL_BYTES,
    NO_ROOT,
    SALT_BYTES,
    UNNAMED,
    ChainRoot,
    PageName,
)

__all__ = [
    "FORMAT_VERSION", "KEY_BYTES", "MAX_HEADER_BYTES", "NO_ROOT", "TRAILER", "TRAILER_BYTES", "UNNAMED",
    "ChainRoot", "PageName", "check_header", "checksum_words", "header_key_id", "header_layout", "keys_in",
    "names_in", "pack_header", "pack_trailer", "pack_trailers", "parse_trailer", "parse_trailers", "root_in",
    "sound_trailers",
]  # fmt: skip

FORMAT_NAME = "tiermem-store"
FORMAT_VERSION = 2
MAX_HEADER_BYTES = 64 * 1024
TRAILER_BYTES = SLOT_ALIGN_BYTES

_MAGIC = b"tiermemP"
_LAYOUT_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "dtype", "page_tokens")

TRAILER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("num_layers", "<u4"),
        ("layout", f"V{KEY_BYTES}"),
        ("root", f"V{KEY_BYTES}"),
        ("key", f"V{KEY_BYTES}"),
        ("parent", f"V{KEY_BYTES}"),
        ("position", "<u8"),
        ("generation", "<u8"),
        ("model", f"V{MODEL_BYTES}"),
        ("salt", f"V{SALT_BYTES}"),
        ("shard", "<u4"),
        ("num_shards", "<u4"),
        ("cipher", "<u4"),
        ("cipher_key", "V16"),
        ("cipher_nonce", "V12"),
        ("cipher_tag", "V16"),
        ("checksums", "<u8", (MAX_LAYERS,)),
        ("reserved", "V268"),
        ("crc", "<u4"),
    ]
)
"""One trailer; see above."""
assert TRAILER.itemsize == TRAILER_BYTES
_KEY_OFFSET = 80


# ---- the header ------------------------------------------------------------------------------------------


def pack_header(layout: PageLayout, key_id: bytes = b"") -> bytes:
    """The text of header.json; `key_id` of an encrypted store."""
    header: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "layout": layout.fingerprint().hex(),
        **{name: getattr(layout, name) for name in _LAYOUT_FIELDS},
        "cipher_key": key_id.hex(),
    }
    header["checksum"] = _header_checksum(header)
    return (json.dumps(header, indent=2) + "\n").encode()


def header_layout(path: str, text: bytes) -> PageLayout:
    """The layout of every page of the store at `path` whose header.json has this `text`.

    Raises
    ------
    ConfigError: the header is damaged, not that of a store, or of another format version.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ssd_path={path!r}: its header.json is damaged ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT_NAME:
        raise ConfigError(f"ssd_path={path!r}: its header.json is not that of a {FORMAT_NAME}")
    if header.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"ssd_path={path!r}: store format version {header.get('version')!r}, this tiermem "
            f"reads version {FORMAT_VERSION} only; choose another directory, or delete this one: what it "
            f"holds is a cache, and is computed again"
        )
    try:
        layout = PageLayout(*(header.get(name) for name in _LAYOUT_FIELDS))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"ssd_path={path!r}: its header.json is damaged ({error})") from None
    sound = header.pop("checksum", None) == _header_checksum(header)
    if not sound or header.get("layout") != layout.fingerprint().hex():
        raise ConfigError(f"ssd_path={path!r}: its header.json is damaged (checksums differ)")
    return layout


def header_key_id(text: bytes) -> str:
    """Which key the store of this sound header is encrypted with, in hexadecimal; "" for none."""
    return str(json.loads(text).get("cipher_key") or "")


def check_header(path: str, text: bytes, layout: PageLayout, key_id: bytes = b"") -> None:
    """Raise ConfigError unless `text` is the header of a store of this version, `layout` and key."""
    stored = header_layout(path, text)
    _check_key(path, header_key_id(text), key_id.hex())
    if stored != layout:
        there = ", ".join(f"{name}={getattr(stored, name)!r}" for name in _LAYOUT_FIELDS)
        here = ", ".join(f"{name}={getattr(layout, name)!r}" for name in _LAYOUT_FIELDS)
        raise ConfigError(
            f"ssd_path={path!r}: written with another page layout ({there}), this one is "
            f"({here}); choose another directory"
        )


def _check_key(path: str, there: str, here: str) -> None:
    if there == here:
        return
    if not there:
        problem = "is not encrypted, and a key is given (ssd_key_file, TIERMEM_SSD_KEY)"
    elif not here:
        problem = f"is encrypted with the key {there}: give it (ssd_key_file, TIERMEM_SSD_KEY)"
    else:
        problem = f"is encrypted with the key {there}, and {here} is given"
    raise ConfigError(f"ssd_path={path!r}: {problem}; or choose another directory")


def _header_checksum(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


# ---- trailers --------------------------------------------------------------------------------------------


def pack_trailers(
    layout: PageLayout,
    names: Sequence[PageName | None],
    first_generation: int,
    checksums: NDArray[np.uint64],
) -> NDArray[np.uint8]:
    """The 4,096 bytes behind each page, (pages, 4096): what it is, and the checksum of each of its layers.

    `checksums` is (pages, layers). Generations count up from the first.
    """
    records = np.zeros(len(names), dtype=TRAILER)
    records["magic"] = _MAGIC
    records["version"] = FORMAT_VERSION
    records["num_layers"] = layout.num_layers
    records["layout"] = np.void(layout.fingerprint())
    for record, name in zip(records, names, strict=True):
        if name is not None:
            record["root"], record["key"] = np.void(name.root.hash), np.void(name.key)
            record["parent"], record["position"] = np.void(name.parent), name.position
            record["model"], record["salt"] = np.void(name.root.model), np.void(name.root.salt)
            record["shard"], record["num_shards"] = name.root.shard
    records["generation"] = np.arange(first_generation, first_generation + len(names))
    records["checksums"][:, : layout.num_layers] = checksums
    raw = records.view(np.uint8).reshape(-1, TRAILER_BYTES)
    records["crc"] = _crcs(raw)
    return raw


def pack_trailer(
    layout: PageLayout, name: PageName | None, generation: int, checksums: NDArray[np.uint64]
) -> bytes:
    """One page's trailer."""
    return pack_trailers(layout, [name], generation, checksums[None]).tobytes()


def sound_trailers(
    layout: PageLayout, raw: NDArray[np.uint8]
) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """`raw`, (pages, 4096), as records of TRAILER, and which of them are undamaged trailers of this layout."""
    records = np.ascontiguousarray(raw).view(TRAILER)[:, 0]
    sound = (
        (records["magic"] == _MAGIC)
        & (records["version"] == FORMAT_VERSION)
        & (records["num_layers"] == layout.num_layers)
        & (records["layout"] == np.void(layout.fingerprint()))
        & (records["crc"] == _crcs(raw))
    )
    return records, sound


def checksum_words(layout: PageLayout, raw: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The checksums in trailers of `layout`, (pages, layers), as they are there: encrypted or not."""
    words: NDArray[np.uint64] = raw.view(TRAILER)[:, 0]["checksums"][:, : layout.num_layers]
    return words


def keys_in(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The keys in trailers, (pages, 32), whatever else is in them."""
    return raw[:, _KEY_OFFSET : _KEY_OFFSET + KEY_BYTES]


def parse_trailers(
    layout: PageLayout, generations: NDArray[np.uint64], raw: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The checksums of each page's layers, and which rows of `raw` are the trailers of those very writes.

    `raw` is (pages, 4096). Checksums of other rows mean nothing.
    """
    records, sound = sound_trailers(layout, raw)
    return records["checksums"][:, : layout.num_layers], sound & (
        records["generation"] == generations
    )


def parse_trailer(layout: PageLayout, generation: int, raw: bytes) -> NDArray[np.uint64] | None:
    """The checksum of each layer, or None unless `raw` is the trailer of that very write."""
    if len(raw) != TRAILER_BYTES:
        return None
    row = np.frombuffer(raw, dtype=np.uint8)[None]
    sums, same = parse_trailers(layout, np.array([generation], dtype=np.uint64), row)
    return sums[0].copy() if same[0] else None


def names_in(records: NDArray[np.void]) -> list[PageName | None]:
    """What the pages of undamaged trailers are called; None for one without a name. Labels are not in them."""
    return [None if record["key"].tobytes() == UNNAMED else _name_in(record) for record in records]


def root_in(record: np.void) -> ChainRoot:
    """The root of the chain of an undamaged trailer's page; the model id as text is not in it."""
    shard = (int(record["shard"]), int(record["num_shards"]))
    model, salt = record["model"].tobytes(), record["salt"].tobytes()
    return ChainRoot(record["root"].tobytes(), model, shard, salt)


def _name_in(record: np.void) -> PageName:
    key, parent = record["key"].tobytes(), record["parent"].tobytes()
    return PageName(key, parent, int(record["position"]), root_in(record))


def _crcs(raw: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return np.array([zlib.crc32(row) for row in raw[:, :-4]], dtype=np.uint32)
