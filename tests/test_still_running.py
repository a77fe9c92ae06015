"""What was started and then fails, or is left, keeps what it uses until it has ended: slots, sums, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from liveness_support import PAGE, check_content, grow, open_manager

from tiermem import TierManager, TransferError
from tiermem._core import Tier
from tiermem.device.simulated import SimulatedDevice


def free_slots_that_are_written(manager: TierManager, device: SimulatedDevice) -> list[int]:
    """Hot slots that no page has, and to which copies are on their way."""
    core, pool = manager._core, manager._core.pools[Tier.GPU]
    taken = {
        slot
        for sequence in manager._sequences
        for slot in core.table.slots(sequence.pages, Tier.GPU).tolist()
    }
    pieces = [piece for stream in device._streams for piece in stream.pending_pieces()]
    inside = [p.dst - pool.memory.address for p in pieces]
    slots = {at // pool.slot_bytes for at in inside if 0 <= at < pool.memory.num_bytes}
    return sorted(slots - taken)


class NoEvents:
    """A stream that cannot record its next event; then all is as it was."""

    def __init__(self, manager: TierManager) -> None:
        self._mover, self._stream = manager._core.mover, manager._core.mover.checks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def record(self) -> Any:
        self._mover.checks = self._stream
        raise TransferError("no event")


@pytest.mark.parametrize("refused", ["slices", "verify_slices", "record"])
@pytest.mark.parametrize("slots", [(6, 8, 0), (6, 0, 20)], ids=["from-ram", "from-ssd"])
def test_slots_that_a_copy_still_writes_are_not_given_back(
    tmp_path: Path, refused: str, slots: tuple[int, int, int]
) -> None:
    """Pages are copied to the GPU and cannot be compared there: the copy goes on all the same."""
    device = SimulatedDevice(3, eagerness=0.0)
    path = tmp_path / "s" if slots[2] else None
    with open_manager(path, slots, device, io_timeout_s=30.0) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, 4 * PAGE)
        sequence.suspend()
        core = manager._core
        with pytest.MonkeyPatch.context() as patch:

            def refuse(*_: object) -> None:
                patch.undo()
                raise TransferError(f"no {refused}")

            if refused == "record":
                own = device._own
                checks = core.mover.checks
                patch.setattr(device, "_own", lambda s: own(checks if type(s) is NoEvents else s))
                patch.setattr(core.mover, "checks", NoEvents(manager))
            else:
                patch.setattr(device, refused, refuse)
            error: TransferError | None = None
            try:
                transfers = core.promote(sequence.pages)
            except TransferError as raised:
                error, transfers = raised, []
            assert free_slots_that_are_written(manager, device) == []
            core.in_flight.drain()
            error = error or next(transfer.error for transfer in transfers)
            assert error is not None
            assert f"no {'event' if refused == 'record' else refused}" in str(error)
        assert core.table.counts(Tier.GPU).free == 6
        manager.check()
        check_content(sequence)
        grow(manager, sequence, PAGE)
        check_content(sequence)
