"""Limits: what this machine's calibration means for a manager: how it copies, what the CPU attends, and how fast
everything could be at most."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiermem.calibration import Calibration, load_logged
from tiermem.config import TierConfig
from tiermem.device.copy_measure import MeasurableDevice
from tiermem.device.discovery import survey
from tiermem.device.protocol import Device, DeviceKind
from tiermem.disk_rates import DiskOptions
from tiermem.guarded_io import ENGINE_KINDS
from tiermem.machine import Machine
from tiermem.meter import Route
from tiermem.pools import Tier
from tiermem.ram_split import SplitRates, SplitWork, best_split


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
    return None if place is None else place.rates.choose(ENGINE_KINDS[config.io_engine.value])


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


def split_rates(made: Calibration | None, dtype: str, threads: int) -> SplitRates | None:
    """How fast link and CPU get at pages of `dtype` in RAM with `threads` threads; None where it was not measured.

    Fewer threads than were measured attend slower in proportion, and no number of them faster.
    """
    rates = None if made is None else made.rates.split(dtype)
    if made is None or rates is None:
        return None
    part = min(1.0, threads / (made.rates.cpu_attend_threads or threads))
    return replace(rates, cpu=part * rates.cpu, cpu_alone=part * rates.only_cpu)


def share_at_start(rates: SplitRates | None) -> float:
    """The CPU's share of what is in RAM, as long as nothing is known of a step's other work; 0 without rates."""
    return 0.0 if rates is None else best_split(SplitWork(1.0), rates).fraction


def attended_limit(made: Calibration | None) -> float | None:
    """10^9 bytes/s at which the CPU reads RAM, so that it cannot attend faster; None where it was not measured."""
    read = None if made is None else made.rates.ram_read
    return None if read is None else read / 1e9


def _slower(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else min(first, second)
