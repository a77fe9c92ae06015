"""CopyRates: how fast each way of copying was found to be, and which one follows from that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiermem._core import NUM_COPY_RUNS, NUM_COPY_SIZES
from tiermem.device.protocol import Direction
from tiermem.errors import ConfigError

FORMAT = 1
KERNEL_MARGIN = 1.03
"""A method that occupies multiprocessors must be so much faster than one that needs none."""
MAX_ROWS = 10_000
MAX_BYTES = 1 << 40
MAX_RUN = 1 << 30
MAX_GB_PER_S = 100_000.0


class CopyMethod(Enum):
    """How the pieces of a batch are moved."""

    SINGLE = "single"
    """A driver call each."""
    BATCH = "batch"
    """The driver's batches; all DMA, like SINGLE."""
    RUNS = "runs"
    """Neighbours in host memory by one DMA through staging in hot memory, spread by a kernel."""
    KERNEL = "kernel"
    """A kernel that reads or writes host memory itself."""


CODES = {
    CopyMethod.SINGLE: 0,
    CopyMethod.BATCH: 1,
    CopyMethod.RUNS: 2,
    CopyMethod.KERNEL: 3,
}
"""The methods as the native core numbers them."""
DIRECTIONS = {
    Direction.HOST_TO_DEVICE: 0,
    Direction.DEVICE_TO_HOST: 1,
    Direction.DEVICE_TO_DEVICE: 2,
}
"""The directions as the native core numbers them."""

Methods = NDArray[np.uint8]
"""(NUM_COPY_SIZES × NUM_COPY_RUNS,): the code for pieces of 2^i bytes in runs of 2^j at i × runs + j."""


@dataclass(frozen=True, slots=True)
class CopyCase:
    """What was copied: pieces of one size, scattered (1) or in runs of neighbours in host memory.

    `busy`: while the opposite direction was copying too.
    """

    direction: Direction
    busy: bool
    piece_bytes: int
    run_length: int


@dataclass(frozen=True, slots=True)
class CopyRate:
    """What one method reached: GB/s; of busy cases the mean of both directions."""

    case: CopyCase
    method: CopyMethod
    gb_per_s: float


@dataclass(frozen=True, slots=True)
class CopyRates:
    """Every rate measured on one machine; empty: nothing is known."""

    rows: tuple[CopyRate, ...] = ()

    def of(self, case: CopyCase) -> dict[CopyMethod, float]:
        """What was measured for exactly this case."""
        return {row.method: row.gb_per_s for row in self.rows if row.case == case}

    def best(
        self, direction: Direction, piece_bytes: int, run_length: int = 1, *, busy: bool = False
    ) -> CopyMethod:
        """The method for pieces like these, after the nearest case measured; BATCH if none was."""
        best = self._best_of_cases(direction, busy)
        return best[_nearest(best, piece_bytes, run_length)] if best else CopyMethod.BATCH

    def methods(self, direction: Direction, *, busy: bool) -> Methods:
        """The best method for every size and run length, for the native core."""
        best = self._best_of_cases(direction, busy)
        if not best:
            return always(CopyMethod.BATCH)
        chosen = [
            CODES[best[_nearest(best, 1 << size, 1 << run)]]
            for size in range(NUM_COPY_SIZES)
            for run in range(NUM_COPY_RUNS)
        ]
        return np.array(chosen, dtype=np.uint8)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"format": FORMAT, "rows": [_row_to_dict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> CopyRates:
        """What `to_dict` made.

        Raises
        ------
        ConfigError: it is something else; names the key, the value and what is allowed.
        """
        if table.get("format") != FORMAT:
            raise ConfigError(f"copies.format={table.get('format')!r}: must be {FORMAT}")
        rows = table.get("rows")
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise ConfigError(f"copies.rows: must be a list of at most {MAX_ROWS} rows")
        return cls(tuple(_row_from_dict(i, row) for i, row in enumerate(rows)))

    def _best_of_cases(self, direction: Direction, busy: bool) -> dict[CopyCase, CopyMethod]:
        """The fastest method of every case of a direction: of the busy ones if there are any."""
        found = {row.case for row in self.rows if row.case.direction is direction}
        cases = {case for case in found if case.busy is busy} or found
        return {case: _fastest(self.of(case)) for case in cases}


def always(method: CopyMethod) -> Methods:
    """`method` for every size and run length."""
    return np.full(NUM_COPY_SIZES * NUM_COPY_RUNS, CODES[method], dtype=np.uint8)


def _nearest(cases: Iterable[CopyCase], piece_bytes: int, run_length: int) -> CopyCase:
    """The nearest case: by size first, then by length of the runs, both by their ratio."""

    def distance(case: CopyCase) -> tuple[float, float]:
        return (
            abs(math.log2(case.piece_bytes / piece_bytes)),
            abs(math.log2(case.run_length / run_length)),
        )

    return min(cases, key=distance)


def _fastest(rates: Mapping[CopyMethod, float]) -> CopyMethod:
    def value(method: CopyMethod) -> float:
        needs_kernel = method in {CopyMethod.RUNS, CopyMethod.KERNEL}
        return rates[method] / (KERNEL_MARGIN if needs_kernel else 1.0)

    return max(rates, key=value)


def _row_to_dict(row: CopyRate) -> dict[str, object]:
    return {
        "direction": row.case.direction.value,
        "busy": row.case.busy,
        "piece_bytes": row.case.piece_bytes,
        "run_length": row.case.run_length,
        "method": row.method.value,
        "gb_per_s": row.gb_per_s,
    }


def _row_from_dict(index: int, row: object) -> CopyRate:
    key = f"copies.rows[{index}]"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{key}={row!r}: must be a table")
    busy = row.get("busy")
    if not isinstance(busy, bool):
        raise ConfigError(f"{key}.busy={busy!r}: must be true or false")
    case = CopyCase(
        Direction(_word(f"{key}.direction", row.get("direction"), [d.value for d in Direction])),
        busy,
        int(_number(f"{key}.piece_bytes", row.get("piece_bytes"), int, MAX_BYTES)),
        int(_number(f"{key}.run_length", row.get("run_length"), int, MAX_RUN)),
    )
    method = _word(f"{key}.method", row.get("method"), [method.value for method in CopyMethod])
    rate = _number(f"{key}.gb_per_s", row.get("gb_per_s"), (int, float), MAX_GB_PER_S)
    return CopyRate(case, CopyMethod(method), float(rate))


def _word(key: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{key}={value!r}: must be one of {', '.join(allowed)}")
    return value


def _number(
    key: str, value: object, kind: type[int] | tuple[type[int], type[float]], most: float
) -> float:
    """A positive number of at most `most`, and at least 1 if it must be an int."""
    fine = isinstance(value, kind) and not isinstance(value, bool)
    if not isinstance(value, (int, float)) or not fine or not 0 < value <= most:
        least = "at least 1" if kind is int else "above 0"
        raise ConfigError(f"{key}={value!r}: must be {least} and at most {most:g}")
    return value
