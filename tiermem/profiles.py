"""Profiles: the hardware and model files in configs/, by name."""

from __future__ import annotations

import re
from pathlib import Path

from tiermem.data import data_path
from tiermem.errors import ConfigError
from tiermem.units import shorten

CPU_PROFILE = "cpu"

# What a device calls itself -> its profile. "Tesla T4", "NVIDIA A10G", "NVIDIA A100-SXM4-80GB",
# "NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL".
_BY_NAME = (
    (re.compile(r"\bT4G?\b"), "t4"),
    (re.compile(r"\bA10G?\b"), "a10"),
    (re.compile(r"\bA100X?\b"), "a100"),
    (re.compile(r"\bH100\b"), "h100"),
    (re.compile(r"\bH200\b"), "h200"),
)
# For other GPUs: the least total memory at which a profile is chosen. None of these fixes a size in bytes.
_BY_MEMORY = ((120 * 2**30, "h200"), (60 * 2**30, "h100"), (36 * 2**30, "a100"), (0, "a10"))


def profile_for_device(gpu_name: str | None, total_bytes: int) -> str:
    """The hardware profile for a detected device.

    Parameters
    ----------
    gpu_name: what the driver calls the GPU; None without one.
    total_bytes: the GPU's memory, which decides for names that no profile is made for.
    """
    if gpu_name is None:
        return CPU_PROFILE
    for pattern, profile in _BY_NAME:
        if pattern.search(gpu_name):
            return profile
    return next(profile for least_bytes, profile in _BY_MEMORY if total_bytes >= least_bytes)


def hardware_profiles() -> dict[str, Path]:
    """Name -> file of every hardware profile that ships, in order of the names."""
    return _files(data_path("configs"))


def model_profiles() -> dict[str, Path]:
    """Name -> file of every model profile that ships, in order of the names."""
    return _files(data_path("configs/models"))


def find_profile(name: str, profiles: dict[str, Path]) -> Path:
    """The file of `name`.

    Raises
    ------
    ConfigError: there is no such profile; names those there are.
    """
    if name not in profiles:
        raise ConfigError(f"profile={shorten(name)}: must be one of {', '.join(profiles)}")
    return profiles[name]


def _files(directory: Path) -> dict[str, Path]:
    paths = (path for path in directory.iterdir() if path.suffix in (".json", ".toml"))
    return {path.stem: path for path in sorted(paths)}
