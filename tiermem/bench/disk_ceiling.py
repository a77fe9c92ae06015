"""DiskCeiling: the best rate of raw reads and writes of one file, whatever the engine and the block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiermem import _core
from tiermem.bench.run import Scale
from tiermem.device.protocol import Memory
from tiermem.errors import TransferError
from tiermem.measure.timing import time_host

MIB = 1 << 20
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Way:
    """An engine with its depth, and the block that one operation moves."""

    kind: _core.EngineKind
    depth: int
    block_bytes: int

    @property
    def name(self) -> str:
        """The way in a few words."""
        what = "io_uring" if self.kind is _core.EngineKind.IO_URING else "threads"
        return f"{self.depth} {what} x {self.block_bytes // MIB} MiB"


WAYS = tuple(
    Way(kind, depth, block_bytes)
    for kind, depth in ((_core.EngineKind.THREADS, 8), (_core.EngineKind.IO_URING, 32))
    for block_bytes in (MIB, 4 * MIB)
)


@dataclass(frozen=True, slots=True)
class RawRates:
    """Bytes a second of the best way each, and what it was."""

    write: float
    write_name: str
    read: float
    read_name: str


def measure_raw(path: Path, memory: Memory, scale: Scale) -> RawRates:
    """Write the memory to a new file at `path` and read it back, in every way; the file stays.

    Raises
    ------
    OSError, TransferError: an operation failed.
    """
    repeats = 3 if scale is Scale.FULL else 2
    wrote: dict[str, float] = {}
    read: dict[str, float] = {}
    with _core.BlockFile(path, memory.num_bytes, _core.OpenMode.CREATE) as file:
        io = "direct I/O" if file.is_direct else "buffered I/O"
        for way in WAYS:
            try:
                engine = _open(way)
            except OSError:
                continue  # this system has no io_uring
            with engine:
                job = _Job(engine, file, memory, way.block_bytes)
                name = f"raw {io}, {way.name}"
                # the first run of all meets extents that were never written
                wrote[name] = memory.num_bytes / time_host(job.write, repeats).median_s
                read[name] = memory.num_bytes / time_host(job.read, repeats).median_s
    best_write, best_read = max(wrote, key=wrote.__getitem__), max(read, key=read.__getitem__)
    return RawRates(wrote[best_write], best_write, read[best_read], best_read)


class _Job:
    """All of the memory to or from the file, in order, in blocks."""

    def __init__(
        self, engine: _core.IoEngine, file: _core.BlockFile, memory: Memory, block_bytes: int
    ) -> None:
        self._engine = engine
        self._file = file
        self._offsets = np.arange(0, memory.num_bytes, block_bytes, dtype=np.int64)
        self._at = self._offsets + memory.address
        self._lengths = np.minimum(memory.num_bytes - self._offsets, block_bytes)

    def write(self) -> None:
        self._finish(self._engine.submit_write(self._file, self._offsets, self._at, self._lengths))

    def read(self) -> None:
        self._finish(self._engine.submit_read(self._file, self._offsets, self._at, self._lengths))

    def _finish(self, ticket: int) -> None:
        result = self._engine.wait(ticket, TIMEOUT_S)
        if result.status is not _core.IoStatus.OK:
            raise TransferError(result.message or f"not done after {TIMEOUT_S:g} seconds")
        self._engine.forget(ticket)


def _open(way: Way) -> _core.IoEngine:
    if way.kind is _core.EngineKind.IO_URING:
        return _core.IoEngine(way.kind, queue_depth=way.depth)
    return _core.IoEngine(way.kind, num_threads=way.depth)
