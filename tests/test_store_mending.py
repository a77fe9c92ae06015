"""Damaged records in an index that is sound otherwise: pages get new ones from their trailers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from test_manager import config
from test_store import PAGE, STRIDE, TOKENS, damage, found, image_at, store_some
from world import LAYOUT

from tiermem import TierManager
from tiermem.errors import TransferError
from tiermem.slot_file import SlotFile
from tiermem.store_names import GoneReason
from tiermem.store_records import Gone, number_key

Change = Callable[[lmdb.Transaction, bytes, bytes], None]


def change(path: Path, how: Change, positions: tuple[int, ...] = (0,)) -> list[bytes]:
    """Change the records of the pages at these positions of the chain; their keys."""
    entries = image_at(path).entries
    order = np.argsort(entries["entry"]["position"])
    keys = [b"p" + entries["key"][order[position]].tobytes() for position in positions]
    with lmdb.open(str(path / "index")) as index, index.begin(write=True) as transaction:
        for key in keys:
            how(transaction, key, bytes(transaction.get(key)))
    return keys


def flip_value(transaction: lmdb.Transaction, key: bytes, value: bytes) -> None:
    changed = bytearray(value)
    changed[random.Random(key).randrange(len(value))] ^= 4
    transaction.put(key, bytes(changed))


def flip_key(transaction: lmdb.Transaction, key: bytes, value: bytes) -> None:
    transaction.delete(key)
    transaction.put(key[:-1] + bytes([key[-1] ^ 1]), value)


def shorten(transaction: lmdb.Transaction, key: bytes, value: bytes) -> None:
    transaction.put(key, value[:10])


@pytest.mark.parametrize("how", [flip_value, flip_key, shorten])
@pytest.mark.parametrize("positions", [(0,), (5,), (1, 2, 3), tuple(range(6))])
def test_pages_of_damaged_records_are_found_again(
    how: Change, positions: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    store_some(path)
    before = image_at(path)
    change(path, how, positions)
    assert len(image_at(path).strays) == len(positions)
    with (
        caplog.at_level("WARNING"),
        TierManager(LAYOUT, config(8, 8, 20, path)) as manager,
    ):
        assert found(manager) == len(TOKENS)
        manager.check()
    assert f"{len(positions)} pages were found again" in caplog.text
    after = image_at(path)
    assert after.strays == ()
    for field in ("slot", "position", "generation", "checksum", "parent", "root"):
        assert np.array_equal(before.entries["entry"][field], after.entries["entry"][field]), field
    assert {root.hash for root in after.roots.values()} == {r.hash for r in before.roots.values()}


def test_damaged_records_of_other_kinds_are_dropped_without_a_look_at_trailers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    store_some(path)
    with lmdb.open(str(path / "index")) as index, index.begin(write=True) as transaction:
        transaction.put(number_key(b"l", 7), b"no label")
    monkeypatch.setattr(SlotFile, "read_trailers", lambda *_: pytest.fail("trailers were read"))
    TierManager(LAYOUT, config(8, 8, 20, path)).close()
    assert image_at(path).strays == ()


def test_what_is_gone_does_not_come_back(tmp_path: Path) -> None:
    """A trailer stays when its page is given up: the record of what is gone says so."""
    path = tmp_path / "s"
    store_some(path)

    def give_up(transaction: lmdb.Transaction, key: bytes, value: bytes) -> None:
        transaction.delete(key)
        gone = Gone(key[1:], 2**63, GoneReason.COLLECTED)
        transaction.put(number_key(b"g", 0), gone.pack(0))

    (gone,) = change(path, give_up, (5,))
    change(path, flip_value, (2,))
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == 5 * PAGE
    assert gone[1:] not in {key.tobytes() for key in image_at(path).entries["key"]}


def test_what_came_back_since_is_found_again(tmp_path: Path) -> None:
    """That a page was gone once, before it was written again, does not count."""
    path = tmp_path / "s"
    store_some(path)

    def note_gone(transaction: lmdb.Transaction, key: bytes, value: bytes) -> None:
        transaction.put(number_key(b"g", 0), Gone(key[1:], 1, GoneReason.EVICTED).pack(0))

    change(path, note_gone, (2,))
    change(path, flip_value, (2,))
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == len(TOKENS)


def test_a_record_whose_trailer_is_damaged_too_stays_lost(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store_some(path)
    entries = image_at(path).entries["entry"]
    slot = int(entries["slot"][entries["position"] == 3][0])
    damage(path, slot * STRIDE + LAYOUT.slot_bytes + 200)
    change(path, flip_value, (3,))
    with TierManager(LAYOUT, config(8, 8, 20, path)) as manager:
        assert found(manager) == 3 * PAGE
        manager.check()


def test_a_store_opens_where_trailers_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    store_some(path)
    change(path, flip_value, (4,))

    def fail(*_: object) -> None:
        raise TransferError("no trailers today")

    with monkeypatch.context() as patch:
        patch.setattr(SlotFile, "read_trailers", fail)
        manager = TierManager(LAYOUT, config(8, 8, 20, path))
    with manager:
        assert found(manager) == 4 * PAGE
    assert "no trailers today" in caplog.text
