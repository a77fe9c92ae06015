"""IndexImage: all records of a store's index as they were at one moment, checked one by one; never written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import lmdb
import numpy as np
from numpy.typing import NDArray

from tiermem.errors import ConfigError
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
    pack_label,
    pack_root,
    parse_label,
    parse_root,
    sound_entries,
)

_PAGE_KEY_BYTES = 1 + KEY_BYTES


@dataclass(frozen=True, slots=True)
class IndexImage:
    """What a store's index says.

    entries: (n,) of ENTRY_ROW, ascending by key. Hints: a slot's trailer decides (see `store_records`).
    roots, labels: by number. gone: oldest first.
    strays: keys of records that are damaged or no records at all.
    """

    entries: NDArray[np.void]
    roots: dict[int, ChainRoot]
    labels: dict[int, str]
    gone: tuple[tuple[int, Gone], ...]
    strays: tuple[bytes, ...]

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

    Raises
    ------
    ConfigError: there is no index, or it cannot be read.
    """
    try:
        with (
            lmdb.open(
                directory.reach("."), readonly=True, lock=False, create=False, max_spare_txns=0
            ) as environment,
            environment.begin() as transaction,
        ):
            return image_of((bytes(key), bytes(value)) for key, value in transaction.cursor())
    except lmdb.Error as error:
        raise ConfigError(f"{str(directory.path)!r}: the index is not readable ({error})") from None


def image_of(records: Iterable[tuple[bytes, bytes]]) -> IndexImage:
    """The image made of these records."""
    rows: list[bytes] = []
    roots: dict[int, ChainRoot] = {}
    labels: dict[int, str] = {}
    gone: list[tuple[int, Gone]] = []
    strays: list[bytes] = []
    for key, value in records:
        number = number_in(key)
        if key[:1] == PAGE and len(key) + len(value) == ENTRY_ROW.itemsize:
            rows.append(key + value)
        elif number is None:
            strays.append(key)
        elif key[:1] == ROOT and (root := parse_root(number, value)) is not None:
            roots[number] = root
        elif key[:1] == LABEL and (label := parse_label(number, value)) is not None:
            labels[number] = label
        elif key[:1] == GONE_PAGE and (record := Gone.parse(number, value)) is not None:
            gone.append((number, record))
        else:
            strays.append(key)
    entries = np.frombuffer(b"".join(rows), dtype=ENTRY_ROW)
    sound = sound_entries(entries)
    strays += [row[:_PAGE_KEY_BYTES] for row, ok in zip(rows, sound, strict=True) if not ok]
    gone.sort(key=lambda pair: pair[1].when_ns)
    return IndexImage(entries[sound], roots, labels, tuple(gone), tuple(strays))
