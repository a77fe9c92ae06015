"""DiskRates: what a disk delivers by which way, and the way that the cold tier should take."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem._core import EngineKind, IoDirection
from tiermem.errors import ConfigError, TransferError

GIGA = 1e9
KIB, MIB = 1 << 10, 1 << 20
LEAST_BYTES = 64 * MIB
"""Of a measurement: less would be in flight all at once."""
SPARE_BYTES = 16 * MIB
"""Left to everybody else on the disk."""
LEAST_SECONDS, MOST_SECONDS = 0.5, 600.0
TIMEOUT_S = 60.0
LEAST_MEMORY, MOST_MEMORY = 128 * MIB, 512 * MIB
"""Two batches of any way; and more than the processor's caches hold, as the pools are."""
ROUNDS = 3
"""Every way is measured so often, in random turns: a virtual disk is slower and faster by the second."""
TIE = 0.05
"""Ways this near to the best are as good: the one with the least in flight is taken."""

ENGINE_NAMES = {"uring": EngineKind.IO_URING, "threads": EngineKind.THREADS}
_NAMES = {kind: name for name, kind in ENGINE_NAMES.items()}
MOST_DEPTH = {EngineKind.IO_URING: 4096, EngineKind.THREADS: 256}
MOST_RINGS = 16
MOST_PIECE_BYTES = 1 << 30
MOST_RATES = 256
MOST_GBS = 1e6


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """One way to move bytes.

    kind: IO_URING or THREADS.
    piece_bytes: wanted size of one transfer, a multiple of 4,096 up to 1 GiB.
    depth: transfers at once: 1 to 4,096 in the kernel's queue, or as many threads, 1 to 256.
    num_rings: rings that share the depth, 1 to 16; 1 with threads.
    """

    kind: EngineKind
    piece_bytes: int
    depth: int
    num_rings: int = 1

    def __str__(self) -> str:
        rings = f" on {self.num_rings} rings" if self.num_rings > 1 else ""
        name = "io_uring" if self.kind is EngineKind.IO_URING else "threads"
        return f"{self.depth} {name}{rings} x {self.piece_bytes // KIB} KiB"

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "engine": _NAMES[self.kind],
            "piece_bytes": self.piece_bytes,
            "depth": self.depth,
            "num_rings": self.num_rings,
        }

    @classmethod
    def from_dict(cls, value: object) -> DiskOptions:
        """Back from `to_dict`. Raises ConfigError for anything else."""
        fields = _fields("disk options", value, {"engine", "piece_bytes", "depth", "num_rings"})
        name = fields["engine"]
        if not isinstance(name, str) or name not in ENGINE_NAMES:
            raise ConfigError(f"engine={name!r}: must be one of {', '.join(ENGINE_NAMES)}")
        kind = ENGINE_NAMES[name]
        piece_bytes = _whole("piece_bytes", fields["piece_bytes"], 4096, MOST_PIECE_BYTES)
        if piece_bytes % 4096:
            raise ConfigError(f"piece_bytes={piece_bytes}: must be a multiple of 4096")
        depth = _whole("depth", fields["depth"], 1, MOST_DEPTH[kind])
        most_rings = MOST_RINGS if kind is EngineKind.IO_URING else 1
        return cls(
            kind, piece_bytes, depth, _whole("num_rings", fields["num_rings"], 1, most_rings)
        )


@dataclass(frozen=True, slots=True)
class DiskRate:
    """What one way delivered for scattered transfers of its size, GB/s."""

    options: DiskOptions
    read_gbs: float
    write_gbs: float


@dataclass(frozen=True, slots=True)
class DiskRates:
    """One disk, GB/s. `rates` is not empty.

    read_ceiling_gbs, write_ceiling_gbs: the best raw loop over 1 and 4 MiB pieces in the order of the file.
    first_write_gbs: the first write to space that was allocated and never written.
    is_direct: whether transfers went around the page cache.
    """

    is_direct: bool
    read_ceiling_gbs: float
    write_ceiling_gbs: float
    first_write_gbs: float
    rates: tuple[DiskRate, ...]

    def choose(self, kind: EngineKind = EngineKind.AUTO) -> DiskOptions | None:
        """The way that suits both directions best; of `kind` only, or None where that was not measured."""
        rates = [r for r in self.rates if kind in (EngineKind.AUTO, r.options.kind)]
        if not rates:
            return None
        most_read = max(rate.read_gbs for rate in rates)
        most_write = max(rate.write_gbs for rate in rates)

        def share(rate: DiskRate) -> float:
            return min(rate.read_gbs / most_read, rate.write_gbs / most_write)

        best = max(share(rate) for rate in rates)
        good = [rate.options for rate in rates if share(rate) >= best * (1 - TIE)]
        return min(good, key=lambda options: options.depth * options.piece_bytes)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "is_direct": self.is_direct,
            "read_ceiling_gbs": self.read_ceiling_gbs,
            "write_ceiling_gbs": self.write_ceiling_gbs,
            "first_write_gbs": self.first_write_gbs,
            "rates": [
                {**r.options.to_dict(), "read_gbs": r.read_gbs, "write_gbs": r.write_gbs}
                for r in self.rates
            ],
        }

    @classmethod
    def from_dict(cls, value: object) -> DiskRates:
        """Back from `to_dict`. Raises ConfigError for anything else."""
        ceilings = ("read_ceiling_gbs", "write_ceiling_gbs", "first_write_gbs")
        fields = _fields("disk rates", value, {"is_direct", "rates", *ceilings})
        if not isinstance(fields["is_direct"], bool):
            raise ConfigError(f"is_direct={fields['is_direct']!r}: must be true or false")
        rows = fields["rates"]
        if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_RATES:
            raise ConfigError(f"rates: must be a list of 1 to {MOST_RATES} ways")
        read, write, first = (_rate(name, fields[name]) for name in ceilings)
        return cls(fields["is_direct"], read, write, first, tuple(map(_rate_of_row, rows)))


def _rate_of_row(row: object) -> DiskRate:
    names = {"engine", "piece_bytes", "depth", "num_rings", "read_gbs", "write_gbs"}
    fields = _fields("a disk rate", row, names)
    read, write = (_rate(name, fields.pop(name)) for name in ("read_gbs", "write_gbs"))
    return DiskRate(DiskOptions.from_dict(fields), read, write)


def _fields(what: str, value: object, names: set[str]) -> dict[str, object]:
    if not isinstance(value, dict) or set(value) != names:
        raise ConfigError(f"{what}: must have {', '.join(sorted(names))}, and nothing else")
    return dict(value)


def _whole(name: str, value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name}={value!r}: must be a whole number from {least} to {most}")
    return value


def _rate(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_GBS:
        raise ConfigError(f"{name}={value!r}: must be above 0, at most {MOST_GBS:g} GB/s")
    return float(value)


def open_engine(options: DiskOptions) -> _core.IoEngine:
    """An engine that goes this way. Raises OSError where the kernel refuses io_uring."""
    return _core.IoEngine(
        options.kind,
        queue_depth=options.depth if options.kind is EngineKind.IO_URING else 1,
        num_threads=options.depth if options.kind is EngineKind.THREADS else 1,
        num_rings=options.num_rings,
        piece_bytes=options.piece_bytes,
    )


# ---- measuring ---------------------------------------------------------------------------------------

_T, _U = EngineKind.THREADS, EngineKind.IO_URING
WAYS = (
    *(DiskOptions(_T, piece, depth)
      for piece, depth in ((MIB, 8), (4 * MIB, 8), (512 * KIB, 16), (MIB, 16), (4 * MIB, 16))),
    *(DiskOptions(_U, piece, depth, rings)
      for piece, depth in ((512 * KIB, 64), (MIB, 64), (4 * MIB, 16)) for rings in (1, 4)),
)  # fmt: skip
RAW_LOOPS = (
    (_T, 8, MIB), (_T, 8, 4 * MIB), (_T, 16, MIB), (_T, 16, 4 * MIB), (_U, 64, MIB), (_U, 16, 4 * MIB),
)  # fmt: skip
"""Kind, how many at once, bytes of a piece."""


def measure_disk(path: str | Path, *, num_bytes: int, seconds: float) -> DiskRates:
    """Measure the disk that the directory `path` lies on, by a private file there, which is always removed.

    Parameters
    ----------
    path: an existing directory.
    num_bytes: of the file, at least 64 MiB; the larger, the less a cache of the disk helps.
    seconds: about how long, 0.5 to 600, beyond writing the file once.

    Raises
    ------
    ValueError: num_bytes or seconds out of range.
    ConfigError: the disk has no room or the directory cannot be written; nothing was written then.
    OSError, TransferError: the disk fails.
    """
    if num_bytes < LEAST_BYTES:
        raise ValueError(f"num_bytes={num_bytes}: must be at least {LEAST_BYTES}")
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise ValueError(f"seconds={seconds}: must be {LEAST_SECONDS} to {MOST_SECONDS}")
    with _private_file(Path(path), num_bytes - num_bytes % (4 * MIB)) as file:
        memory = _aligned_memory(min(max(num_bytes, LEAST_MEMORY), MOST_MEMORY))
        return _Measurement(file, memory, seconds).run()


class _Measurement:
    """Every way and every raw loop in both directions, ROUNDS times; the median of each counts."""

    def __init__(self, file: _core.BlockFile, memory: NDArray[np.uint8], seconds: float) -> None:
        self._file = file
        self._memory = memory
        self._ways = [way for way in WAYS if _is_possible(way)]
        loops = [loop for loop in RAW_LOOPS if loop[0] in {way.kind for way in self._ways}]
        self._loops = loops
        self._turn_s = seconds / (2 * ROUNDS * (len(self._ways) + len(loops)))
        self._rng = np.random.default_rng(1)

    def run(self) -> DiskRates:
        first = self._first_write()
        both = tuple(IoDirection)
        jobs = [
            *(partial(self._raw, direction, *loop) for direction in both for loop in self._loops),
            *(partial(self._scattered, direction, way) for direction in both for way in self._ways),
        ]
        turns: list[list[float]] = [[] for _ in jobs]
        for _ in range(ROUNDS):
            for i in self._rng.permutation(len(jobs)).tolist():
                turns[i].append(jobs[i]())
        rates = [median(values) for values in turns]
        raw_read, raw_write, read, write = np.split(
            np.array(rates), np.cumsum([len(self._loops), len(self._loops), len(self._ways)])
        )
        return DiskRates(
            self._file.is_direct,
            float(raw_read.max()),
            float(raw_write.max()),
            first,
            tuple(map(DiskRate, self._ways, read.tolist(), write.tolist())),
        )

    def _first_write(self) -> float:
        """Write the whole file once, in order: later writes meet extents that have been written."""
        way = DiskOptions(EngineKind.THREADS, 4 * MIB, 8)
        offsets = np.arange(0, self._file.size_bytes, way.piece_bytes)
        return self._run(IoDirection.WRITE, way, offsets, lambda turn, _: turn * 8 < len(offsets))

    def _raw(self, direction: IoDirection, kind: EngineKind, count: int, piece: int) -> float:
        memory = self._memory
        rate = _core.raw_disk_rate(
            self._file, memory.ctypes.data, memory.nbytes, direction=direction, kind=kind,
            num_at_once=min(count, memory.nbytes // piece), piece_bytes=piece, seconds=self._turn_s,
        )  # fmt: skip
        return rate / GIGA

    def _scattered(self, direction: IoDirection, way: DiskOptions) -> float:
        """Transfers of the way's size in random order."""
        count = self._file.size_bytes // way.piece_bytes
        offsets = self._rng.permutation(count) * way.piece_bytes
        return self._run(direction, way, offsets, lambda _, spent_s: spent_s < self._turn_s)

    def _run(
        self,
        direction: IoDirection,
        way: DiskOptions,
        offsets: NDArray[np.int64],
        goes_on: Callable[[int, float], bool],
    ) -> float:
        """GB/s of one batch after another, two always queued, while `goes_on(batches, seconds)`."""
        parts = [offsets[at : at + way.depth] for at in range(0, len(offsets), way.depth)]
        num_bytes = turn = 0
        queued: list[int] = []
        with open_engine(way) as engine:
            start_s = time.perf_counter()
            while turn == 0 or goes_on(turn, time.perf_counter() - start_s):
                part = parts[turn % len(parts)]
                queued.append(self._submit(engine, direction, way, part, turn))
                num_bytes += len(part) * way.piece_bytes
                turn += 1
                if len(queued) > 1:
                    _finish(engine, queued.pop(0))
            for ticket in queued:
                _finish(engine, ticket)
            return num_bytes / (time.perf_counter() - start_s) / GIGA

    def _submit(
        self,
        engine: _core.IoEngine,
        direction: IoDirection,
        way: DiskOptions,
        offsets: NDArray[np.int64],
        turn: int,
    ) -> int:
        submit: Callable[..., int] = (
            engine.submit_read if direction is IoDirection.READ else engine.submit_write
        )
        batch_bytes = way.depth * way.piece_bytes
        place = turn % (self._memory.nbytes // batch_bytes) * batch_bytes
        addresses = (
            self._memory.ctypes.data
            + place
            + np.arange(len(offsets), dtype=np.int64) * way.piece_bytes
        )
        return submit(
            self._file, offsets, addresses, np.full(len(offsets), way.piece_bytes, dtype=np.int64)
        )


def _is_possible(way: DiskOptions) -> bool:
    if way.kind is EngineKind.THREADS:
        return True
    try:
        open_engine(way).close()
    except OSError:
        return False  # a kernel or a container that refuses io_uring
    return True


def _finish(engine: _core.IoEngine, ticket: int) -> None:
    result = engine.wait(ticket, TIMEOUT_S)
    if result.status is not _core.IoStatus.OK:
        text = result.message or f"the disk did not answer within {TIMEOUT_S:g} seconds"
        raise TransferError(result.errno or errno.ETIMEDOUT, text)
    engine.forget(ticket)


def _aligned_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Random bytes in huge pages, where they are allowed: the pinned pools lie so too."""
    huge = 2 * MIB
    region = mmap.mmap(-1, num_bytes + huge)
    region.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(region, dtype=np.uint8)
    start = -array.ctypes.data % huge
    array = array[start : start + num_bytes]
    # A disk may compress: the bytes must not repeat.
    words = array.view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    return array


@contextmanager
def _private_file(directory: Path, num_bytes: int) -> Iterator[_core.BlockFile]:
    """A new file of that many allocated bytes, 0600, gone at the end."""
    try:
        free = shutil.disk_usage(directory).free
        if num_bytes + SPARE_BYTES > free:
            raise ConfigError(
                f"{str(directory)!r}: measuring the disk takes {num_bytes + SPARE_BYTES} bytes, "
                f"{free} bytes are free there"
            )
        handle, name = tempfile.mkstemp(prefix=".tiermem-disk-", dir=directory)
    except OSError as error:
        raise ConfigError(
            f"{str(directory)!r}: nothing can be written there ({error.strerror or error})"
        ) from error
    os.close(handle)
    try:
        with _core.BlockFile(name, num_bytes, _core.OpenMode.CREATE) as file:
            yield file
    finally:
        # Cut off first: what the kernel still holds open takes no space.
        os.truncate(name, 0)
        os.unlink(name)  # noqa: PTH108
