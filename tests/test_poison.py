"""The debug mode: stray writes to free memory are found in every tier, and right work runs as ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from liveness_support import PAGE, append, check_content, grow, open_manager
from world import World

from tiermem import ConfigError, InvariantError, Sequence, TierConfig, TierManager
from tiermem._core import Tier
from tiermem.device.simulated import SimulatedDevice

SLOTS = (4, 4, 16)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_are_as_ever(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERMEM_DEBUG", "poison")
    slots = ((4, 8, 0), (3, 4, 12), (8, 8, 30))[seed]
    world = World(seed, slots, tmp_path / "s" if slots[2] else None)
    assert type(world.core.table).__name__ == "PoisonedTable"
    world.run(250)
    if slots[2]:
        world.reopen()
        world.run(100)
    world.close()


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.RAM])
@pytest.mark.parametrize("is_new", [True, False], ids=["never-used", "freed"])
def test_a_stray_write_to_a_free_slot_is_found(tmp_path: Path, tier: Tier, is_new: bool) -> None:
    manager = open_manager(tmp_path / "s", SLOTS, debug="poison")
    if not is_new:
        sequence = manager.open_sequence()
        grow_by_pages(manager, sequence, 8)
        sequence.close()
    pool = manager._core.pools[tier]
    filled = manager._core.mover.poison._filled[tier.name]  # type: ignore[union-attr]
    assert len(filled) == pool.num_slots
    slot = min(filled)
    pool.memory.tensor[slot * pool.slot_bytes + 37] = 1
    sequence = manager.open_sequence()
    with pytest.raises(InvariantError, match=rf"{tier.name}: slot {slot} .* byte 37 while"):
        grow_by_pages(manager, sequence, 8)
    manager.close()


def grow_by_pages(manager: TierManager, sequence: Sequence, count: int) -> None:
    for _ in range(count):
        append(manager, sequence, PAGE, 3)


def test_a_stray_write_to_a_free_slot_of_the_ssd_is_found(tmp_path: Path) -> None:
    manager = open_manager(tmp_path / "s", SLOTS, debug="poison")
    sequence = manager.open_sequence()
    grow(manager, sequence, 3 * PAGE)
    manager.flush()
    sequence.close()
    manager._core.leases.end_all()
    assert manager._core.room.evict(Tier.GPU, 3) == 3
    assert manager._core.room.evict(Tier.SSD, 3) == 3
    assert manager._store is not None
    with (manager._store.path / "slots").open("r+b") as file:
        file.seek(1 * manager._store.slot_stride + 5)
        file.write(b"\0")
    grow(manager, manager.open_sequence(), 3 * PAGE, 2)
    with pytest.raises(InvariantError, match="SSD: slot 1 was written to at byte 5 while"):
        manager.flush()
    manager.close()


def test_a_stray_write_to_free_staging_is_found(tmp_path: Path) -> None:
    manager = open_manager(tmp_path / "s", (4, 0, 16), debug="poison")
    grow(manager, manager.open_sequence(), 2 * PAGE)
    memory = manager._core.mover.staging[0]
    memory.tensor[:] = 3
    with pytest.raises(InvariantError, match=r"staging .*: slot . was written to at byte 0 while"):
        manager.flush()
    manager.close()


def test_what_nobody_wrote_is_not_a_number(tmp_path: Path) -> None:
    device = SimulatedDevice(5)
    with open_manager(tmp_path / "s", SLOTS, device, debug="poison") as manager:
        sequence = manager.open_sequence()
        append(manager, sequence, 2 * PAGE)
        slot = int(manager._core.table.slots(sequence.pages, Tier.GPU)[0])
        check_content(sequence)
        sequence.rollback(2 * PAGE)
        manager._core.in_flight.drain()
        assert torch.isnan(manager._core.hot.data.view(-1, PAGE)[slot]).all()


def test_the_key_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TierConfig(debug="poison", gpu=1 << 20, ram=0).to_table()["debug"] == "poison"
    with pytest.raises(ConfigError, match="debug"):
        TierConfig(debug="yes")
    monkeypatch.setenv("TIERMEM_DEBUG", "loud")
    with pytest.raises(ConfigError, match="TIERMEM_DEBUG='loud': must be one of"):
        open_manager(None, (4, 4, 0))
    assert np.isnan(np.frombuffer(b"\xff" * 4, dtype=np.float16)).all()
