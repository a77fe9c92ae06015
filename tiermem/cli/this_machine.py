"""This machine: its memory and rates for a forecast, as calibrated, or as a profile says."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from tiermem import calibration
from tiermem.calibration import Calibration
from tiermem.cli.disk_probe import nearest_directory
from tiermem.cli.human import duration_text
from tiermem.cli.tier_options import private_base
from tiermem.config import profile_for_device
from tiermem.device.discovery import choose, survey
from tiermem.device.host import host_total_bytes
from tiermem.forecast.hardware import Hardware, complete
from tiermem.machine import Machine
from tiermem.rates import Rates


def hardware_here(ssd_path: Path | None) -> Hardware:
    """This machine with its first usable GPU, idle: all of its memory, the free space at `ssd_path`."""
    report = survey()
    gpu = choose("auto", report).gpu
    profile = profile_for_device(gpu.name if gpu else None, gpu.total_bytes if gpu else 0)
    known = Hardware.from_profile(profile)
    found = calibration.load(Machine.here(gpu, report.driver_version))
    hardware = replace(
        known,
        gpu=gpu.name if gpu else "",
        capability=gpu.compute_capability if gpu else None,
        gpu_bytes=gpu.total_bytes if gpu else 0,
        ram_bytes=host_total_bytes(),
        is_here=True,
        ssd_bytes=shutil.disk_usage(nearest_directory(ssd_path or private_base())).free,
    )
    if found.calibration is None:
        why = found.problem or f"no calibration of this machine: {calibration.FIX}"
        return replace(hardware, origin=f"{known.origin}; {why}")
    disk = found.calibration.disk_at(ssd_path or private_base())
    measured = Rates() if disk is None else Rates(disk_read=disk.read, disk_write=disk.write)
    rates = measured.over(found.calibration.rates).over(known.rates)
    estimated = known.estimated - frozenset(measured.over(found.calibration.rates).to_table())
    origin = _origin(found.calibration)
    return replace(hardware, rates=complete(rates), origin=origin, estimated=estimated)


def _origin(made: Calibration) -> str:
    haste = ", in haste" if made.quick else ""
    return f"the calibration of this machine, {duration_text(time.time() - made.made_s)} old{haste}"
