"""Rules R1 to R4: the simulation finds it when one of them is broken, and finds nothing when none is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from world import World

from tiermem import InvariantError, TierMemError
from tiermem._core import Tier
from tiermem.mover import Mover
from tiermem.planner import Planner
from tiermem.transfer import Transfer

SEEDS = range(12)
OPERATIONS = 250
SLOTS = ((4, 8, 0), (3, 4, 12), (6, 8, 24))


def survives(seed: int, directory: Path) -> bool:
    """Whether a random run ends without a wrong byte, a contradiction or an error."""
    slots = SLOTS[seed % len(SLOTS)]
    world = World(seed, slots, directory / str(seed) if slots[2] else None, eagerness=0.2)
    try:
        world.run(OPERATIONS)
        world.close()
    except (AssertionError, InvariantError, TierMemError, ValueError):
        return False
    return True


def test_a_random_run_survives_when_no_rule_is_broken(tmp_path: Path) -> None:
    assert all(survives(seed, tmp_path) for seed in SEEDS)


def break_r1(patch: pytest.MonkeyPatch) -> None:
    """Pins are released, and copies called VALID, before the copy was seen to have ended."""
    poll = Transfer.poll

    def poll_early(self: Transfer) -> bool:
        if self._then is not None:
            return poll(self)
        self._running, self._damaged = None, np.empty(0, dtype=np.int64)
        return True

    patch.setattr(Transfer, "poll", poll_early)


def break_r2(patch: pytest.MonkeyPatch) -> None:
    """A transfer does not hold its source."""
    finish, fail, submit = Transfer.finish, Transfer.fail, Mover.submit

    def submit_without_pins(self: Mover, ids: np.ndarray, src: int, dst: int) -> object:
        transfers = submit(self, ids, src, dst)
        for transfer in transfers:
            self.table.unpin(transfer.ids, src)
        return transfers

    def repinned(settle: Callable[..., None]) -> Callable[..., None]:
        def settle_without_pins(self: Transfer, *args: object) -> None:
            self._owner.table.pin(self.ids, self.src)
            settle(self, *args)

        return settle_without_pins

    patch.setattr(Mover, "submit", submit_without_pins)
    patch.setattr(Transfer, "finish", repinned(finish))
    patch.setattr(Transfer, "fail", repinned(fail))


def break_r3(patch: pytest.MonkeyPatch) -> None:
    """The compute stream does not wait for the copies that fill its pages."""
    patch.setattr(Transfer, "event", property(lambda self: None))


def break_r4(patch: pytest.MonkeyPatch) -> None:
    """Room for the destination is made after the source was chosen, and nothing holds the source."""
    promote_missing = Planner._promote_missing

    def choose_first(self: Planner) -> None:
        missing = self._missing()
        tiers = self._core.best_tiers(missing)
        warm = missing[tiers == Tier.RAM]
        room = self._core.room.gain(Tier.GPU, len(warm))
        self._core.in_flight.wait_for(self._core.mover.submit(warm[:room], Tier.RAM, Tier.GPU))
        self._pin_hot()
        promote_missing(self)

    patch.setattr(Planner, "_promote_missing", choose_first)


@pytest.mark.parametrize("broken", [break_r1, break_r2, break_r3, break_r4])
def test_a_broken_rule_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    assert not all(survives(seed, tmp_path) for seed in SEEDS)
