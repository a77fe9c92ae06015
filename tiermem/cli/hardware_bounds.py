"""Hardware bounds: the rates that a GPU's link and memory are made for, where the system tells."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from tiermem.device.report import GpuInfo
from tiermem.rates import Rates

_PCI = Path("/sys/bus/pci/devices")
_SPEED = re.compile(r"([0-9]+(?:\.[0-9]+)?) GT/s")
_LANE_SHARE = {2.5: 0.8, 5.0: 0.8}
"""Of the transfers a second that one lane makes, what carries data: 8 of 10 bits up to generation 2 ..."""
_LATER_SHARE = 128 / 130
"""... and 128 of 130 after it."""
MOST_LANES = 32
TRANSFERS_A_CLOCK = 2
"""Memory of GPUs moves data on both edges of its clock."""


def gpu_bounds(gpu: GpuInfo, measured: Rates) -> Rates:
    """What `gpu` could reach; a bound that the measured rates exceed is wrong, as in some virtual machines,
    and left out."""
    link, memory = link_bound(gpu.pci_bus_id), memory_bound(gpu.index)
    both = None if link is None else 2 * link
    bounds = Rates(link, link, both, hbm_read=memory, hbm_copy=memory).to_table()
    known = measured.to_table()
    return Rates(**{name: bound for name, bound in bounds.items() if known.get(name, 0.0) <= bound})


def link_bound(pci_bus_id: str, devices: Path = _PCI) -> float | None:
    """Bytes/s of the PCIe link by its generation and width, one direction; None where sysfs does not tell.

    The speed is the most that the GPU can do: an idle link is slowed down.
    """
    place = devices / pci_bus_id.lower()
    with suppress(OSError, ValueError):
        match = _SPEED.match((place / "max_link_speed").read_text()[:40])
        lanes = int((place / "current_link_width").read_text()[:10])
        if match and 1 <= lanes <= MOST_LANES:
            transfers = float(match[1])
            share = _LANE_SHARE.get(transfers, _LATER_SHARE)
            return transfers * 1e9 * share / 8 * lanes
    return None


def memory_bound(index: int) -> float | None:
    """Bytes/s of the GPU's memory by its clock and width; None where torch does not tell."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    khz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return TRANSFERS_A_CLOCK * khz * 1e3 * bits / 8 or None
