"""Closing: the end of a manager, which comes whatever state it is in.

What still runs after its deadline keeps its memory for the life of the process; all else is given back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tiermem.core import Core
from tiermem.device.protocol import Device, Memory
from tiermem.errors import DeadlineError, TierMemError
from tiermem.pools import Tier
from tiermem.store import ColdStore
from tiermem.units import format_bytes

log = logging.getLogger("tiermem")

TORN = (
    TierMemError, ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What bookkeeping raises that an interrupt left half done."""


class Closing:
    """Stages that are run in order, each once: by the second call those that an interrupt kept from running."""

    def __init__(self, stages: list[Callable[[], None]]) -> None:
        self._stages = stages

    def run(self) -> None:
        """Run what is left; what a stage raises is logged and stops no other."""
        while self._stages:
            _run_logged(self._stages.pop(0))


class Memories:
    """Gives a manager's memory back, but what a device or a disk that hangs may still use."""

    def __init__(
        self, core: Core, device: Device, store: ColdStore | None, timeout_s: float
    ) -> None:
        self._core = core
        self._device = device
        self._store = store
        self._timeout_s = timeout_s

    def free(self) -> None:
        """End all that reads or writes the memory, then free it."""
        core, store = self._core, self._store
        ram_is_free = core.ram is None or core.ram.close(self._timeout_s)
        if not ram_is_free:
            log.error("attention on the CPU did not end: its memory is not given back")
        disk_is_idle = store is None or store.stop()
        if not self._device_is_idle():
            return  # closing the device leaves everything that it may use behind
        warm = [core.pools[Tier.RAM].memory] if Tier.RAM in core.pools else []
        through_disk = [*core.mover.staging, *core.ring.staging, *warm]
        kept = through_disk if not disk_is_idle else [] if ram_is_free else warm
        self._abandon(kept)
        core.mover.free()
        core.ring.free()
        for pool in core.pools.values():
            pool.free()

    def _device_is_idle(self) -> bool:
        try:
            self._device.drain()
        except DeadlineError as error:
            used = sum(pool.memory.num_bytes for pool in self._core.pools.values())
            log.error("%s of memory are not given back: %s", format_bytes(used), error)
            return False
        return True

    def _abandon(self, memories: list[Memory]) -> None:
        if memories:
            num_bytes = sum(memory.num_bytes for memory in memories)
            log.error(
                "%s of pinned memory in %d pieces are not given back: reads or writes of the SSD tier, or "
                "attention on the CPU, still use them",
                format_bytes(num_bytes), len(memories),
            )  # fmt: skip
        for memory in memories:
            memory.abandon()


def _run_logged(stage: Callable[[], None]) -> None:
    try:
        stage()
    except TORN as error:
        log.error("closing a manager: %s: %s", type(error).__name__, error)
