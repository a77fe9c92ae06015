"""The disk's limits: caps that hold, free space that is left to others, bytes a day, and disks that are full."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_manager import config, grow
from test_store import PAGE, TOKENS, found
from world import LAYOUT, store_bytes

from tiermem import ConfigError, NotDurableError, TierConfig, TierManager, build, disk_budget
from tiermem._core import Tier
from tiermem.cli.manager_text import disk_text
from tiermem.disk_budget import DAY_S, DiskGuard, DiskLimits, Pause, WriteBudget
from tiermem.index_image import INDEX_FILE, read_index
from tiermem.private_files import PrivateDirectory
from tiermem.stats import Stats
from tiermem.store import ColdStore
from tiermem.store_files import index_bytes, slots_within
from tiermem.store_index import StoreIndex
from tiermem.store_names import NO_ROOT, GoneReason, PageName

DAY_BYTES = 640 << 20
STEP = DAY_BYTES // 64
STRIDE = LAYOUT.slot_bytes + 4096
MIB = 1 << 20


class Usage(NamedTuple):
    """What shutil.disk_usage answers."""

    total: int
    used: int
    free: int


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[PrivateDirectory]:
    opened = PrivateDirectory.make(tmp_path / "d")
    yield opened
    opened.close()


def du(path: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in [path, *path.rglob("*")])


def disk(stats: Stats) -> disk_budget.DiskStats:
    assert stats.disk is not None
    return stats.disk


# ---- bytes a day -----------------------------------------------------------------------------------


def test_a_budget_refills_steadily_and_holds_a_day(
    directory: PrivateDirectory, clock: Clock
) -> None:
    budget = WriteBudget(directory, DAY_BYTES, clock)
    assert budget.left_bytes == DAY_BYTES
    budget.spend(DAY_BYTES // 2)
    assert budget.left_bytes == DAY_BYTES // 2
    clock.now_s += DAY_S / 4
    assert budget.left_bytes == DAY_BYTES * 3 // 4
    clock.now_s += 100 * DAY_S
    assert budget.left_bytes == DAY_BYTES
    budget.spend(5 * DAY_BYTES)  # what could not wait
    assert budget.left_bytes == -DAY_BYTES
    clock.now_s += DAY_S
    assert budget.left_bytes == 0


def test_seconds_that_refill_less_than_a_byte_add_up(
    directory: PrivateDirectory, clock: Clock
) -> None:
    budget = WriteBudget(directory, int(DAY_S), clock)  # a byte a second
    budget.spend(1000)
    for _ in range(100):
        clock.now_s += 0.25
        budget.spend(0)
    assert budget.left_bytes == int(DAY_S) - 1000 + 25


def test_a_budget_survives_a_restart(directory: PrivateDirectory, clock: Clock) -> None:
    budget = WriteBudget(directory, DAY_BYTES, clock)
    budget.spend(DAY_BYTES // 2 + 12345)
    budget.close()
    clock.now_s += DAY_S / 8
    left = DAY_BYTES // 2 - 12345 + DAY_BYTES // 8
    assert WriteBudget(directory, DAY_BYTES, clock).left_bytes == left
    assert WriteBudget(directory, DAY_BYTES // 8, clock).left_bytes == DAY_BYTES // 8


def test_a_killed_process_leaves_no_more_than_there_was(
    directory: PrivateDirectory, clock: Clock
) -> None:
    rng = random.Random(7)
    for _ in range(20):
        budget = WriteBudget(directory, DAY_BYTES, clock)
        for _ in range(rng.randrange(30)):
            budget.spend(rng.randrange(2 * STEP))
        left = budget.left_bytes  # and it is gone, without closing
        after = WriteBudget(directory, DAY_BYTES, clock).left_bytes
        assert left - 4 * STEP <= after <= left
        clock.now_s += rng.random() * DAY_S / 10


def test_a_clock_that_goes_back_refills_nothing(directory: PrivateDirectory, clock: Clock) -> None:
    budget = WriteBudget(directory, DAY_BYTES, clock)
    budget.spend(DAY_BYTES)
    clock.now_s -= 10 * DAY_S
    assert budget.left_bytes == 0
    clock.now_s += DAY_S / 2
    assert budget.left_bytes == DAY_BYTES // 2
    budget.close()
    clock.now_s -= 1000 * DAY_S  # the file is from the future now
    assert WriteBudget(directory, DAY_BYTES, clock).left_bytes == DAY_BYTES // 2


def test_a_damaged_budget_is_empty_and_works(
    directory: PrivateDirectory, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(3)
    WriteBudget(directory, DAY_BYTES, clock).close()
    good = (directory.path / "budget").read_bytes()
    for trial in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        cut = rng.choice([bytes(bad), bytes(bad), good[: rng.randrange(len(good))], good + b"x"])
        directory.replace("budget", cut, durable=False)
        caplog.clear()
        budget = WriteBudget(directory, DAY_BYTES, clock)
        assert budget.left_bytes == 0, trial
        assert "the write budget starts empty" in caplog.text
        budget.spend(1)


def test_a_budget_that_cannot_be_kept_goes_on(
    directory: PrivateDirectory,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = WriteBudget(directory, DAY_BYTES, clock)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "replace", fail)
    for _ in range(10):
        budget.spend(DAY_BYTES // 10)
    budget.close()
    assert budget.left_bytes == 0
    assert caplog.text.count("cannot be kept for the next start") == 1


def test_the_budget_ends_publication_and_refills_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(
        disk_budget, "WriteBudget", lambda d, day_bytes: WriteBudget(d, day_bytes, clock)
    )
    few = replace(config(8, 8, 20, tmp_path / "s"), ssd_write_budget=3 * STRIDE)
    with TierManager(LAYOUT, few) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        with pytest.raises(
            NotDurableError, match=r"3 of 6 .*ssd_write_budget is used up"
        ) as caught:
            manager.flush()
        error = caught.value
        assert (error.num_pages, error.num_published) == (3, 6)
        assert error.reason == Pause.BUDGET.value
        seen = disk(manager.stats())
        assert (seen.written_bytes, seen.budget_left_bytes) == (3 * STRIDE, 0)
        assert (seen.budget_bytes, seen.skipped_pages) == (3 * STRIDE, 3)
        assert seen.pause == Pause.BUDGET.value
        with pytest.raises(NotDurableError, match="3 of 6 "):
            manager.flush()
        assert disk(manager.stats()).written_bytes == 3 * STRIDE
    with TierManager(LAYOUT, few) as manager:  # the first pages of the chain were kept
        assert found(manager) == 3 * PAGE
        assert disk(manager.stats()).budget_left_bytes == 0
        sequence = manager.open_sequence(TOKENS)
        grow(manager, sequence, TOKENS[sequence.num_tokens :])
        clock.now_s += DAY_S
        manager.flush()
        assert disk(manager.stats()).written_bytes == 3 * STRIDE
        assert disk(manager.stats()).pause == Pause.BUDGET.value
    with TierManager(LAYOUT, few) as manager:
        assert found(manager) == len(TOKENS)


def test_pages_that_are_needed_are_written_beyond_the_budget_and_counted(tmp_path: Path) -> None:
    tight = replace(config(2, 2, 20, tmp_path / "s"), ssd_write_budget=1)
    with TierManager(LAYOUT, tight) as manager:
        sequence = manager.open_sequence()
        for start in range(0, len(TOKENS), PAGE):
            grow(manager, sequence, TOKENS[start : start + PAGE])
        seen = disk(manager.stats())
        assert seen.written_bytes >= 2 * STRIDE
        assert seen.budget_left_bytes == -1  # at most a day's
        assert found(manager) == len(TOKENS)
        sequence.close()
        before = seen.written_bytes
        for first in (1000, 2000, 3000):  # nobody refers to these once they are closed: given up
            other = manager.open_sequence()
            grow(manager, other, [first + t for t in range(2 * PAGE)])
            other.close()
        with pytest.raises(NotDurableError, match="used up"):
            manager.flush()
        assert disk(manager.stats()).written_bytes == before
        assert disk(manager.stats()).skipped_pages > 0
        manager.check()


def test_no_page_is_written_twice(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        written = disk(manager.stats()).written_bytes
        assert written == len(TOKENS) // PAGE * STRIDE
        manager.flush()
        assert disk(manager.stats()).written_bytes == written
    with TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s")) as manager:
        assert found(manager) == len(TOKENS)
        again = manager.open_sequence(TOKENS[: 2 * PAGE])
        grow(manager, again, TOKENS[2 * PAGE :])  # the same tokens, computed again
        manager.flush()
        assert disk(manager.stats()).written_bytes == 0


# ---- free space that is left to others -------------------------------------------------------------


def test_below_the_floor_nothing_is_written_ahead_of_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [1 << 40]
    monkeypatch.setattr(DiskGuard, "_free_bytes", lambda self: free[0])
    settings = replace(config(4, 4, 20, tmp_path / "s"), ssd_free_floor="1GiB")
    with TierManager(LAYOUT, settings) as manager:
        free[0] = (1 << 30) - 1
        sequence = manager.open_sequence()
        grow(manager, sequence, TOKENS)
        with pytest.raises(NotDurableError, match=r"6 of 6 .*less than ssd_free_floor is free"):
            manager.flush()
        seen = disk(manager.stats())
        assert (seen.pause, seen.skipped_pages) == (Pause.FREE_FLOOR.value, 6)
        assert (seen.written_bytes, seen.free_floor_bytes) == (0, 1 << 30)
        assert "writes only what it must: less than ssd_free_floor" in caplog.text
        grow(manager, sequence, list(range(5000, 5000 + 6 * PAGE)))  # needs the SSD
        assert disk(manager.stats()).written_bytes > 0
        free[0] = 1 << 30
        manager.flush()
        assert disk(manager.stats()).pause is None
        manager.check()
    with TierManager(LAYOUT, settings) as manager:
        assert found(manager) == len(TOKENS)


def usage_of(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: Usage(total, total - free, free))


def slots_of(settings: TierConfig) -> int:
    store = build.open_store(LAYOUT, settings)
    assert store is not None
    store.close()
    return store.num_slots


def test_the_floor_is_a_share_of_the_file_system_but_not_more_than_a_gibibyte() -> None:
    assert TierConfig().free_floor_bytes(1000) == 50
    assert TierConfig().free_floor_bytes(1 << 40) == 1 << 30
    assert TierConfig(ssd_free_floor="10%").free_floor_bytes(1 << 40) == (1 << 40) // 10
    assert TierConfig(ssd_free_floor=0).free_floor_bytes(1 << 40) == 0


def test_auto_takes_a_share_of_what_is_free_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = TierConfig(ssd_path=tmp_path / "s", device="cpu")
    cap = store_bytes(100)
    free = 4 * cap
    usage_of(monkeypatch, 2 * free, free)
    assert slots_of(auto) == 100
    for elsewhere in (0, 10, -10, 60):  # pages' worth that others wrote or deleted meanwhile
        usage_of(monkeypatch, 2 * free, free - cap - elsewhere * STRIDE)
        assert slots_of(auto) == 100, elsewhere
    usage_of(monkeypatch, 2 * free, cap)  # twice that with its own: half of it is given back
    assert slots_of(auto) == slots_within(LAYOUT, 2 * cap // 4)
    usage_of(monkeypatch, 8 * free, 4 * free)
    assert slots_of(auto) > 400


def test_the_floor_limits_growth_and_never_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = TierConfig(ssd="100%", ssd_path=tmp_path / "s", device="cpu", ssd_free_floor=0)
    free = store_bytes(40)
    usage_of(monkeypatch, 2 * free, free)
    assert slots_of(share) == 40
    assert slots_of(replace(share, ssd=store_bytes(10))) == 10
    floor = replace(share, ssd_free_floor=store_bytes(20))
    usage_of(monkeypatch, 2 * free, store_bytes(30))
    assert slots_of(floor) in (19, 20)
    explicit = replace(floor, ssd=store_bytes(30))
    usage_of(monkeypatch, 2 * free, store_bytes(20))
    with pytest.raises(
        ConfigError, match=r"bytes are free for .* of which ssd_free_floor=.* leaves"
    ):
        slots_of(explicit)
    usage_of(monkeypatch, 2 * free, 0)  # others took everything: it opens as it is
    assert slots_of(replace(floor, ssd=store_bytes(19))) == 19
    assert slots_of(floor) == 19


def test_the_cap_holds_whatever_it_was_before(tmp_path: Path) -> None:
    rng = random.Random(11)
    for _ in range(12):
        pages = rng.choice([1, 3, 8, 20, 40])
        with TierManager(LAYOUT, config(4, 4, pages, tmp_path / "s")) as manager:
            cap = store_bytes(pages)
            assert disk(manager.stats()).cap_bytes == cap
            for _ in range(3):
                first = rng.randrange(1000)
                sequence = manager.open_sequence()
                grow(manager, sequence, [first + t for t in range(rng.choice([1, 2, 3]) * PAGE)])
                sequence.close()
                manager.flush()
                assert du(tmp_path / "s") <= cap
            assert disk(manager.stats()).used_bytes == manager.stats().ssd_disk_bytes
            manager.check()
        assert du(tmp_path / "s") <= cap


@pytest.mark.parametrize(
    ("name", "size", "pages"),
    [
        ("slots", None, 0),
        ("slots", 0, 0),
        ("slots", 4 * STRIDE + 100, 4),
        ("index/data.mdb", None, 6),  # made again from the slots
        ("index", None, 6),
    ],
)
def test_what_was_deleted_from_outside_is_gone_and_counts_are_right(
    tmp_path: Path, name: str, size: int | None, pages: int
) -> None:
    settings = config(8, 8, 20, tmp_path / "s")
    with TierManager(LAYOUT, settings) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
    place = tmp_path / "s" / name
    if size is not None:
        os.truncate(place, size)
    else:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with TierManager(LAYOUT, settings) as manager:
        tier = manager.stats().tiers[Tier.SSD]
        assert tier.used == manager.stats().published_pages <= pages
        assert found(manager) <= pages * PAGE
        assert name == "slots" or found(manager) == len(TOKENS)
        assert manager.stats().corrupt_pages == 0
        sequence = manager.open_sequence(TOKENS)
        if sequence.num_tokens < len(TOKENS):
            grow(manager, sequence, TOKENS[sequence.num_tokens :])
        manager.flush()
        assert du(tmp_path / "s") <= store_bytes(20)
        manager.check()
    with TierManager(LAYOUT, settings) as manager:
        assert found(manager) == len(TOKENS)


# ---- the index -------------------------------------------------------------------------------------


class Index:
    """A StoreIndex and the directory that its file is in."""

    def __init__(self, directory: PrivateDirectory, num_slots: int) -> None:
        self.directory = directory
        self.index = StoreIndex(directory, num_slots, read_index(directory))
        self.keys: dict[int, bytes] = {}

    def publish(self, slots: np.ndarray, names: list[PageName]) -> None:
        self.index.publish(slots, names)
        self.keys.update(zip(slots.tolist(), (name.key for name in names), strict=True))

    def unpublish(self, slots: np.ndarray, why: GoneReason) -> None:
        keys = [self.keys.pop(slot) for slot in slots.tolist() if slot in self.keys]
        self.index.unpublish_keys(keys, why)

    @property
    def num_bytes(self) -> int:
        return self.directory.size_of(INDEX_FILE)


def name_of(rng: random.Random, label: str = "") -> PageName:
    return PageName(rng.randbytes(32), rng.randbytes(32), 0, NO_ROOT, label)


def test_the_index_keeps_to_its_share_of_the_cap(directory: PrivateDirectory) -> None:
    """Every slot gets new pages again and again, with keys all over the tree, and labels that are all new."""
    rng = random.Random(5)
    num_slots = 300
    made = Index(directory, num_slots)
    slots = np.arange(num_slots, dtype=np.int64)
    for turn in range(40):
        some = np.array(rng.sample(range(num_slots), rng.choice([1, 30, 300])), dtype=np.int64)
        made.unpublish(some, GoneReason.EVICTED)
        made.index.generations[some] = turn * num_slots + 1 + np.arange(len(some), dtype=np.uint64)
        made.publish(some, [name_of(rng, f"{turn} {'x' * 150}") for _ in some])
        made.index.commit()
        assert made.num_bytes <= index_bytes(num_slots)
    count = int(made.index.is_published(slots).sum())
    made.index.close()
    again = Index(directory, num_slots)
    assert len(again.index.take_stored().slots) == count
    again.index.close()


def test_an_index_that_is_full_goes_on_with_what_matters(directory: PrivateDirectory) -> None:
    """Labels as long as they may be fill it: entries are written all the same."""
    rng = random.Random(6)
    num_slots = 800
    made = Index(directory, num_slots)
    slots = np.arange(num_slots, dtype=np.int64)
    made.index.generations[slots] = 1 + slots.astype(np.uint64)
    for turn in range(3):
        made.publish(slots, [name_of(rng, f"{turn} {i} {'y' * 190}") for i in range(num_slots)])
        made.index.commit()
        assert made.num_bytes <= index_bytes(num_slots)
        made.unpublish(slots, GoneReason.EVICTED)
    made.publish(slots, [name_of(rng) for _ in slots])
    made.index.commit()
    made.index.close()
    again = Index(directory, num_slots)
    assert len(again.index.take_stored().slots) == num_slots
    again.index.close()


def test_an_index_of_a_larger_store_shrinks(directory: PrivateDirectory) -> None:
    rng = random.Random(7)
    large = Index(directory, 4000)
    slots = np.arange(4000, dtype=np.int64)
    large.index.generations[slots] = 1 + slots.astype(np.uint64)
    names = [name_of(rng, f"label {i}") for i in range(4000)]
    large.index.publish(slots, names)
    large.index.commit()
    large.index.close()
    assert large.num_bytes > index_bytes(10)
    small = Index(directory, 10)
    assert small.num_bytes <= index_bytes(10)
    stored = small.index.take_stored()
    assert sorted(stored.slots.tolist()) == list(range(10))
    assert {stored.keys[i].tobytes() for i in range(10)} == {name.key for name in names[:10]}
    small.index.commit()
    assert small.num_bytes <= index_bytes(10)
    small.index.close()


# ---- a disk that is full ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def punch(path: Path) -> None:
    """Take the blocks of a file away, as a restored sparse copy has none."""
    keep_size, punch_hole = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDWR)
    size = os.fstat(fd).st_size
    result = libc.fallocate(fd, keep_size | punch_hole, ctypes.c_long(0), ctypes.c_long(size))
    os.close(fd)
    assert result == 0, os.strerror(ctypes.get_errno())


def fill(place: Path) -> Path:
    """Somebody else takes everything that is free."""
    other = place / "of somebody else"
    with other.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return other


def test_a_store_that_does_not_fit_is_refused_and_leaves_no_slots(small_disk: Path) -> None:
    settings = replace(config(8, 8, 20, small_disk / "s"), ssd="6MiB", ssd_free_floor=0)
    with pytest.raises(ConfigError, match="6MiB wanted, 4194304 bytes are free"):
        TierManager(LAYOUT, settings)
    with pytest.raises(ConfigError, match="cannot be had"):
        ColdStore(small_disk / "s", LAYOUT, 6 * MIB, "auto", 5.0)
    assert not (small_disk / "s" / "slots").exists()
    with TierManager(LAYOUT, replace(settings, ssd="auto")) as manager:
        assert disk(manager.stats()).cap_bytes <= MIB
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        assert du(small_disk / "s") <= disk(manager.stats()).cap_bytes


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    """What is stored stays; what finds no space keeps its other copy; afterwards all goes on."""
    settings = replace(config(8, 8, 40, small_disk / "s"), ssd_free_floor=0)
    with TierManager(LAYOUT, settings) as manager:
        grow(manager, manager.open_sequence(), TOKENS)
        manager.flush()
        other = fill(small_disk)
        more = [7000 + t for t in range(5 * PAGE)]
        grow(manager, manager.open_sequence(), more)
        manager.flush()  # its slots were allocated before
        other.unlink()
    with TierManager(LAYOUT, settings) as manager:
        assert found(manager) == len(TOKENS)
        assert manager.open_sequence(more).num_tokens == len(more)


def test_no_space_for_a_write_keeps_the_page_where_it_is(small_disk: Path) -> None:
    settings = replace(config(8, 8, 40, small_disk / "s"), ssd_free_floor=0)
    with TierManager(LAYOUT, settings) as manager:
        punch(small_disk / "s" / "slots")
        other = fill(small_disk)
        sequence = manager.open_sequence()
        grow(manager, sequence, TOKENS)
        with pytest.raises(NotDurableError, match=r"6 of 6 .*No space left"):
            manager.flush()
        seen = disk(manager.stats())
        assert seen.pause == Pause.DISK_FULL.value
        assert manager.stats().tiers[Tier.SSD].used == 0
        assert found(manager) == len(TOKENS)
        with pytest.raises(NotDurableError, match=r"6 of 6 .*a write found no space"):
            manager.flush()  # nothing is tried for a while
        grow(manager, sequence, [1, 2, 3])
        manager.check()
        other.unlink()
        manager._store.guard._full_until_s = 0.0  # type: ignore[union-attr]
        manager.flush()
        assert disk(manager.stats()).pause is None
    with TierManager(LAYOUT, settings) as manager:
        assert found(manager) == len(TOKENS)


def test_others_that_fill_the_disk_pause_the_tier(small_disk: Path) -> None:
    settings = replace(config(4, 4, 40, small_disk / "s"), ssd_free_floor="10%")
    with TierManager(LAYOUT, settings) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, TOKENS[: 2 * PAGE])
        manager.flush()
        other = fill(small_disk)
        assert disk(manager.stats()).pause == Pause.FREE_FLOOR.value
        for start in range(2 * PAGE, 20 * PAGE, PAGE):  # far more than GPU and RAM hold
            grow(manager, sequence, list(range(start, start + PAGE)))
        manager.check()
        other.unlink()
        manager.flush()
        assert disk(manager.stats()).pause is None
        assert du(small_disk / "s") <= disk(manager.stats()).cap_bytes


def test_a_guard_without_limits_allows_everything(directory: PrivateDirectory) -> None:
    guard = DiskGuard(directory, MIB, STRIDE, DiskLimits())
    assert guard.allow(10**9) == 10**9
    assert guard.pause is None
    guard.note_full()
    assert (guard.allow(5), guard.pause) == (0, Pause.DISK_FULL)
    assert guard.stats().skipped_pages == 5
    guard.close()
    guard.close()


def test_the_text_tells_what_was_written_and_why_not_more(directory: PrivateDirectory) -> None:
    guard = DiskGuard(directory, MIB, STRIDE, DiskLimits(1 << 50, 4 * MIB))
    guard.note_written(MIB)
    guard.allow(7)
    text = disk_text(guard.stats())
    assert text.startswith("1.0 MiB written, 3.0 MiB of 4.0 MiB a day left; ")
    assert text.endswith(f"; writes only what it must: {Pause.FREE_FLOOR.value}; 7 pages spared")
    guard.close()
