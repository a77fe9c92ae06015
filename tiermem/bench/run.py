"""Run: what every benchmark of one invocation shares: device, scale, ceilings, a place on the disk, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from tiermem.device.protocol import Device, DeviceKind
from tiermem.measure.ceilings import Ceilings, Effort

SETTLE_S = 0.7
"""For up to half a second after tens of gigabytes were freed, a GPU's memory is about 12 % slow."""


class Scale(Enum):
    """How much is measured: QUICK for tests and previews, FULL for figures that are worth keeping."""

    QUICK = "quick"
    FULL = "full"


GPU_EFFORT = {
    Scale.QUICK: Effort(hot_bytes=1 << 30, host_bytes=512 << 20, repeats=3),
    Scale.FULL: Effort(hot_bytes=8 << 30, host_bytes=4 << 30, repeats=9),
}
CPU_EFFORT = {
    Scale.QUICK: Effort(hot_bytes=32 << 20, host_bytes=32 << 20, repeats=3),
    Scale.FULL: Effort(hot_bytes=512 << 20, host_bytes=512 << 20, repeats=5),
}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One invocation. The device and the ceilings are the caller's.

    directory: an existing one, where the disk benchmark makes a directory of its own and removes it again.
    pool_bytes: how large the pools are whose start-up is timed.
    """

    device: Device
    scale: Scale
    ceilings: Ceilings
    directory: Path
    pool_bytes: int
    progress: Callable[[str], None]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.kind is DeviceKind.CUDA

    @property
    def repeats(self) -> int:
        """How often one figure is measured."""
        return 3 if self.scale is Scale.QUICK else 9

    def pick(self, *, gpu: int, cpu: int, quick_gpu: int, quick_cpu: int) -> int:
        """The size for this device and scale."""
        if self.scale is Scale.QUICK:
            return quick_gpu if self.on_gpu else quick_cpu
        return gpu if self.on_gpu else cpu

    def aim(self, value: float | None) -> float | None:
        """`value` where it was set as an aim: for full figures of a GPU."""
        return value if self.on_gpu and self.scale is Scale.FULL else None

    def settle(self) -> None:
        """Keep the GPU's memory busy until it is as fast as it gets; nothing without a GPU."""
        if not self.on_gpu or self.scale is Scale.QUICK:
            return
        busy = torch.empty(256 << 20, dtype=torch.uint8, device=self.device.torch_device)
        end_s = time.monotonic() + SETTLE_S
        while time.monotonic() < end_s:
            busy.add_(1)
            self.device.compute_stream().synchronize()


@contextmanager
def open_ceilings(device: Device, scale: Scale) -> Iterator[Ceilings]:
    """The ceilings of a device, with buffers that suit the scale.

    Raises
    ------
    ConfigError: there is no room for the buffers.
    """
    efforts = GPU_EFFORT if device.kind is DeviceKind.CUDA else CPU_EFFORT
    with Ceilings(device, efforts[scale]) as ceilings:
        yield ceilings
