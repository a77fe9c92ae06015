"""Checkup: gathers what `tiermem doctor` shows, and shows it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tiermem
from tiermem import calibration
from tiermem.attention.cpus import cpus_beside_gpu, usable_cpus
from tiermem.calibration import Calibration, Found
from tiermem.cli.checkup_text import checkup_lines
from tiermem.cli.disk_probe import DiskReport, probe_disk
from tiermem.cli.hardware_bounds import gpu_bounds
from tiermem.cli.host_probe import HostReport, probe_host
from tiermem.cli.screen import terminal_width
from tiermem.cli.tier_options import private_base
from tiermem.config import TierConfig, profile_for_device
from tiermem.device.discovery import choose, probe
from tiermem.device.report import DeviceChoice, DeviceReport
from tiermem.limits import share_at_start, split_rates
from tiermem.machine import Machine
from tiermem.rates import Rates

PACKAGES = ("torch", "triton", "cuda-bindings", "transformers", "numpy", "lmdb")
LITTLE_DISK_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """What tiermem would do without any option: sizes are bytes of the tiers, from what is free now.

    cpu_share: of what is in RAM alone, what the CPU would attend in fp16 pages. cpu_threads: that would.
    """

    device: str
    reason: str
    profile: str
    gpu_bytes: int
    ram_bytes: int
    ssd_bytes: int
    cpu_share: float
    cpu_threads: int


@dataclass(frozen=True, slots=True)
class Checkup:
    """Everything that was found. `versions` has None for what is not installed.

    calibration: the rates that were measured here, if they were. bounds: what the hardware is made for.
    """

    tiermem: str
    python: str
    versions: dict[str, str | None]
    host: HostReport
    devices: DeviceReport
    disk: DiskReport
    plan: Plan
    calibration: Found
    bounds: Rates
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Names and plain values, for `json.dumps`."""
        table = {**asdict(self), "calibration": self.calibration.to_table()}
        made = self.calibration.calibration
        return {
            **table,
            "bounds": self.bounds.to_table(),
            "shares_of_bounds": self.shares,
            "shares_of_rates": {} if made is None else made.rates.shares,
        }

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU to use."""
        return choose("auto", self.devices).gpu is None

    @property
    def shares(self) -> dict[str, float]:
        """Measured rates as a share of what the hardware is made for, where that is known."""
        made = self.calibration.calibration
        measured = {} if made is None else made.rates.to_table()
        bounds = self.bounds.to_table()
        return {name: rate / bounds[name] for name, rate in measured.items() if name in bounds}


def run(ssd_path: Path | None, as_json: bool) -> int:
    """Look, show, and return the exit code: 1 if the path that was given cannot be used."""
    found = examine(ssd_path)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print("\n".join(checkup_lines(found, terminal_width(sys.stdout))))
    return 1 if ssd_path is not None and found.disk.problem is not None else 0


def examine(ssd_path: Path | None) -> Checkup:
    """Look at this machine, and at `ssd_path` or else where private cold tiers go."""
    versions = {name: _version(name) for name in PACKAGES}
    host = probe_host()
    devices = probe()
    place = private_base() / "tiermem" if ssd_path is None else ssd_path.expanduser()
    disk = probe_disk(place)
    found = calibration.load(_machine(devices))
    return Checkup(
        tiermem=tiermem.__version__,
        python=platform.python_version(),
        versions=versions,
        host=host,
        devices=devices,
        disk=disk,
        plan=_plan(host, devices, disk, ssd_path, found.calibration),
        calibration=found,
        bounds=_bounds(devices, found),
        warnings=tuple(_warnings(versions, host, devices, disk, found)),
    )


def _machine(devices: DeviceReport) -> Machine:
    return Machine.here(choose("auto", devices).gpu, devices.driver_version)


def _bounds(devices: DeviceReport, found: Found) -> Rates:
    gpu = choose("auto", devices).gpu
    if gpu is None or found.calibration is None:
        return Rates()
    return gpu_bounds(gpu, found.calibration.rates)


def _plan(
    host: HostReport,
    devices: DeviceReport,
    disk: DiskReport,
    ssd_path: Path | None,
    made: Calibration | None,
) -> Plan:
    choice = choose("auto", devices)
    gpu = choice.gpu
    profile = profile_for_device(gpu.name if gpu else None, gpu.total_bytes if gpu else 0)
    config = TierConfig.from_profile(profile, ssd_path=ssd_path)
    device_free = host.free_bytes if gpu is None else gpu.free_bytes or 0
    gpu_bytes = config.gpu.resolve(device_free)
    if config.gpu_limit is not None:
        gpu_bytes = min(gpu_bytes, config.gpu_limit.num_bytes)
    host_left = host.free_bytes - (gpu_bytes if gpu is None else 0)
    threads = usable_cpus() if gpu is None else cpus_beside_gpu()
    share = 1.0 if gpu is None else share_at_start(split_rates(made, "float16", threads))
    return Plan(
        device=_device_text(choice),
        reason=choice.reason,
        profile=profile,
        gpu_bytes=gpu_bytes,
        ram_bytes=config.ram.resolve(max(host_left, 0)),
        ssd_bytes=config.ssd.resolve(disk.free_bytes),
        cpu_share=share,
        cpu_threads=threads,
    )


def _device_text(choice: DeviceChoice) -> str:
    return "CPU" if choice.gpu is None else f"GPU {choice.gpu.index} ({choice.gpu.name})"


def _warnings(
    versions: dict[str, str | None],
    host: HostReport,
    devices: DeviceReport,
    disk: DiskReport,
    found: Found,
) -> Iterator[str]:
    """What is in the way, most important first."""
    if devices.problem is not None:
        yield f"no GPU is usable: {devices.problem}"
    for gpu in devices.gpus:
        if devices.problem is None and gpu.problem is not None:
            yield f"GPU {gpu.index} is not usable: {gpu.problem}"
    if versions["transformers"] is None:
        yield "transformers is not installed: `tiermem generate` needs it (pip install 'tiermem[hf]')"
    if not host.fast_checksum:
        yield "the CPU has neither AVX2 nor AVX-512: checksums are computed slowly"
    yield from _disk_warnings(disk)
    if found.problem is not None:
        yield found.problem


def _disk_warnings(disk: DiskReport) -> Iterator[str]:
    if disk.problem is not None:
        yield f"{disk.path}: cannot be the cold tier: {disk.problem}"
        return
    if disk.is_in_memory:
        yield f"{disk.path}: is on {disk.file_system}, which is memory, not a disk"
    if not disk.direct_io:
        yield f"{disk.path}: no direct I/O on this file system: reads and writes go through the page cache"
    if disk.uring_problem is not None:
        yield f"the kernel refuses io_uring ({disk.uring_problem}): threads read and write instead"
    if disk.free_bytes < LITTLE_DISK_BYTES:
        yield f"{disk.path}: less than 1 GiB is free"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
