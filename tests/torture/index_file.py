"""An LMDB index with bytes changed where they mean something: it is damaged, or LMDB can work with it."""

from __future__ import annotations

import os
import random
import tempfile
from functools import cache
from pathlib import Path

import lmdb

from tiermem import _core
from tiermem.store_names import KEY_BYTES
from tiermem.store_records import ENTRY_ROW, LABEL, PAGE, number_key, pack_label
from torture.tally import ViolationError

PAGE_BYTES = 4096
EDIT_BYTES = 4
MOST_EDITS = 8
META_BYTES, HEADER_BYTES, NODE_BYTES = 152, 16, 8
BRANCH, LEAF = 1, 2
_MAP_BYTES = 1 << 24
_ROW, _KEY_BYTES = ENTRY_ROW.itemsize, 1 + KEY_BYTES


@cache
def sound_index() -> bytes:
    """A file with a branch, leaves, overflow pages and free ones, as LMDB made it."""
    rng = random.Random(1)
    keys = [PAGE + rng.randbytes(32) for _ in range(60)]
    with tempfile.TemporaryDirectory() as directory:
        with lmdb.open(directory, map_size=_MAP_BYTES, lock=False, sync=False) as environment:
            for turn in range(4):
                with environment.begin(write=True) as transaction:
                    for key in keys[15 * turn : 15 * turn + 15]:
                        transaction.put(key, rng.randbytes(_ROW - len(key)))
                    transaction.put(b"large", rng.randbytes(6000 - 900 * turn))
                    transaction.put(number_key(LABEL, turn), pack_label(turn, "chat"))
                    transaction.delete(keys[14 * turn])
        return (Path(directory) / "data.mdb").read_bytes()


@cache
def places() -> tuple[tuple[int, ...], ...]:
    """Offsets in `sound_index`: of its meta pages, headers, tables of nodes and nodes, and of everything."""
    file = sound_index()
    metas = [start + i for start in (0, PAGE_BYTES) for i in range(META_BYTES)]
    headers: list[int] = []
    tables: list[int] = []
    nodes: list[int] = []
    for start in range(2 * PAGE_BYTES, len(file), PAGE_BYTES):
        headers += [start + i for i in range(HEADER_BYTES)]
        lower = int.from_bytes(file[start + 12 : start + 14], "little")
        if file[start + 10] not in (BRANCH, LEAF):
            continue
        tables += [start + i for i in range(HEADER_BYTES, lower)]
        for entry in range(start + HEADER_BYTES, start + lower, 2):
            node = start + int.from_bytes(file[entry : entry + 2], "little")
            nodes += [node + i for i in range(NODE_BYTES)]
    return tuple(metas), tuple(headers), tuple(tables), tuple(nodes), tuple(range(len(file)))


def edited(data: bytes) -> bytes:
    """`sound_index` after the edits that `data` tells, EDIT_BYTES each: where 2, how 1, and a byte."""
    file = bytearray(sound_index())
    for start in range(0, min(len(data), EDIT_BYTES * MOST_EDITS) - EDIT_BYTES + 1, EDIT_BYTES):
        number = int.from_bytes(data[start : start + 2], "little")
        how, byte = data[start + 2], data[start + 3]
        kind = places()[how % len(places())]
        place = kind[number * 7919 % len(kind)]
        _edit(file, place, how // len(places()) % 4, byte)
    return bytes(file)


def _edit(file: bytearray, place: int, how: int, byte: int) -> None:
    if place >= len(file):
        return
    if how == 0:
        file[place] ^= 1 << byte % 8
    elif how == 1:
        file[place] = byte
    elif how == 2:  # a number of a page or of few, where the format has words of two bytes or eight
        word = file[place & ~7 : (place & ~7) + 8]
        file[place & ~7 : (place & ~7) + len(word)] = (byte % 20).to_bytes(8, "little")[: len(word)]
    else:
        del file[len(file) - byte * 512 % len(file) :]


def check_index(file: bytes, where: Path) -> None:
    """Read the file natively; what is taken for sound LMDB must read, change and leave sound.

    Raises ViolationError. What LMDB cannot stand ends the process.
    """
    path = where / "data.mdb"
    path.write_bytes(file)
    records, damage = read_natively(path)
    if damage:
        return
    with lmdb.open(str(where), map_size=_MAP_BYTES, lock=False, sync=False) as environment:
        with environment.begin() as transaction:
            if dict(transaction.cursor()) != records:
                raise ViolationError("LMDB reads other records")
        rng = random.Random(len(records))
        for _ in range(3):
            with environment.begin(write=True) as transaction:
                for key in rng.sample(sorted(records), min(5, len(records))):
                    transaction.delete(key)
                    del records[key]
                for _ in range(8):
                    key = PAGE + rng.randbytes(32)
                    records[key] = rng.randbytes(_ROW - len(key))
                    transaction.put(key, records[key])
    if read_natively(path) != (records, ""):
        raise ViolationError("LMDB left something else than what was put")


def read_natively(path: Path) -> tuple[dict[bytes, bytes], str]:
    """Every record, and what is damaged."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows, others, damage = _core.read_lmdb(descriptor, 1 << 30, PAGE, _ROW)
    finally:
        os.close(descriptor)
    raw = [row.tobytes() for row in rows]
    return dict(others) | {row[:_KEY_BYTES]: row[_KEY_BYTES:] for row in raw}, damage
