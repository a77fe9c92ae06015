"""DiskCeiling: the best plain loop of raw reads or writes over one file, in turns with what it is compared to.

A virtual disk is faster and slower by the minute, so a ceiling counts only beside the figures that it is held
against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from tiermem import _core
from tiermem._core import EngineKind, IoDirection
from tiermem.bench.run import Scale
from tiermem.device.protocol import Memory
from tiermem.disk_rates import RAW_LOOPS, DiskOptions, open_engine
from tiermem.errors import TransferError

MIB = 1 << 20
TIMEOUT_S = 120.0
LOOP_S = {Scale.QUICK: 0.03, Scale.FULL: 0.35}
FINALISTS = 2
"""Loops of each direction that are measured again and again; the others were slower at the start."""
FIRST_WRITE = DiskOptions(EngineKind.THREADS, 4 * MIB, 8)


@dataclass(frozen=True, slots=True)
class Loop:
    """Threads or a queue of the kernel, how many transfers at once, and their size."""

    kind: EngineKind
    num_at_once: int
    piece_bytes: int

    @property
    def name(self) -> str:
        """The loop in a few words."""
        what = "io_uring" if self.kind is EngineKind.IO_URING else "threads"
        return f"{self.num_at_once} {what} x {self.piece_bytes // MIB} MiB"


@dataclass(slots=True)
class Race:
    """Bytes a second of the best loops of one direction, turn by turn."""

    turns: dict[Loop, list[float]] = field(default_factory=dict)

    @property
    def best(self) -> tuple[Loop, float]:
        """The loop with the best median, and that median."""
        medians = {loop: median(rates) for loop, rates in self.turns.items()}
        loop = max(medians, key=medians.__getitem__)
        return loop, medians[loop]


class DiskCeiling:
    """Raw loops over a file at `path`, from and to `memory`; the file stays. A context.

    Raises
    ------
    OSError, TransferError: an operation failed.
    """

    def __init__(self, path: Path, memory: Memory, scale: Scale) -> None:
        self._memory = memory
        self._seconds = LOOP_S[scale]
        self._file = _core.BlockFile(path, memory.num_bytes, _core.OpenMode.CREATE)
        self._races: dict[IoDirection, Race] = {}
        try:
            _write_once(self._file, memory)
            for direction in IoDirection:
                self._races[direction] = self._first_race(direction)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> DiskCeiling:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def restart(self, direction: IoDirection) -> None:
        """Forget the turns so far: another figure is compared from now on."""
        for rates in self._races[direction].turns.values():
            rates.clear()

    def turn(self, direction: IoDirection) -> None:
        """Run the best loops once more. Reads overwrite the memory."""
        for loop, rates in self._races[direction].turns.items():
            rates.append(self._run(direction, loop))

    def best(self, direction: IoDirection) -> tuple[str, float]:
        """Name and bytes a second of the best loop of the turns since `restart`."""
        loop, rate = self._races[direction].best
        io = "direct I/O" if self._file.is_direct else "buffered I/O"
        return f"raw {io}, {direction.name.lower()}, {loop.name}", rate

    def _first_race(self, direction: IoDirection) -> Race:
        """The best of all loops that this system permits."""
        loops = [Loop(*values) for values in RAW_LOOPS if _is_permitted(EngineKind(values[0]))]
        found = {loop: self._run(direction, loop) for loop in loops}
        order = sorted(found, key=found.__getitem__, reverse=True)
        return Race({loop: [found[loop]] for loop in order[:FINALISTS]})

    def _run(self, direction: IoDirection, loop: Loop) -> float:
        return _core.raw_disk_rate(
            self._file, self._memory.address, self._memory.num_bytes, direction=direction,
            kind=loop.kind, num_at_once=min(loop.num_at_once, self._memory.num_bytes // loop.piece_bytes),
            piece_bytes=loop.piece_bytes, seconds=self._seconds,
        )  # fmt: skip


def _is_permitted(kind: EngineKind) -> bool:
    """Whether this system lets a process use such an engine."""
    try:
        _core.IoEngine(kind).close()
    except OSError:
        return False
    return True


def _write_once(file: _core.BlockFile, memory: Memory) -> None:
    """Write the whole file: later transfers meet extents that have been written."""
    block = FIRST_WRITE.piece_bytes
    offsets = np.arange(0, memory.num_bytes, block, dtype=np.int64)
    lengths = np.minimum(memory.num_bytes - offsets, block)
    with open_engine(FIRST_WRITE) as engine:
        ticket = engine.submit_write(file, offsets, offsets + memory.address, lengths)
        result = engine.wait(ticket, TIMEOUT_S)
        if result.status is not _core.IoStatus.OK:
            raise TransferError(result.message or f"not done after {TIMEOUT_S:g} seconds")
