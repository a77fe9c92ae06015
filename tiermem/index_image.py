"""IndexImage: all records of a store's index as they were at one moment, checked one by one; never written to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.private_files import PrivateDirectory
from tiermem.store_names import KEY_BYTES, ChainRoot
from tiermem.store_records import (
    ENTRY_ROW,
    GONE_PAGE,
    LABEL,
    PAGE,
    ROOT,
    Gone,
    number_in,
    number_key,
    opened,
    pack_label,
    pack_root,
    parse_label,
    parse_root,
)

_PAGE_KEY_BYTES = 1 + KEY_BYTES
INDEX_FILE = "data.mdb"
MAX_INDEX_BYTES = 1 << 36
"""A larger file is no index of ours: 64 GiB hold 300 million pages."""


@dataclass(frozen=True, slots=True)
class IndexImage:
    """What a store's index says.

    entries: (n,) of ENTRY_ROW, ascending by key. Hints: a slot's trailer decides (see `store_records`).
    roots, labels: by number. gone: oldest first.
    strays: keys of records that are damaged or no records at all.
    damage: what is wrong with the index as a whole, and where; empty for a sound one. Then nothing else is known.
    """

    entries: NDArray[np.void]
    roots: dict[int, ChainRoot]
    labels: dict[int, str]
    gone: tuple[tuple[int, Gone], ...]
    strays: tuple[bytes, ...]
    damage: str = ""

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of every sound record."""
        for row in self.entries:
            raw = row.tobytes()
            yield raw[:_PAGE_KEY_BYTES], raw[_PAGE_KEY_BYTES:]
        for number, root in self.roots.items():
            yield number_key(ROOT, number), pack_root(number, root)
        for number, label in self.labels.items():
            yield number_key(LABEL, number), pack_label(number, label)
        for place, gone in self.gone:
            yield number_key(GONE_PAGE, place), gone.pack(place)


def read_index(directory: PrivateDirectory) -> IndexImage:
    """The index in this directory (`index` in a store's), of a store that is closed or in use.

    LMDB has no part in this: no lock, no map, nothing that a damaged file could harm. An empty image where there
    is no index; one that is damaged is an image with `damage` alone.

    Raises
    ------
    ConfigError: the file is not to be trusted (a link, another user's). OSError: it cannot be read.
    """
    try:
        descriptor = directory.open_file(INDEX_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return image_of(())
    try:
        return read_image(descriptor)
    finally:
        os.close(descriptor)


def read_image(descriptor: int) -> IndexImage:
    """The index in this open file; an image with `damage` alone for a damaged one. OSError: it cannot be read."""
    return image_from(*_core.read_lmdb(descriptor, MAX_INDEX_BYTES, PAGE, ENTRY_ROW.itemsize))


def image_of(records: Iterable[tuple[bytes, bytes]]) -> IndexImage:
    """The image made of these records."""
    rows: list[bytes] = []
    others: list[tuple[bytes, bytes]] = []
    for key, value in records:
        is_row = key[:1] == PAGE and len(key) == _PAGE_KEY_BYTES
        if is_row and len(key) + len(value) == ENTRY_ROW.itemsize and opened(key, value):
            rows.append(key + value)
        else:
            others.append((key, value))
    raw = np.frombuffer(b"".join(rows), dtype=np.uint8)
    return image_from(raw.reshape(-1, ENTRY_ROW.itemsize), others)


def image_from(
    rows: NDArray[np.uint8], others: Iterable[tuple[bytes, bytes]], damage: str = ""
) -> IndexImage:
    """The image made of pages' records, (n, 113), whose CRCs were checked, and of other ones."""
    roots: dict[int, ChainRoot] = {}
    labels: dict[int, str] = {}
    gone: list[tuple[int, Gone]] = []
    strays: list[bytes] = []
    for key, value in others:
        number = number_in(key)
        if number is None:
            strays.append(key)
        elif key[:1] == ROOT and (root := parse_root(number, value)) is not None:
            roots[number] = root
        elif key[:1] == LABEL and (label := parse_label(number, value)) is not None:
            labels[number] = label
        elif key[:1] == GONE_PAGE and (record := Gone.parse(number, value)) is not None:
            gone.append((number, record))
        else:
            strays.append(key)
    gone.sort(key=lambda pair: pair[1].when_ns)
    return IndexImage(rows.view(ENTRY_ROW)[:, 0], roots, labels, tuple(gone), tuple(strays), damage)
