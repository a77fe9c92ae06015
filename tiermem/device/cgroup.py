"""Cgroup: how much memory the groups that this process is in allow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class _Version:
    """Where one version of cgroups keeps a group's numbers.

    `controller` is what names the version's line in /proc/self/cgroup: "" for the second one.
    """

    controller: str
    folder: str
    limit: str
    current: str
    stat: str
    file_cache: str


_VERSIONS = (
    _Version("", "", "memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Version(
        "memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.stat",
        "total_inactive_file",
    ),
)


def limit_bytes() -> int | None:
    """The lowest limit of the process's group and those above it; None if none has one."""
    limits = [_number(group / version.limit) for version, group in _groups()]
    return min((limit for limit in limits if limit is not None), default=None)


def room_bytes() -> int | None:
    """Bytes left under every limit, file cache counted as free; None without a limit."""
    rooms = [_room(version, group) for version, group in _groups()]
    return min((room for room in rooms if room is not None), default=None)


def _groups() -> Iterator[tuple[_Version, Path]]:
    """The process's group and those above it, as far as they can be seen from here."""
    for version in _VERSIONS:
        top = _MOUNT / version.folder
        path = _path_of(version.controller)
        for group in (top / path, *(top / parent for parent in path.parents)):
            if group.is_dir():
                yield version, group


def _path_of(controller: str) -> Path:
    """The group's path below the mount; the mount itself if that is unknown."""
    with suppress(OSError):
        for line in _GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path(path.lstrip("/"))
    return Path()


def _room(version: _Version, group: Path) -> int | None:
    limit, current = _number(group / version.limit), _number(group / version.current)
    if limit is None or current is None:
        return None
    return max(0, limit - current + _file_cache_bytes(version, group))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_cache_bytes(version: _Version, group: Path) -> int:
    try:
        lines = (group / version.stat).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{version.file_cache} "))
