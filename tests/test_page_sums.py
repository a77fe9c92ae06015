"""Checksums from where pages are sealed to where they are used: a bit flipped anywhere on the way is found.

Every page is made by real steps, on the CPU device and on the simulated one, whose streams run late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiermem import CorruptPageError, PageLayout, Sequence, TierConfig, TierManager, _core
from tiermem._core import Tier
from tiermem.device import Device
from tiermem.device.cpu import CpuDevice
from tiermem.device.simulated import SimulatedDevice
from tiermem.pools import VALID

LAYOUT = PageLayout(num_layers=3, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
PAGE = 16
SLOT = LAYOUT.slot_bytes
DEVICES: dict[str, Callable[[], Device]] = {
    "cpu": CpuDevice,
    "simulated": lambda: SimulatedDevice(seed=3),
    "late": lambda: SimulatedDevice(seed=4, eagerness=0.0),
}


@pytest.fixture(params=DEVICES)
def open_manager(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[..., TierManager]]:
    made: list[TierManager] = []

    def make(gpu: int, ram: int, ssd: int = 0, **values: Any) -> TierManager:
        path = {"ssd_path": tmp_path / "store", "ssd": 64 << 20} if ssd else {"ssd": 0}
        config = TierConfig(
            gpu=gpu * SLOT, ram=ram * SLOT, device="cpu", low_watermark=0, high_watermark=0,
            **{"cpu_share": 0.0, **path, **values},
        )  # fmt: skip
        device = DEVICES[request.param]()
        made.append(TierManager(LAYOUT, config, device=device))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def kv(start: int, count: int, layer: int) -> torch.Tensor:
    """(2, tokens, heads, head_dim), another one for every position and layer."""
    random = np.random.default_rng([start, count, layer])
    return torch.from_numpy(random.standard_normal((2, count, 1, 16)).astype(np.float32))


def grow(manager: TierManager, sequence: Sequence, count: int) -> None:
    """One step of `count` new tokens, attended in every layer."""
    start = sequence.num_tokens
    with manager.step([sequence], count) as step:
        for layer in range(LAYOUT.num_layers):
            k, v = kv(start, count, layer)
            step.append(layer, k, v)
            step.attend(layer, torch.ones(count, 1, 16))


def slot_of(manager: TierManager, page: int, tier: Tier) -> int:
    return int(manager._core.table.slots(np.array([page]), tier)[0])


def has(manager: TierManager, page: int, tier: Tier) -> bool:
    return bool(manager._core.table.states(np.array([page]), tier)[0] == VALID)


def flip(manager: TierManager, page: int, tier: Tier, layer: int) -> None:
    """Flip a bit of a copy in memory."""
    pool = manager._core.pools[tier]
    where = slot_of(manager, page, tier) * pool.slot_bytes + layer * LAYOUT.layer_bytes + 37
    pool.memory.tensor[where] ^= 4


def flip_on_disk(manager: TierManager, page: int, layer: int) -> None:
    store = manager._store
    assert store is not None
    where = slot_of(manager, page, Tier.SSD) * store.slot_stride + layer * LAYOUT.layer_bytes + 37
    with (store.path / "slots").open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 4]))


def corrupt(manager: TierManager) -> dict[str, int]:
    return {tier.tier: tier.corrupt for tier in manager.stats().tiers if tier.corrupt}


def check_rows(manager: TierManager) -> None:
    """Every VALID copy of a sealed page in memory has the sums of its bytes."""
    core = manager._core
    core.in_flight.drain()
    pages = np.unique(np.concatenate([s.pages for s in manager._sequences]))
    pages = pages[core.table.is_sealed(pages)]
    for tier in core.pools:
        held = pages[core.table.states(pages, tier) == VALID]
        slots = core.table.slots(held, tier)
        addresses = core.pools[tier].addresses(slots)
        sums = _core.checksum_pages(addresses, LAYOUT.layer_bytes, LAYOUT.num_layers)
        assert np.array_equal(core.mover.sums.of(tier, slots), sums), tier


Open = Callable[..., TierManager]


def suspended(manager: TierManager, tokens: int = 4 * PAGE) -> Sequence:
    """A sequence whose pages lie in a lower tier alone."""
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens)
    sequence.suspend()
    return sequence


# ---- where sums come from -------------------------------------------------------------------------


def test_sums_are_born_when_pages_are_sealed(open_manager: Open) -> None:
    manager = open_manager(8, 8)
    sequence = manager.open_sequence()
    grow(manager, sequence, 3 * PAGE + 5)
    check_rows(manager)
    twin = sequence.fork()  # seals the last page, which is partly filled
    check_rows(manager)
    grow(manager, twin, 30)
    grow(manager, sequence, 1)  # both continue it in pages of their own
    check_rows(manager)


def test_a_page_that_was_reopened_is_summed_again(open_manager: Open) -> None:
    manager = open_manager(8, 8)
    sequence = manager.open_sequence()
    grow(manager, sequence, 2 * PAGE)
    before = manager._core.table.slots(sequence.pages, Tier.GPU)
    manager._core.in_flight.drain()
    old = manager._core.mover.sums.of(Tier.GPU, before)
    sequence.rollback(PAGE // 2)
    grow(manager, sequence, PAGE)
    check_rows(manager)
    after = manager._core.mover.sums.of(Tier.GPU, before)
    assert np.array_equal(old[0], after[0]) and (old[1] != after[1]).all()


@pytest.mark.parametrize("ssd", [0, 1])
def test_sums_go_with_the_copies(open_manager: Open, ssd: int) -> None:
    """Down and up again, through slots that other pages had before."""
    manager = open_manager(4, 3 if ssd else 16, ssd)
    sequences = [manager.open_sequence() for _ in range(3)]
    for _ in range(3):
        for sequence in sequences:
            grow(manager, sequence, PAGE + 3)
            check_rows(manager)
            sequence.suspend()
            check_rows(manager)
    assert not corrupt(manager)
    for sequence in sequences:
        for layer in range(LAYOUT.num_layers):
            k, _ = sequence.read(layer, 0, sequence.num_tokens)
            size = PAGE + 3
            for start in range(0, 3 * size, size):
                assert torch.equal(k[start : start + size], kv(start, size, layer)[0])


@pytest.mark.parametrize("ram", [24, 0])
def test_pages_written_through_have_sums(open_manager: Open, ram: int) -> None:
    manager = open_manager(2, ram, ssd=1)
    sequence = manager.open_sequence()
    grow(manager, sequence, 6 * PAGE + 5)
    check_rows(manager)
    grow(manager, sequence, 2 * PAGE)  # reads all of them, and continues the last one
    check_rows(manager)
    assert not corrupt(manager)


# ---- damage in RAM --------------------------------------------------------------------------------


def test_a_page_damaged_in_ram_is_found_on_promotion(open_manager: Open) -> None:
    manager = open_manager(8, 8)
    sequence = suspended(manager)
    bad = int(sequence.pages[2])
    flip(manager, bad, Tier.RAM, layer=1)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == caught.value.lost == (bad,) and not caught.value.can_retry
    assert sequence.num_tokens == 4 * PAGE
    assert corrupt(manager) == {"RAM": 1} and manager.stats().corrupt_pages == 1
    assert not has(manager, bad, Tier.RAM) and not has(manager, bad, Tier.GPU)
    manager.check()
    with pytest.raises(CorruptPageError) as caught:  # it stays lost, the others are there
        grow(manager, sequence, 1)
    assert caught.value.lost == (bad,)
    assert corrupt(manager) == {"RAM": 1}
    sequence.rollback(2 * PAGE)
    grow(manager, sequence, 2 * PAGE)
    check_rows(manager)


def test_another_copy_is_taken_instead(open_manager: Open) -> None:
    manager = open_manager(8, 8, ssd=1)
    sequence = suspended(manager)
    core = manager._core
    core.mover.submit(sequence.pages, Tier.RAM, Tier.SSD)
    core.in_flight.drain()
    bad = int(sequence.pages[1])
    flip(manager, bad, Tier.RAM, layer=2)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == (bad,) and caught.value.can_retry
    assert not has(manager, bad, Tier.RAM) and has(manager, bad, Tier.SSD)
    grow(manager, sequence, 1)
    assert corrupt(manager) == {"RAM": 1}
    check_rows(manager)
    manager.check()


def test_a_prefetched_page_that_is_damaged_is_not_kept(open_manager: Open) -> None:
    """No step counts on it: the miss shows when the page is wanted."""
    manager = open_manager(8, 8)
    sequence = suspended(manager)
    bad = int(sequence.pages[0])
    flip(manager, bad, Tier.RAM, layer=0)
    assert sequence.prefetch() == 4
    manager._core.in_flight.drain()
    assert not has(manager, bad, Tier.GPU) and not has(manager, bad, Tier.RAM)
    assert all(has(manager, int(page), Tier.GPU) for page in sequence.pages[1:])
    with pytest.raises(CorruptPageError) as caught:
        sequence.read(0, 0, PAGE)
    assert caught.value.lost == (bad,)


def test_damage_on_the_way_costs_no_copy(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in RAM is right: it is a miss, and works when it is done again."""
    manager = open_manager(8, 8)
    sequence = suspended(manager)
    bad = int(sequence.pages[3])
    core = manager._core
    right = core.mover.sums.verify

    def damaged(check: Any, layers: range, stream: Any) -> None:
        stream.synchronize()
        core.pools[Tier.GPU].memory.tensor[slot_of(manager, bad, Tier.GPU) * SLOT + 5] ^= 1
        right(check, layers, stream)

    monkeypatch.setattr(core.mover.sums, "verify", damaged)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == (bad,) and caught.value.can_retry
    assert has(manager, bad, Tier.RAM)
    monkeypatch.undo()
    grow(manager, sequence, 1)
    check_rows(manager)


# ---- damage while pages are streamed --------------------------------------------------------------


def streaming(manager: TierManager) -> Sequence:
    """A sequence of which most pages are too many for the hot tier."""
    sequence = manager.open_sequence()
    grow(manager, sequence, 9 * PAGE + 3)
    return sequence


@pytest.mark.parametrize("layer", range(3))
def test_a_streamed_slice_damaged_in_ram_undoes_the_step(open_manager: Open, layer: int) -> None:
    manager = open_manager(3, 16)
    sequence = streaming(manager)
    bad = int(sequence.pages[4])
    flip(manager, bad, Tier.RAM, layer)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == caught.value.lost == (bad,)
    assert sequence.num_tokens == 9 * PAGE + 3
    assert corrupt(manager) == {"RAM": 1}
    manager.check()
    sequence.rollback(5 * PAGE + 3)
    grow(manager, sequence, 4 * PAGE)
    check_rows(manager)


def test_a_slice_damaged_while_the_step_runs_is_found(open_manager: Open) -> None:
    """Between layers: each layer's slices are compared as they come."""
    manager = open_manager(3, 16)
    sequence = streaming(manager)
    bad = int(sequence.pages[4])

    def run() -> None:
        with manager.step([sequence]) as step:
            for layer in range(3):
                step.append(layer, *kv(0, 1, layer))
                if layer == 0:
                    flip(manager, bad, Tier.RAM, 2)
                step.attend(layer, torch.ones(1, 1, 16))

    with pytest.raises(CorruptPageError, match="RAM") as caught:
        run()
    assert caught.value.pages == (bad,)


def test_a_page_that_continues_a_damaged_one_is_not_kept(open_manager: Open) -> None:
    manager = open_manager(8, 8)
    sequence = suspended(manager, 2 * PAGE + 5)
    bad = int(sequence.pages[2])
    flip(manager, bad, Tier.RAM, 1)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == (bad,)
    assert sequence.pages[2] == bad and sequence.num_tokens == 2 * PAGE + 5
    manager.check()


def test_a_streamed_page_that_is_damaged_in_ram_comes_from_the_ssd(open_manager: Open) -> None:
    manager = open_manager(3, 16, ssd=1)
    sequence = streaming(manager)
    core = manager._core
    in_ram = sequence.pages[core.table.states(sequence.pages, Tier.RAM) == VALID]
    core.mover.submit(in_ram, Tier.RAM, Tier.SSD)
    core.in_flight.drain()
    bad = int(in_ram[2])
    flip(manager, bad, Tier.RAM, 1)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.pages == (bad,) and caught.value.can_retry
    grow(manager, sequence, 1)
    check_rows(manager)


@pytest.mark.parametrize("seed", range(12))
def test_a_page_on_the_ssd_is_continued_while_its_slices_are_compared(
    tmp_path: Path, seed: int
) -> None:
    """Its bytes and sums, read layer by layer through one half of the ring, are those that were stored."""
    config = TierConfig(
        gpu=3 * SLOT, ram=0, ssd=64 << 20, ssd_path=tmp_path / "store", device="cpu",
        staging_pages=1,
    )  # fmt: skip
    device = SimulatedDevice(seed=seed, eagerness=(0.0, 0.3, 0.7)[seed % 3])
    with TierManager(LAYOUT, config, device=device) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 5 * PAGE + 5)
        for _ in range(3):
            sequence.suspend()
            assert not has(manager, int(sequence.pages[-1]), Tier.GPU)
            grow(manager, sequence, 1)
        k, v = sequence.read(2, 0, 5 * PAGE + 5)
        assert torch.equal(torch.stack([k, v]), kv(0, 5 * PAGE + 5, 2))
        assert corrupt(manager) == {}


def test_a_half_is_filled_again_behind_the_comparison_too(open_manager: Open) -> None:
    """Which runs on the compute stream, beside the copy out of the half."""
    core = open_manager(8, 8)._core
    target = core.pools[Tier.GPU].addresses(np.array([0], dtype=np.int64))
    records: list[Any] = []
    kind = type(core.device.compute_stream())
    record = kind.record

    def noted(stream: Any) -> Any:
        event = record(stream)
        records.append(event)
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "record", noted)
        core.ring.copy_out(0, target)
    users = core.ring._halves[0].users
    assert len(users) == 2
    assert [any(event is user for user in users) for event in records] == [True, True]


def test_what_is_compared_keeps_the_sums_it_is_compared_with(open_manager: Open) -> None:
    manager = open_manager(8, 0, ssd=1)
    sequence = manager.open_sequence()
    grow(manager, sequence, 2 * PAGE)
    sequence.suspend()
    core = manager._core
    tiers = np.full(2, int(Tier.SSD), dtype=np.int64)
    core.table.pin(sequence.pages, Tier.SSD)
    check = core.ring.load(0, 1, sequence.pages, tiers)
    core.table.unpin(sequence.pages, Tier.SSD)
    core.ring.end_use(0)
    assert check.sums is not None
    rows = check.sums.ctypes.data + np.arange(2) * check.sums.strides[0]
    assert check.slices.rows.tolist() == rows.tolist()


# ---- damage on the way to the SSD -----------------------------------------------------------------


def test_damage_in_the_staging_buffer_of_a_write_is_found(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written has the sums from when the pages were sealed."""
    manager = open_manager(8, 0, ssd=1)
    sequence = manager.open_sequence()
    grow(manager, sequence, 4 * PAGE)
    store = manager._store
    assert store is not None
    write = store.write

    def damaged(slots: np.ndarray, addresses: np.ndarray, *rest: Any) -> Any:
        lane = manager._core.mover._lanes[Tier.GPU].pool
        lane.memory.tensor[int(addresses[0]) - lane.memory.address + 9] ^= 32
        return write(slots, addresses, *rest)

    monkeypatch.setattr(store, "write", damaged)
    sequence.suspend()
    monkeypatch.undo()
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert len(caught.value.lost) >= 1 and set(caught.value.lost) <= set(sequence.pages.tolist())
    assert set(corrupt(manager)) == {"SSD"}
    manager.check()


def test_damage_in_ram_before_a_write_is_found_when_it_is_read(open_manager: Open) -> None:
    manager = open_manager(8, 8, ssd=1)
    sequence = suspended(manager)
    bad = int(sequence.pages[1])
    flip(manager, bad, Tier.RAM, 0)
    core = manager._core
    core.room.move_down(sequence.pages, Tier.RAM)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.lost == (bad,)
    assert corrupt(manager) == {"SSD": 1}


@pytest.mark.parametrize("ram", [8, 0])
def test_a_bit_flipped_on_the_ssd_is_found(open_manager: Open, ram: int) -> None:
    manager = open_manager(8, ram, ssd=1)
    sequence = suspended(manager)
    core = manager._core
    if ram:
        core.room.move_down(sequence.pages, Tier.RAM)
    bad = int(sequence.pages[2])
    flip_on_disk(manager, bad, 1)
    with pytest.raises(CorruptPageError) as caught:
        grow(manager, sequence, 1)
    assert caught.value.lost == (bad,)
    assert corrupt(manager) == {"SSD": 1}
    manager.check()


# ---- pages attended in RAM ------------------------------------------------------------------------


@pytest.mark.parametrize("verify_ram", ["sample", "always"])
def test_a_page_attended_in_ram_is_found(open_manager: Open, verify_ram: str) -> None:
    """Always: by the first step. Sampled: by one of as many steps as there are pages."""
    manager = open_manager(3, 16, cpu_share=1.0, verify_ram=verify_ram)
    if manager._core.ram is None:
        pytest.skip("nothing is attended in RAM here")
    sequence = streaming(manager)
    grow(manager, sequence, 1)
    in_ram = sequence.pages[manager._core.table.states(sequence.pages, Tier.RAM) == VALID]
    assert len(in_ram) >= 5
    bad = int(in_ram[3])
    flip(manager, bad, Tier.RAM, 2)
    done = manager.stats().steps

    def run() -> None:
        for _ in in_ram:
            grow(manager, sequence, 1)

    with pytest.raises(CorruptPageError) as caught:
        run()
    assert manager.stats().steps == done + 1 or verify_ram == "sample"
    assert caught.value.pages == caught.value.lost == (bad,)
    assert corrupt(manager) == {"RAM": 1}
    manager.check()


# ---- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.RAM])
def test_reading_finds_damage(open_manager: Open, tier: Tier) -> None:
    manager = open_manager(8, 8)
    sequence = manager.open_sequence()
    grow(manager, sequence, 4 * PAGE + 2)
    if tier == Tier.RAM:
        sequence.suspend()
    bad = int(sequence.pages[1])
    flip(manager, bad, tier, 1)
    sequence.read(0, 0, 4 * PAGE + 2)
    with pytest.raises(CorruptPageError) as caught:
        sequence.read(1, 0, 4 * PAGE + 2)
    assert caught.value.pages == (bad,)
    assert corrupt(manager) == {tier.name: 1}
    manager.check()
    with pytest.raises(CorruptPageError) as caught:  # nor do steps get it, whatever held it
        grow(manager, sequence, 1)
    assert caught.value.lost == (bad,)
    manager._core.in_flight.drain()
    manager.poll()
    assert not has(manager, bad, tier)
