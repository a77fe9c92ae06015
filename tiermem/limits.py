"""Limits: what this machine's calibration means for a manager: how it copies, and how fast it could at most."""

from __future__ import annotations

from pathlib import Path

from tiermem._core import EngineKind
from tiermem.calibration import Calibration, load_logged
from tiermem.config import IoEngine, TierConfig
from tiermem.device.copy_measure import MeasurableDevice
from tiermem.device.discovery import survey
from tiermem.device.protocol import Device, DeviceKind
from tiermem.disk_rates import DiskOptions
from tiermem.machine import Machine
from tiermem.meter import Route
from tiermem.pools import Tier

ENGINE_KINDS = {
    IoEngine.AUTO: EngineKind.AUTO,
    IoEngine.URING: EngineKind.IO_URING,
    IoEngine.THREADS: EngineKind.THREADS,
}


def calibration_of(device: Device) -> Calibration | None:
    """What was measured with `device` on this machine; why a file is not used is logged once."""
    if device.kind is DeviceKind.SIMULATED:
        return None
    if device.kind is DeviceKind.CPU:
        return load_logged(Machine.here(None))
    report = survey()
    index = device.torch_device.index
    gpu = next((gpu for gpu in report.gpus if gpu.index == index), None)
    return None if gpu is None else load_logged(Machine.here(gpu, report.driver_version))


def use_best_copies(device: Device, made: Calibration | None) -> None:
    """Let `device` choose its ways of copying by what was measured, not by a look at its first copy."""
    if made is not None and made.copies is not None and isinstance(device, MeasurableDevice):
        device.copy_rates = made.copies


def disk_options(made: Calibration | None, config: TierConfig) -> DiskOptions | None:
    """The way to read and write that suits the cold tier's disk best; None where it was not measured."""
    place = None if made is None or config.ssd_path is None else made.disk_at(config.ssd_path)
    return None if place is None else place.rates.choose(ENGINE_KINDS[config.io_engine])


def route_limits(made: Calibration | None, ssd_path: Path | None) -> dict[Route, float]:
    """10^9 bytes/s of each route whose limit is known; through two media, that of the slower one."""
    if made is None:
        return {}
    rates = made.rates
    disk = None if ssd_path is None else made.disk_at(ssd_path)
    read, write = (None, None) if disk is None else (disk.read, disk.write)
    known = {
        (Tier.RAM, Tier.GPU): rates.link_to_device,
        (Tier.GPU, Tier.RAM): rates.link_to_host,
        (Tier.SSD, Tier.RAM): read,
        (Tier.RAM, Tier.SSD): write,
        (Tier.SSD, Tier.GPU): _slower(read, rates.link_to_device),
        (Tier.GPU, Tier.SSD): _slower(write, rates.link_to_host),
        (Tier.GPU, Tier.GPU): None if rates.hbm_copy is None else rates.hbm_copy / 2,
    }
    return {route: limit / 1e9 for route, limit in known.items() if limit is not None}


def _slower(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else min(first, second)
