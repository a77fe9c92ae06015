"""Pressure: one warning a level when device or host memory fills up."""

from __future__ import annotations

import logging
import time

import psutil

from tiermem.device.protocol import Device, DeviceKind

log = logging.getLogger("tiermem")

CHECK_EVERY_S = 1.0


class Pressure:
    """Looks at memory in use at most once a second and warns once a level and kind of memory.

    `warning` and `critical` are shares (0 to 1) of the memory in use. A level is armed again when use has
    fallen below it by `SLACK`.
    """

    SLACK = 0.02

    def __init__(self, device: Device, warning: float, critical: float) -> None:
        self._device = device
        self._levels = (("critical", critical), ("warning", warning))
        self._raised: set[tuple[str, str]] = set()
        self._next_s = 0.0

    def check(self) -> None:
        """Warn where a level was newly reached."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + CHECK_EVERY_S
        host = psutil.virtual_memory()
        self._look("host memory", host.total - host.available, host.total)
        if self._device.kind is DeviceKind.CUDA:
            info = self._device.memory_info()
            self._look("device memory", info.total_bytes - info.free_bytes, info.total_bytes)

    def _look(self, what: str, used: int, total: int) -> None:
        share = used / total if total else 0.0
        for level, bound in self._levels:
            if share < bound - self.SLACK:
                self._raised.discard((what, level))
            elif share >= bound and (what, level) not in self._raised:
                self._raised.update({(what, level), (what, "warning")})
                log.warning(
                    "%s pressure is %s: %.1f%% of %d bytes in use", what, level, 100 * share, total
                )
                return
