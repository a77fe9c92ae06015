"""The index read as plain bytes: as LMDB reads it, and never believed where it is damaged."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from tiermem.errors import CorruptPageError
from tiermem.index_pages import PAGE_BYTES, IndexPages

Records = dict[bytes, bytes]


@contextmanager
def opened(path: Path) -> Iterator[IndexPages]:
    descriptor = os.open(path / "data.mdb", os.O_RDONLY)
    try:
        yield IndexPages(descriptor, "index")
    finally:
        os.close(descriptor)


def opened_to_write(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), map_size=1 << 26, sync=False, lock=False)


def records_of(path: Path) -> Records:
    with opened(path) as pages:
        meta = pages.meta()
        pages.check(meta)
        return dict(pages.records(meta))


def change(environment: lmdb.Environment, chance: random.Random, records: Records) -> None:
    """One transaction that adds and deletes some records."""
    with environment.begin(write=True) as transaction:
        for _ in range(chance.randrange(60)):
            key, value = chance.randbytes(33), chance.randbytes(chance.randrange(1, 900))
            transaction.put(key, value)
            records[key] = value
        for key in chance.sample(sorted(records), min(len(records), chance.randrange(30))):
            transaction.delete(key)
            del records[key]


@pytest.mark.parametrize("seed", range(3))
def test_it_has_what_lmdb_wrote_after_every_transaction(tmp_path: Path, seed: int) -> None:
    chance, records = random.Random(seed), Records()
    with opened_to_write(tmp_path) as environment:
        for _ in range(100):
            change(environment, chance, records)
            assert records_of(tmp_path) == records


def test_an_index_without_a_record_is_one(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path), lock=False).close()
    assert records_of(tmp_path) == {}


def test_many_transactions_later_its_free_pages_are_still_understood(tmp_path: Path) -> None:
    with opened_to_write(tmp_path) as environment:
        for number in range(300):  # the list of free pages counts transactions beyond one byte
            with environment.begin(write=True) as transaction:
                transaction.put(b"key", bytes([number % 256]))
    assert records_of(tmp_path) == {b"key": bytes([299 % 256])}


def test_a_value_that_takes_pages_of_its_own_is_read(tmp_path: Path) -> None:
    value = random.Random(0).randbytes(3 * PAGE_BYTES)
    with opened_to_write(tmp_path) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"large", value)
    assert records_of(tmp_path) == {b"large": value}


def test_a_flipped_bit_is_noticed_or_changes_a_record_or_nothing(tmp_path: Path) -> None:
    """Records have checksums of their own: what must not happen is that one is lost, or comes from nowhere."""
    chance, records = random.Random(4), Records()
    with opened_to_write(tmp_path) as environment:
        for _ in range(12):
            change(environment, chance, records)
    file = tmp_path / "data.mdb"
    whole = bytearray(file.read_bytes())
    noticed = 0
    for _ in range(400):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        if chance.random() < 0.5:  # where a page says what is on it
            place = place // PAGE_BYTES * PAGE_BYTES + place % 64
        whole[place] ^= bit
        file.write_bytes(whole)
        whole[place] ^= bit
        try:
            found = records_of(tmp_path)
        except CorruptPageError:
            noticed += 1
            continue
        changed = found.items() ^ records.items()
        assert len(changed) in (0, 2), "one record, before and after"
        assert len(found) == len(records)
    assert noticed > 20


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES])
def test_a_file_that_is_cut_is_damaged(tmp_path: Path, size: int) -> None:
    with opened_to_write(tmp_path) as environment:
        for _ in range(3):
            with environment.begin(write=True) as transaction:
                transaction.put(b"key", b"value")
    os.truncate(tmp_path / "data.mdb", size)
    with pytest.raises(CorruptPageError):
        records_of(tmp_path)


def test_pages_that_lead_to_each_other_end(tmp_path: Path) -> None:
    with opened_to_write(tmp_path) as environment, environment.begin(write=True) as transaction:
        for number in range(200):
            transaction.put(b"%03d" % number, bytes(100))
    with opened(tmp_path) as pages:
        root = pages.meta().main.root
    file = tmp_path / "data.mdb"
    whole = bytearray(file.read_bytes())
    place = root * PAGE_BYTES
    (node,) = struct.unpack_from("<H", whole, place + 16)
    struct.pack_into("<HHH", whole, place + node, root, 0, 0)  # its first child is itself
    file.write_bytes(whole)
    with pytest.raises(CorruptPageError, match="used twice"):
        records_of(tmp_path)
