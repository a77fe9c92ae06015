"""Checkup text: a checkup as short tables and a list of warnings."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING

from tiermem.calibration import FIX
from tiermem.cli.calibration_text import calibration_lines
from tiermem.cli.human import share_text, size_text
from tiermem.cli.table import pairs
from tiermem.device.report import GpuInfo, version_text

if TYPE_CHECKING:
    from tiermem.cli.checkup import Checkup

WARNING = "warning: "
TEXT_WIDTH = 100


def checkup_lines(found: Checkup, width: int | None) -> list[str]:
    """What was found, what would be used, and warnings, as lines of text."""
    lines: list[str] = []
    for block in (_software(found), _hardware(found), _disk(found), _plan(found)):
        lines += [*pairs(block).lines(width), ""]
    lines += [*_calibration(found, width), ""]
    if not found.warnings:
        return [*lines, "everything looks fine"]
    return lines + [line for text in found.warnings for line in _warning_lines(text, width)]


def _software(found: Checkup) -> list[tuple[str, str]]:
    packages = [(name, text or "not installed") for name, text in found.versions.items()]
    return [("tiermem", found.tiermem), ("python", found.python), *packages]


def _hardware(found: Checkup) -> list[tuple[str, str]]:
    host, devices = found.host, found.devices
    gpus = [(f"GPU {gpu.index}", _gpu_text(gpu)) for gpu in devices.gpus] or [("GPU", "none")]
    driver = (
        f"{version_text(devices.driver_version)}, runtime {version_text(devices.runtime_version)}, "
        f"torch built for {devices.torch_cuda_version or 'none'}"
    )
    return [
        *gpus,
        ("CUDA driver", driver),
        ("CPU", f"{host.processor}, {host.cores} cores"),
        ("CPU features", " ".join(host.features) or "none that matter"),
        ("memory", f"{size_text(host.total_bytes)}, {size_text(host.free_bytes)} free"),
        ("kernel", host.kernel),
    ]


def _gpu_text(gpu: GpuInfo) -> str:
    major, minor = gpu.compute_capability
    free = "free unknown" if gpu.free_bytes is None else f"{size_text(gpu.free_bytes)} free"
    text = f"{gpu.name}, capability {major}.{minor}, {size_text(gpu.total_bytes)}, {free}"
    return text if gpu.problem is None else f"{text}; not usable"


def _disk(found: Checkup) -> list[tuple[str, str]]:
    disk = found.disk
    kind = "a store of tiermem" if disk.is_store else "there" if disk.exists else "not there yet"
    space = f"{size_text(disk.free_bytes)} of {size_text(disk.total_bytes)} free"
    rows = [
        ("cold tier at", f"{disk.path} ({kind})"),
        ("file system", f"{disk.file_system}, {space}"),
    ]
    if disk.problem is not None:
        return [*rows, ("usable", f"no: {disk.problem}")]
    direct = "direct" if disk.direct_io else "through the page cache"
    return [*rows, ("I/O", f"{disk.io}, {direct}; a test file was read back as it was written")]


def _plan(found: Checkup) -> list[tuple[str, str]]:
    plan = found.plan
    ssd = size_text(plan.ssd_bytes) if plan.ssd_bytes else "off, until ssd_path is given"
    return [
        ("would use", f"{plan.device}, profile {plan.profile}"),
        ("because", plan.reason),
        ("GPU tier", size_text(plan.gpu_bytes)),
        ("RAM tier", size_text(plan.ram_bytes)),
        ("SSD tier", ssd),
        ("CPU share", _cpu_text(found)),
    ]


def _cpu_text(found: Checkup) -> str:
    """What the CPU would attend of what is in RAM, and by which rates that is chosen."""
    plan, made = found.plan, found.calibration.calibration
    threads = f"{plan.cpu_threads} threads"
    if found.on_cpu:
        return f"all of what is in RAM; {threads}"
    if made is None or made.rates.split("float16") is None:
        return f"none of what is in RAM: how fast it attends is not known; {FIX}"
    return f"{share_text(plan.cpu_share)} of what is in RAM, by the measured rates; {threads}"


def _calibration(found: Checkup, width: int | None) -> list[str]:
    made = found.calibration.calibration
    if made is None:
        why = "not used, see the warning" if found.calibration.problem else f"none: {FIX}"
        return pairs([("calibration", why)]).lines(width)
    return calibration_lines(made, time.time(), width, found.bounds)


def _warning_lines(text: str, width: int | None) -> list[str]:
    return textwrap.wrap(
        text,
        width or TEXT_WIDTH,
        initial_indent=WARNING,
        subsequent_indent=" " * len(WARNING),
        break_long_words=False,
        break_on_hyphens=False,
    )
