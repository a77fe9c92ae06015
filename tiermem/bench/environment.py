"""Environment: the machine and the software that a result belongs to."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import tiermem
from tiermem.device.host import host_name, host_total_bytes
from tiermem.device.protocol import Device, DeviceKind

COMMIT_VARIABLE = "TIERMEM_COMMIT"
GIT_TIMEOUT_S = 10.0
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def describe(device: Device) -> dict[str, object]:
    """What a reader needs to compare results: hardware, driver and versions."""
    on_gpu = device.kind is DeviceKind.CUDA
    return {
        "cpu": host_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": host_total_bytes(),
        "gpu": device.name if on_gpu else None,
        "gpu_memory_bytes": device.memory_info().total_bytes if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "tiermem": tiermem.__version__,
    }


def commit() -> str:
    """TIERMEM_COMMIT where it is set, else the git commit of this checkout, else the package's version.

    A checkout whose tracked files were changed is marked by "+changes".
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    root = Path(tiermem.__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # an installed package may lie within a checkout of something else
    if top is not None and Path(top) == root:
        name = _git(root, "rev-parse", "HEAD")
        if name is not None:
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            return f"{name}+changes" if changed else name
    return f"version {tiermem.__version__}"


def driver_version() -> str | None:
    """The NVIDIA driver's version, such as 580.95.05; None where it does not tell."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
