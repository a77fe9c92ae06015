"""The CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: by its affinity and its control groups, at least 1."""
    return max(1, min(len(os.sched_getaffinity(0)), _cgroup_cpus()))


def cpus_beside_gpu() -> int:
    """How many of them attend beside a GPU: one is left for the thread that launches its work."""
    return max(1, usable_cpus() - 1)


def _cgroup_cpus() -> int:
    """CPUs that the process's control group and those around it grant, rounded up."""
    return min(map(_quota_cpus, _quota_files()), default=os.cpu_count() or 1)


def _quota_files() -> list[Path]:
    """`cpu.max` of the process's control group and of those around it, as far as they are there."""
    try:
        lines = MEMBERSHIP.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    groups = [group for path in paths for group in (CGROUPS / path, *(CGROUPS / path).parents)]
    within = [group for group in groups if group.is_relative_to(CGROUPS)]
    return [group / "cpu.max" for group in within if (group / "cpu.max").is_file()]


def _quota_cpus(cpu_max: Path) -> int:
    """The CPUs of one `cpu.max`, "quota period" in microseconds or "max period"."""
    quota, period = cpu_max.read_text(encoding="ascii").split()
    if quota == "max":
        return os.cpu_count() or 1
    return -(-int(quota) // int(period))
