"""Disk probe: whether a directory would do for the cold tier, and how it would be read and written."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tiermem import _core

PROBE_BYTES = 1 << 20
TIMEOUT_S = 10.0
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class DiskReport:
    """What was found at `path`, or at the nearest directory above it that exists.

    direct_io: reads and writes bypass the page cache. io: what would move bytes, "io_uring" or "threads";
    uring_problem says why it is not io_uring. problem says why the directory cannot be used at all.
    """

    path: str
    exists: bool
    is_store: bool
    file_system: str
    free_bytes: int
    total_bytes: int
    direct_io: bool = False
    io: str | None = None
    uring_problem: str | None = None
    problem: str | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether the directory is no disk at all."""
        return self.file_system in IN_MEMORY


@dataclass(frozen=True, slots=True)
class _Trial:
    direct_io: bool = False
    io: str | None = None
    uring_problem: str | None = None
    problem: str | None = None


def probe_disk(path: Path) -> DiskReport:
    """Look at `path`, and write and read back a small file there that is gone afterwards."""
    place = nearest_directory(path)
    usage = shutil.disk_usage(place)
    trial = _try(path, place)
    return DiskReport(
        path=str(path),
        exists=path.exists(),
        is_store=(path / "header.json").is_file(),
        file_system=_file_system(place),
        free_bytes=usage.free,
        total_bytes=usage.total,
        direct_io=trial.direct_io,
        io=trial.io,
        uring_problem=trial.uring_problem,
        problem=trial.problem,
    )


def nearest_directory(path: Path) -> Path:
    """`path`, or the nearest above it that exists."""
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def _try(path: Path, place: Path) -> _Trial:
    if not place.is_dir():
        return _Trial(problem=f"{place} is not a directory")
    if place == path.absolute() and not (path / "header.json").exists() and any(path.iterdir()):
        return _Trial(problem="neither empty nor a store of tiermem: choose another directory")
    try:
        with tempfile.TemporaryDirectory(prefix=".tiermem-probe-", dir=place) as directory:
            return _try_file(Path(directory) / "probe")
    except OSError as error:
        return _Trial(problem=f"a file cannot be written there: {error.strerror or error}")


def _try_file(path: Path) -> _Trial:
    engine, uring_problem = _open_engine()
    with engine, _core.BlockFile(path, PROBE_BYTES, _core.OpenMode.CREATE) as file:
        problem = _round_trip(engine, file)
        io = "io_uring" if engine.kind is _core.EngineKind.IO_URING else "threads"
        return _Trial(file.is_direct, io, uring_problem, problem)


def _open_engine() -> tuple[_core.IoEngine, str | None]:
    try:
        return _core.IoEngine(_core.EngineKind.IO_URING), None
    except OSError as error:
        return _core.IoEngine(_core.EngineKind.THREADS), error.strerror or str(error)


def _round_trip(engine: _core.IoEngine, file: _core.BlockFile) -> str | None:
    """Write random bytes, read them back; what went wrong, if anything did."""
    # Never unmapped by hand: an operation that misses its deadline may still use it.
    memory = np.frombuffer(mmap.mmap(-1, 2 * PROBE_BYTES), dtype=np.uint8)
    out, back = memory[:PROBE_BYTES], memory[PROBE_BYTES:]
    out[:] = np.frombuffer(random.randbytes(PROBE_BYTES), dtype=np.uint8)
    start, length = np.zeros(1, dtype=np.int64), np.array([PROBE_BYTES], dtype=np.int64)
    for submit, buffer in ((engine.submit_write, out), (engine.submit_read, back)):
        ticket = submit(file, start, np.array([buffer.ctypes.data], dtype=np.int64), length)
        result = engine.wait(ticket, TIMEOUT_S)
        if result.status is not _core.IoStatus.OK:
            return result.message or f"not done after {TIMEOUT_S:g} seconds"
    return None if np.array_equal(out, back) else "what was read is not what was written"


def _file_system(place: Path) -> str:
    """The kind of the file system that `place` is on, such as ext4."""
    resolved = place.resolve()
    mounts = {
        Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)
    }  # the last of several at one place is the one seen
    for directory in (resolved, *resolved.parents):
        if directory in mounts:
            return mounts[directory]
    return "unknown"
