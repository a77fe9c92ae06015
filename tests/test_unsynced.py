"""UnsyncedSlots beside a disk that drops what it may: what a commit relies on survives a loss of power."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from tiermem.store_transfer import Int64s
from tiermem.unsynced import UnsyncedSlots

NUM_SLOTS = 6
PARTS = 2
"""Of a slot: its page and its trailer."""


def ids(*slots: int) -> Int64s:
    return np.array(slots, dtype=np.int64)


@dataclass(eq=False)
class Moving:
    """A transfer, as UnsyncedSlots sees it; it writes `version` to `parts` of a slot, some time before it ends."""

    slot: int
    parts: tuple[int, ...]
    version: int
    num_landed: int = 0
    has_ended: bool = False
    has_succeeded: bool = False


@dataclass
class Disk:
    """Versions of each part of each slot: what is read, and what is on the medium.

    A sync that fails drops all that was written before it failed, and the next one knows nothing of it.
    """

    read: np.ndarray = field(default_factory=lambda: np.zeros((NUM_SLOTS, PARTS), dtype=int))
    medium: np.ndarray = field(default_factory=lambda: np.zeros((NUM_SLOTS, PARTS), dtype=int))
    is_dirty: np.ndarray = field(default_factory=lambda: np.zeros((NUM_SLOTS, PARTS), dtype=bool))
    covered: np.ndarray = field(default_factory=lambda: np.zeros((NUM_SLOTS, PARTS), dtype=bool))

    def land(self, moving: Moving) -> None:
        """The next part of a write reaches the disk."""
        part = moving.parts[moving.num_landed]
        moving.num_landed += 1
        self.read[moving.slot, part] = moving.version
        self.is_dirty[moving.slot, part] = True
        self.covered[moving.slot, part] = False

    def begin_sync(self) -> None:
        self.covered = self.is_dirty.copy()

    def end_sync(self, *, is_good: bool) -> None:
        if not is_good:
            self.is_dirty[:] = False
            return
        self.medium[self.covered] = self.read[self.covered]
        self.is_dirty[self.covered] = False


class Run:
    """Random operations on both. `entries` are slots that the next commit may name."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.disk = Disk()
        self.unsynced = UnsyncedSlots(NUM_SLOTS)
        self.moving: dict[int, Moving] = {}
        self.entries: set[int] = set()
        self.syncing: set[int] | None = None
        self.version = self.num_failed = self.num_again = self.num_checked = 0

    def write(self, slot: int, parts: tuple[int, ...] = (0, 1)) -> None:
        self.version += 1
        moving = Moving(slot, parts, self.version)
        self.unsynced.note_write(moving, ids(slot), is_whole=len(parts) == PARTS)  # type: ignore[arg-type]
        self.moving[slot] = moving
        self.entries.discard(slot)
        if self.syncing:
            self.syncing.discard(slot)

    def land(self) -> None:
        moving = self.moving[int(self.rng.choice(list(self.moving)))]
        if moving.num_landed < len(moving.parts):
            self.disk.land(moving)

    def end_write(self, *, is_good: bool) -> None:
        moving = self.moving.pop(int(self.rng.choice(list(self.moving))))
        while is_good and moving.num_landed < len(moving.parts):
            self.disk.land(moving)
        moving.has_ended, moving.has_succeeded = True, is_good
        if is_good:
            self.entries.add(moving.slot)

    def begin_sync(self) -> None:
        """As a commit does: what is in doubt is written again first."""
        for slot in self.unsynced.to_write_again().tolist():
            if slot in self.entries and not self.write_again(slot):
                return
        self.unsynced.begin_sync()
        self.disk.begin_sync()
        self.syncing = set(self.entries)

    def write_again(self, slot: int) -> bool:
        """Write what is in a slot once more; it may fail after any part."""
        moving = Moving(slot, (0, 1), 0)
        self.unsynced.note_write(moving, ids(slot), is_whole=True)  # type: ignore[arg-type]
        count = int(self.rng.choice([0, 1, PARTS], p=[0.1, 0.1, 0.8]))
        self.disk.is_dirty[slot, :count] = True
        moving.has_ended, moving.has_succeeded = True, count == PARTS
        self.num_again += 1
        return moving.has_succeeded

    def end_sync(self, *, is_good: bool) -> None:
        assert self.syncing is not None
        self.disk.end_sync(is_good=is_good)
        self.unsynced.end_sync(is_good=is_good)
        durable, self.syncing = self.syncing, None
        if not is_good:
            self.num_failed += 1
            return
        for slot in durable:
            self.num_checked += 1
            assert self.disk.medium[slot].tolist() == self.disk.read[slot].tolist()

    def step(self) -> None:
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.moving]
        match self.rng.integers(8):
            case 0 | 1 if free:
                self.write(int(self.rng.choice(free)))
            case 2 if free:
                self.write(int(self.rng.choice(free)), (int(self.rng.integers(PARTS)),))
            case 3 | 4 if self.moving:
                self.land()
            case 5 if self.moving:
                self.end_write(is_good=self.rng.random() < 0.9)
            case _ if self.syncing is None:
                self.begin_sync()
            case _:
                self.end_sync(is_good=self.rng.random() < 0.6)


def test_what_a_good_commit_names_is_on_the_medium_whatever_failed_before() -> None:
    seed = np.random.SeedSequence().entropy
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    run = Run(np.random.default_rng(seed))
    for _ in range(12_000):
        run.step()
    assert min(run.num_failed, run.num_again, run.num_checked) > 50


def test_nothing_is_written_again_without_a_failure() -> None:
    run = Run(np.random.default_rng(1))
    for slot in range(NUM_SLOTS):
        run.write(slot)
        run.end_write(is_good=True)
        run.begin_sync()
        run.end_sync(is_good=True)
    assert run.num_again == 0
    assert len(run.unsynced.to_write_again()) == 0


def test_what_was_durable_before_a_failure_is_not_in_doubt() -> None:
    run = Run(np.random.default_rng(1))
    for slot, is_good in ((0, True), (1, False)):
        run.write(slot)
        run.end_write(is_good=True)
        run.begin_sync()
        run.end_sync(is_good=is_good)
    assert run.unsynced.to_write_again().tolist() == [1]


@pytest.mark.parametrize("parts", [(0, 1), (0,)], ids=["whole", "part"])
def test_a_damaged_slot_is_one_until_it_is_written(parts: tuple[int, ...]) -> None:
    run = Run(np.random.default_rng(1))
    for slot in (0, 1):
        run.write(slot)
        run.end_write(is_good=True)
    run.begin_sync()
    run.end_sync(is_good=False)
    run.unsynced.note_damaged(ids(1))
    assert run.unsynced.to_write_again().tolist() == [0]
    assert run.unsynced.are_damaged(ids(0, 1, 2)).tolist() == [False, True, False]
    run.write(1, parts)
    assert not run.unsynced.are_damaged(ids(1)).any()
    run.end_write(is_good=True)
    # a page of which only a part was written may still lack the other
    assert run.unsynced.to_write_again().tolist() == ([0] if len(parts) == PARTS else [0, 1])


def test_many_writes_at_once_are_not_looked_at_again_and_again() -> None:
    num_looks, count = 0, 3000

    class Counting(Moving):
        @property
        def has_ended(self) -> bool:
            nonlocal num_looks
            num_looks += 1
            return False

        @has_ended.setter
        def has_ended(self, _: bool) -> None:
            pass

    unsynced = UnsyncedSlots(count)
    for slot in range(count):
        unsynced.note_write(Counting(slot, (0, 1), 1), ids(slot), is_whole=True)  # type: ignore[arg-type]
    assert num_looks < 10 * count
