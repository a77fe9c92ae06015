"""Power lost at any instant: what was synced is there, nothing is ever wrong.

Between two syncs the disk may have any part of what was written: each sector old or new. A sync makes the payload
durable, then the index' pages, then its meta page; so power may be lost within any of these, and what came before
is whole. Such states are put together from copies of the files before and after, and opened.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from io_support import memory
from test_store_transfer import CAP, LAYOUT, NUM_SLOTS, SLOT, at, move

from tiermem.store import ColdStore
from tiermem.store_names import ChainRoot, GoneReason, PageName

ROOT = ChainRoot.of(b"r" * 32, "model", (0, 1), b"")
INDEX_PAGE = 4096
META_PAGES = 2


def content(key: bytes) -> np.ndarray:
    """The bytes of the page called `key`."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, SLOT, dtype=np.uint8)


@dataclass(frozen=True)
class Files:
    """The bytes of a store's files at one moment."""

    slots: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, path: Path) -> Files:
        names = ("slots", "index/data.mdb")
        return cls(*(np.fromfile(path / name, dtype=np.uint8) for name in names))

    def put(self, path: Path) -> None:
        self.slots.tofile(path / "slots")
        self.index.tofile(path / "index" / "data.mdb")


def mixed(
    rng: np.random.Generator, before: np.ndarray, after: np.ndarray, sector: int
) -> np.ndarray:
    """Every sector of a file as it was or as it became, or all of them the one or the other."""
    longer = np.zeros(max(len(before), len(after)), dtype=np.uint8)
    longer[: len(before)] = before
    rows, new = longer.reshape(-1, sector), after.reshape(-1, sector)
    chosen = rng.random(len(new)) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    rows[: len(new)][chosen] = new[chosen]
    return longer


def lost_power(rng: np.random.Generator, before: Files, after: Files) -> Files:
    """What the disk may have when power is lost somewhere between two states that were synced."""
    sector = int(rng.choice([512, 4096]))
    phase = rng.choice(["payload", "index", "meta"])
    if phase == "payload":
        return Files(mixed(rng, before.slots, after.slots, sector), before.index)
    if phase == "meta":
        return Files(after.slots, after.index)
    index = mixed(rng, before.index, after.index, sector)
    head = META_PAGES * INDEX_PAGE
    index[:head] = before.index[:head]
    return Files(after.slots, index)


@dataclass
class Writer:
    """A store that is written to at random, and what must be in it."""

    store: ColdStore
    rng: np.random.Generator
    in_slot: dict[int, PageName] = field(default_factory=dict)
    synced: dict[bytes, int] = field(default_factory=dict)  # key -> slot, not touched since
    ever: set[bytes] = field(default_factory=set)

    def write_some(self) -> None:
        """New pages into slots, some of which hold others that go for them."""
        count = int(self.rng.integers(1, NUM_SLOTS // 2))
        slots = self.rng.permutation(NUM_SLOTS)[:count].astype(np.int64)
        old = [self.in_slot[slot].key for slot in slots.tolist() if slot in self.in_slot]
        self.store.index.unpublish_keys(old, GoneReason.EVICTED)
        for key in old:
            self.synced.pop(key, None)
        names = [PageName(self.rng.bytes(32), ROOT.hash, 0, ROOT, "chat") for _ in range(count)]
        pages = memory(count * SLOT)
        for i, name in enumerate(names):
            pages[i * SLOT : (i + 1) * SLOT] = content(name.key)
        move(self.store.write(slots, at(pages), list(names)))
        self.store.index.publish(slots, list(names))
        self.in_slot.update(zip(slots.tolist(), names, strict=True))
        self.ever.update(name.key for name in names)

    def sync(self) -> None:
        self.store.sync()
        self.synced = {name.key: slot for slot, name in self.in_slot.items()}


def check(path: Path, kept: dict[bytes, int], ever: set[bytes]) -> tuple[int, int]:
    """Open a store after power was lost; how many pages are there, and how many entries were outdated."""
    store = ColdStore(path, LAYOUT, CAP, "threads", 30.0)
    try:
        stored = store.index.take_stored()
        if len(stored.slots) == 0:
            assert not kept
            return 0, 0
        pages = memory(len(stored.slots) * SLOT)
        transfer = store.read(stored.slots, at(pages))
        move(transfer)
        good = store.verify(transfer)
        found = {}
        for i in np.flatnonzero(good).tolist():
            key = stored.keys[i].tobytes()
            assert key in ever
            assert np.array_equal(pages[i * SLOT : (i + 1) * SLOT], content(key)), "wrong bytes"
            found[key] = int(stored.slots[i])
        for key, slot in kept.items():
            assert found.get(key) == slot, "a page that was synced is lost"
        return len(found), int((~good).sum())
    finally:
        store.close()


@pytest.mark.parametrize("seed", range(3))
def test_pages_that_were_synced_survive_and_none_is_wrong(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 30.0)
    writer = Writer(store, rng)
    num_found = num_outdated = 0
    for turn in range(4):
        writer.sync()
        before = Files.of(tmp_path / "s")
        for _ in range(int(rng.integers(1, 3))):
            writer.write_some()
        kept = dict(writer.synced)  # of what was synced, what was not written over
        writer.sync()
        after = Files.of(tmp_path / "s")
        for i in range(3):
            copy = tmp_path / f"{turn}-{i}"
            shutil.copytree(tmp_path / "s", copy)
            lost_power(rng, before, after).put(copy)
            found, outdated = check(copy, kept, writer.ever)
            num_found, num_outdated = num_found + found, num_outdated + outdated
            shutil.rmtree(copy)
    store.close()
    assert num_found > 50
    assert num_outdated > 0  # else nothing was put to the test


def test_an_entry_whose_slot_was_written_again_is_a_miss(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    writer = Writer(ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 30.0), rng)
    for _ in range(6):
        writer.write_some()
    writer.sync()
    old = Files.of(tmp_path / "s").index
    for _ in range(6):
        writer.write_some()
    writer.sync()
    kept = {n.key for n in writer.in_slot.values()}
    writer.store.close()
    Files(Files.of(tmp_path / "s").slots, old).put(tmp_path / "s")  # the index of long ago
    found, outdated = check(tmp_path / "s", {}, kept)
    assert found < outdated


def test_entries_become_durable_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ColdStore(tmp_path / "s", LAYOUT, CAP, "threads", 30.0)
    writer = Writer(store, np.random.default_rng(2))
    writer.write_some()
    store.poll()
    assert store.index.num_pending > 0  # neither old nor many
    monkeypatch.setattr("tiermem.store_commits.SYNC_S", 0.0)
    store.poll()
    assert store.index.num_pending == 0
    monkeypatch.setattr("tiermem.store_commits.SYNC_S", 1e9)
    monkeypatch.setattr("tiermem.store_commits.SYNC_RECORDS", 1)
    writer.write_some()
    store.poll()
    assert store.index.num_pending == 0
    saved = Files.of(tmp_path / "s")
    kept = {name.key: slot for slot, name in writer.in_slot.items()}
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    saved.put(tmp_path / "copy")
    assert check(tmp_path / "copy", kept, writer.ever) == (len(kept), 0)
    store.close()
