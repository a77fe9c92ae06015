"""The index of a store: damage is found before LMDB maps the file, and a new one is made from the trailers."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest
from test_manager import config
from test_store import PAGE, STRIDE, TOKENS, damage, found, image_at, store_some
from world import LAYOUT

from tiermem import TierManager, _core
from tiermem.store_rebuild import DAMAGED_INDEX, KEPT_BYTES
from tiermem.store_records import ENTRY_ROW

ROW = ENTRY_ROW.itemsize
MOST = 1 << 30


def read(path: Path, most_bytes: int = MOST) -> tuple[np.ndarray, dict[bytes, bytes], str]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows, others, wrong = _core.read_lmdb(descriptor, most_bytes, b"p", ROW)
    finally:
        os.close(descriptor)
    return rows, dict(others), wrong


def change(rng: random.Random, transaction: lmdb.Transaction, model: dict[bytes, bytes]) -> None:
    """Put or delete one record; sizes from one byte to several pages."""
    if model and rng.random() < 0.45:
        key = next(iter(model))
        transaction.delete(key)
        del model[key]
        return
    key = rng.choice([b"p", b"q"]) + rng.randbytes(rng.choice([1, 4, 32, 200, 510]))
    model[key] = rng.randbytes(rng.choice([0, 3, 80, 80, 80, 400, 2040, 9000]))
    transaction.put(key, model[key])


def tree(path: Path, seed: int, transactions: int) -> dict[bytes, bytes]:
    """An environment that grew and shrank; what it holds."""
    rng, model = random.Random(seed), dict[bytes, bytes]()
    with lmdb.open(str(path), map_size=1 << 24, lock=False, sync=False) as environment:
        for _ in range(transactions):
            with environment.begin(write=True) as transaction:
                for _ in range(rng.choice([1, 5, 60])):
                    change(rng, transaction, model)
    return model


# ---- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_what_lmdb_wrote_is_read_without_it(seed: int, tmp_path: Path) -> None:
    rng, model = random.Random(seed), dict[bytes, bytes]()
    with lmdb.open(str(tmp_path), map_size=1 << 24, lock=False, sync=False) as environment:
        assert read(tmp_path / "data.mdb")[1:] == ({}, "")
        for _ in range(60):
            with environment.begin(write=True) as transaction:
                for _ in range(rng.choice([1, 30, 200])):
                    change(rng, transaction, model)
            rows, others, wrong = read(tmp_path / "data.mdb")  # while the writer has it open
            assert wrong == ""
            assert len(rows) == 0
            assert others == model
            assert list(others) == sorted(model)


def test_another_size_or_no_file_of_lmdb_is_damage(tmp_path: Path) -> None:
    tree(tmp_path, 1, 20)
    whole = (tmp_path / "data.mdb").read_bytes()
    other = tmp_path / "other"
    assert "must be at most" in read(tmp_path / "data.mdb", len(whole) - 1)[2]
    for content in (b"", b"x", bytes(5000), bytes(200_000), os.urandom(200_000)):
        other.write_bytes(content)
        assert "meta page" in read(other)[2]


def test_a_file_cut_anywhere_is_damage_or_complete(tmp_path: Path) -> None:
    model = tree(tmp_path, 2, 30)
    whole = (tmp_path / "data.mdb").read_bytes()
    other = tmp_path / "other"
    rng = random.Random(3)
    sizes = [n * 4096 + d for n in range(len(whole) // 4096) for d in (0, 1, 2048)]
    damaged = 0
    for size in rng.sample(sizes, min(len(sizes), 150)):
        other.write_bytes(whole[:size])
        _, others, wrong = read(other)
        damaged += bool(wrong)
        assert wrong or others == model  # what was cut off was free
    assert damaged > 20


def used_bytes(file: bytes) -> set[int]:
    """Offsets that mean something in a file of LMDB: of the trees' pages; not what lies between their nodes."""
    places = set()
    for start in range(2 * 4096, len(file), 4096):
        lower = int.from_bytes(file[start + 12 : start + 14], "little")
        upper = int.from_bytes(file[start + 14 : start + 16], "little")
        if file[start + 10] in (1, 2) and 16 <= lower <= upper <= 4096:
            places |= {start + i for i in (*range(8), *range(10, lower), *range(upper, 4096))}
    return places


def test_every_flipped_bit_of_structure_is_damage_or_a_record_that_differs(tmp_path: Path) -> None:
    model = tree(tmp_path, 4, 20)
    whole = (tmp_path / "data.mdb").read_bytes()
    other = tmp_path / "other"
    rng = random.Random(5)
    headers = [n * 4096 + i for n in range(len(whole) // 4096) for i in range(16)]
    metas = [start + i for start in (0, 4096) for i in range(152)]
    places = rng.sample(headers, 100) + metas + rng.sample(sorted(used_bytes(whole)), 300)
    outcomes = {"damage": 0, "differs": 0, "same": 0}
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        other.write_bytes(flipped)
        _, others, wrong = read(other)
        outcome = "damage" if wrong else "same" if others == model else "differs"
        outcomes[outcome] += 1
        if outcome == "differs":  # that keys and values are whole is for their CRC to say
            assert abs(len(others) - len(model)) <= 60
    assert outcomes["damage"] > 100, outcomes
    assert outcomes["differs"] > 50, outcomes


def test_what_passes_is_safe_for_lmdb(tmp_path: Path) -> None:
    """Whatever is flipped: a file that is taken for sound can be read and written to by LMDB itself."""
    (tmp_path / "a").mkdir()
    tree(tmp_path / "a", 6, 30)
    whole = (tmp_path / "a" / "data.mdb").read_bytes()
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "data.mdb"
    rng = random.Random(7)
    passed = 0
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        other.write_bytes(flipped)
        _, others, wrong = read(other)
        if wrong:
            continue
        passed += 1
        with lmdb.open(str(other.parent), map_size=1 << 24, lock=False, sync=False) as environment:
            with environment.begin() as transaction:
                assert dict(transaction.cursor()) == others
            for _ in range(3):
                with environment.begin(write=True) as transaction:
                    for _ in range(20):
                        change(rng, transaction, others)
        assert read(other)[1:] == (others, "")
    assert passed > 50


# ---- a store whose index is damaged ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["page", "meta", "short", "empty", "gone", "no directory"])
def test_a_damaged_index_is_made_again_from_the_trailers(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    store_some(path)
    before = image_at(path)
    index = path / "index" / "data.mdb"
    size = index.stat().st_size
    if how == "page":
        with index.open("r+b") as file:
            for start in range(2 * 4096, size, 4096):
                file.seek(start + 12)
                file.write(b"\xff\xff")
    elif how == "meta":
        with index.open("r+b") as file:
            file.write(bytes(64))
    elif how == "short":
        os.truncate(index, 8192)
    elif how == "empty":
        os.truncate(index, 0)
    elif how == "gone":
        index.unlink()
    else:
        shutil.rmtree(path / "index")
    with (
        caplog.at_level("WARNING"),
        TierManager(LAYOUT, config(8, 8, 20, path)) as manager,
    ):
        assert found(manager) == len(TOKENS)
        manager.check()
    assert "made again" in caplog.text
    after = image_at(path)
    assert after.damage == ""
    for field in ("slot", "position", "generation", "checksum", "parent"):
        assert np.array_equal(before.entries["entry"][field], after.entries["entry"][field]), field
    assert [root.hash for root in after.roots.values()] == [r.hash for r in before.roots.values()]
    aside = path / DAMAGED_INDEX / "data.mdb"
    assert not aside.exists() or aside.stat().st_size <= KEPT_BYTES
    assert aside.exists() == (how not in ("gone", "no directory"))


def test_trailers_that_are_damaged_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    entries = image_at(path).entries["entry"]
    slot = int(entries["slot"][entries["position"] == 3][0])
    damage(path, slot * STRIDE + LAYOUT.slot_bytes + 200)
    (path / "index" / "data.mdb").unlink()
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == 3 * PAGE  # what follows cannot be found


def test_a_rebuild_that_was_killed_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    (path / "index" / "data.mdb").rename(tmp_path / "old")
    (path / "index").rename(path / DAMAGED_INDEX)
    (path / "index.new").mkdir(mode=0o700)
    (path / "index.new" / "data.mdb").write_bytes(b"half")
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == len(TOKENS)
    assert not (path / "index.new").exists()


def test_random_damage_of_the_index_is_a_miss_at_most(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    index = path / "index" / "data.mdb"
    whole = index.read_bytes()
    rng = random.Random(8)
    for _ in range(12):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 3, 50])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        cut = rng.choice([len(whole)] * 3 + [rng.randrange(len(whole))])
        index.write_bytes(flipped[:cut])
        with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
            assert found(manager) % PAGE == 0
            manager.check()
