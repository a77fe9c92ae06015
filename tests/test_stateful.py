"""Random operations on manager, sequences and the simulated device, against an oracle.

20,000 of them; TIERMEM_RANDOM_RUNS=200 makes them 100,000.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from world import World

SLOTS = ((4, 8, 0), (3, 4, 12), (6, 0, 24), (48, 6, 12), (2, 20, 0), (8, 8, 30), (1, 3, 24))
RUNS = int(os.environ.get("TIERMEM_RANDOM_RUNS", "40"))
OPERATIONS = 500
"""Of one run; half of them before the manager is closed and opened again, where there is a store."""


@pytest.mark.parametrize("seed", range(14))
def test_failing_copies_lose_nothing_and_serve_nothing_wrong(seed: int, tmp_path: Path) -> None:
    slots = SLOTS[seed % len(SLOTS)]
    world = World(seed, slots, tmp_path / "s" if slots[2] else None)
    world.copies_fail = True
    world.run(600)
    assert world.num_failed + world.manager.stats().failed_transfers > 0
    world.copies_fail = False
    world.device.run_all()
    world.device._failing.clear()
    world.run(100)
    world.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_random_operations_never_serve_a_wrong_byte(part: int, tmp_path: Path) -> None:
    done = refused = attached = 0
    for seed in range(part, RUNS, 20):
        slots = SLOTS[seed % len(SLOTS)]
        store = tmp_path / str(seed) if slots[2] else None
        world = World(seed, slots, store, eagerness=(0.1, 0.5, 1.0)[seed % 3])
        world.run(OPERATIONS // 2)
        if store:
            world.reopen()
        world.run(OPERATIONS // 2)
        world.close()
        done += world.num_operations
        refused += world.num_refused
        attached += world.num_attached
    assert done == OPERATIONS * RUNS // 20
    assert refused < done / 4, "most operations must have had the room to do something"
    assert attached > 0, "content must have been found again"
