"""The page table as Python sees it: types, errors, and random batches against a slow oracle."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from page_table_oracle import LISTS, TIERS, Oracle, Page, RefusedError

from tiermem._core import NO_SLOT, CopyState, PageTable, Tier
from tiermem.errors import InvariantError

Ids = npt.NDArray[np.int64]

COPY_VERBS = ("reserve", "commit", "abort", "drop", "discard", "pin", "unpin")
WEIGHTS = {
    "add_ref": 4, "release": 9, "publish": 6, "unpublish": 2, "seal": 8, "reopen": 3,
    "mark_lost": 1, "touch": 4, "reserve": 16, "commit": 14, "abort": 3, "drop": 4,
    "discard": 2, "pin": 8, "unpin": 10,
}  # fmt: skip


def ids_of(*ids: int) -> Ids:
    return np.array(ids, dtype=np.int64)


def sealed_pages(table: PageTable, count: int) -> Ids:
    ids = table.create(count)
    table.reserve(ids, Tier.GPU)
    table.commit(ids, Tier.GPU)
    table.seal(ids)
    return ids


# -- Types and values


def test_a_page_moves_through_the_tiers() -> None:
    table = PageTable(2, 2, 2)
    ids = sealed_pages(table, 2)
    assert table.reserve(ids, Tier.RAM).tolist() == [0, 1]
    assert table.states(ids, Tier.RAM).tolist() == [CopyState.FILLING] * 2
    table.commit(ids, Tier.RAM)
    dropped, dead = table.evict(Tier.GPU, 1)
    assert dropped.tolist() == [ids[0]]
    assert dead.tolist() == []
    assert table.slots(ids, Tier.GPU).tolist() == [NO_SLOT, 1]
    assert table.coldest_dirty(Tier.RAM, 9).tolist() == [ids[0]]
    counts = table.counts(Tier.RAM)
    assert (counts.slots, counts.free, counts.dirty, counts.redundant) == (2, 0, 1, 1)
    assert "dirty=1" in repr(counts)
    assert table.release(ids).tolist() == ids.tolist()
    assert table.num_pages == 0


def test_arrays_that_come_back_have_the_stated_types() -> None:
    table = PageTable(4, 4, 4)
    ids = table.create(3)
    for array in (ids, table.reserve(ids, 0), table.slots(ids, 0), table.refs(ids)):
        assert array.dtype == np.int64
        assert array.shape == (3,)
    assert table.states(ids, 0).dtype == np.uint8
    for answer in (table.alive, table.is_sealed, table.is_published, table.is_lost, table.has_pins):
        assert answer(ids).dtype == np.bool_
    assert table.lowest_tier is Tier.SSD


def test_arrays_outlive_the_table() -> None:
    ids = PageTable(1, 0, 0).create(1000)
    gc.collect()
    assert ids.tolist() == list(range(1 << 32, (1 << 32) + 1000))


def test_arrays_are_given_back() -> None:
    table = PageTable(1, 0, 0)
    none = ids_of()
    for _ in range(10):
        table.alive(none)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        table.alive(none)
    gc.collect()
    assert sys.getallocatedblocks() - before < 100


@pytest.mark.parametrize("tier", [0, Tier.GPU, np.int64(0)])
def test_tiers_are_enums_or_ints(tier: int) -> None:
    table = PageTable(1, 1, 1)
    assert table.reserve(table.create(1), tier).tolist() == [0]


def test_read_only_arrays_are_taken() -> None:
    table = PageTable(1, 1, 1)
    ids = table.create(1)
    ids.flags.writeable = False
    assert table.refs(ids).tolist() == [1]


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(2, dtype=np.int32),
        np.zeros(2, dtype=np.uint64),
        np.zeros(2),
        np.zeros((1, 2), dtype=np.int64),
        np.zeros(4, dtype=np.int64)[::2],
        [1],
        None,
    ],
    ids=["int32", "uint64", "float64", "2-D", "strided", "list", "None"],
)
def test_other_arrays_are_type_errors(bad: Ids) -> None:
    table = PageTable(1, 1, 1)
    for call in (table.refs, table.alive, table.release, table.touch, table.seal):
        with pytest.raises(TypeError):
            call(bad)
    with pytest.raises(TypeError):
        table.reserve(bad, 0)
    with pytest.raises(TypeError):
        table.create_stored(2, bad)


@pytest.mark.parametrize("tier", [-1, 3, 1000])
def test_other_tiers_are_value_errors(tier: int) -> None:
    table = PageTable(1, 1, 1)
    ids = table.create(1)
    for call in (table.reserve, table.slots, table.pin, table.discard):
        with pytest.raises(ValueError, match=rf"tier={tier}: must be in \[0, 2\]"):
            call(ids, tier)
    with pytest.raises(ValueError, match="tier="):
        table.evict(tier, 1)
    with pytest.raises(ValueError, match="tier="):
        table.counts(tier)


def test_numbers_out_of_range_are_value_errors() -> None:
    for sizes in ((0, 0, 0), (-1, 1, 1), (1, 1 << 31, 1)):
        with pytest.raises(ValueError, match="slots of tier"):
            PageTable(*sizes)
    table = PageTable(1, 1, 1)
    for call in (table.evict, table.evict_redundant, table.coldest_dirty):
        with pytest.raises(ValueError, match="count=-1"):
            call(0, -1)
    with pytest.raises(ValueError, match="count=-1"):
        table.create(-1)


def test_stale_ids_are_invariant_errors() -> None:
    table = PageTable(4, 4, 4)
    old = table.create(1)
    table.release(old)
    new = table.create(1)
    assert old[0] & 0xFFFFFFFF == new[0] & 0xFFFFFFFF
    assert table.alive(np.concatenate([old, new])).tolist() == [False, True]
    with pytest.raises(InvariantError, match=rf"refs: page {old[0]} .* alive"):
        table.refs(old)


def test_refusals_name_the_page_and_its_state() -> None:
    table = PageTable(4, 4, 4)
    ids = sealed_pages(table, 1)
    table.pin(ids, 0)
    want = rf"drop in tier gpu: page {ids[0]} .* sealed, refs 1, gpu pinned with 1 pins, ram ABSENT"
    with pytest.raises(InvariantError, match=want):
        table.drop(ids, 0)
    with pytest.raises(InvariantError, match="5 slots: must be at most the 4 that are free"):
        table.reserve(table.create(5), 1)


# -- Against the oracle


class Run:
    """Random calls, legal ones and others, made to a table and to its oracle."""

    def __init__(self, seed: int, num_slots: tuple[int, int, int]) -> None:
        self.random = random.Random(seed)
        self.num_slots = num_slots
        self.table = PageTable(*num_slots)
        self.oracle = Oracle(num_slots)
        self.ever: list[int] = []
        self.num_refused = 0

    def step(self) -> None:
        kind = self.random.random()
        if kind < 0.08:
            self.create()
        elif kind < 0.11:
            self.create_stored()
        elif kind < 0.18:
            self.evict()
        else:
            self.transition()
        self.table.check()
        self.compare()

    def remember(self, ids: Ids) -> list[int]:
        new = [int(id_) for id_ in ids]
        assert not set(new) & set(self.ever[-500:])
        assert not set(new) & self.oracle.pages.keys()
        self.ever += new
        return new

    def create(self) -> None:
        if len(self.oracle.pages) > 24:
            return
        for id_ in self.remember(self.table.create(self.random.randrange(4))):
            self.oracle.pages[id_] = Page()

    def create_stored(self) -> None:
        tier = self.random.choice(TIERS)
        slots = [
            self.random.randrange(-1, self.num_slots[tier] + 1)
            for _ in range(self.random.randrange(3))
        ]
        if len(set(slots)) == len(slots) and set(slots) <= self.oracle.free[tier]:
            ids = self.remember(self.table.create_stored(tier, ids_of(*slots)))
            for id_, slot in zip(ids, slots, strict=True):
                self.oracle.create_stored(id_, tier, slot)
        else:
            self.refused(lambda: self.table.create_stored(tier, ids_of(*slots)))

    def refused(self, call: Callable[[], object]) -> None:
        with pytest.raises(InvariantError):
            call()
        self.num_refused += 1

    def evict(self) -> None:
        tier, count = self.random.choice(TIERS), self.random.randrange(4)
        is_last_resort = self.random.random() < 0.3
        wanted = self.oracle.list(tier, "redundant" if is_last_resort else "droppable")[:count]
        self.oracle.dead = []
        for id_ in wanted:
            self.oracle.discard(id_, tier)
        evict = self.table.evict_redundant if is_last_resort else self.table.evict
        dropped, dead = evict(tier, count)
        assert dropped.tolist() == wanted
        assert dead.tolist() == self.oracle.dead

    def choose(self, verb: str, tier: int) -> list[int]:
        """Ids for which the verb is legal; now and then with a repeated, random or stale one."""
        candidates = list(self.oracle.pages)
        self.random.shuffle(candidates)
        chosen: list[int] = []
        wanted = self.random.randint(1, 4)
        for id_ in candidates:
            trial = self.oracle.copy([id_])
            try:
                getattr(trial, verb)(id_, tier)
            except RefusedError:
                continue
            chosen.append(id_)
            if len(chosen) == wanted:
                break
        for chance, pool in ((0.12, chosen), (0.06, candidates), (0.04, self.ever)):
            if pool and self.random.random() < chance:
                at = self.random.randint(0, len(chosen))
                chosen.insert(at, self.random.choice(pool))
        return chosen

    def transition(self) -> None:
        verb = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        tier = self.random.choice(TIERS)
        ids = self.choose(verb, tier)
        after = self.oracle.copy(ids)
        args = (ids_of(*ids), tier) if verb in COPY_VERBS else (ids_of(*ids),)
        try:
            for id_ in ids:
                getattr(after, verb)(id_, tier)
        except RefusedError:
            self.refused(lambda: getattr(self.table, verb)(*args))
            return
        answer = getattr(self.table, verb)(*args)
        self.oracle = after
        if verb == "reserve":
            assert answer.tolist() == after.slots
        elif answer is None:
            assert after.dead == []
        else:
            assert answer.tolist() == after.dead

    def compare(self) -> None:
        table, pages = self.table, list(self.oracle.pages.values())
        ids = ids_of(*self.oracle.pages)
        assert table.num_pages == len(pages)
        assert table.refs(ids).tolist() == [p.refs for p in pages]
        assert table.is_sealed(ids).tolist() == [p.sealed for p in pages]
        assert table.is_published(ids).tolist() == [p.published for p in pages]
        assert table.is_lost(ids).tolist() == [p.lost for p in pages]
        assert table.has_pins(ids).tolist() == [any(c.pins for c in p.copies) for p in pages]
        old = ids_of(*self.ever[-20:])
        assert table.alive(old).tolist() == [id_ in self.oracle.pages for id_ in old.tolist()]
        for tier in TIERS:
            copies = [p.copies[tier] for p in pages]
            assert table.slots(ids, tier).tolist() == [c.slot for c in copies]
            assert table.states(ids, tier).tolist() == [c.state for c in copies]
            assert table.pins(ids, tier).tolist() == [c.pins for c in copies]
            assert table.coldest_dirty(tier, 99).tolist() == self.oracle.list(tier, "dirty")
            counts = table.counts(tier)
            assert counts.slots == self.num_slots[tier]
            assert counts.free == len(self.oracle.free[tier])
            assert counts.filling == sum(c.state == CopyState.FILLING for c in copies)
            for place in (*LISTS, "pinned", "open"):
                assert getattr(counts, place) == sum(c.place == place for c in copies)


@pytest.mark.parametrize(
    ("seed", "num_slots"),
    [(1, (4, 6, 10)), (2, (3, 5, 0)), (3, (6, 0, 0)), (4, (4, 0, 8)), (5, (0, 4, 6))],
)
def test_random_batches_agree_with_the_oracle(seed: int, num_slots: tuple[int, int, int]) -> None:
    run = Run(seed, num_slots)
    for _ in range(4000):
        run.step()
    assert run.num_refused > 40
