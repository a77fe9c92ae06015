"""Fit: how the time of a step grows with the bytes that are not resident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tiermem.bench.long_context import NAME
from tiermem.bench.long_context.rows import MILLI, NOT_RESIDENT, STEP, find, groups
from tiermem.bench.result import Better, Result, Subject, measured

LEAST_POINTS = 3
"""Through two points there is always a line."""
NO_CEILING = "a fit has no ceiling; see decode"


@dataclass(frozen=True, slots=True)
class Line:
    """`ms` = `start_ms` + gigabytes x `ms_a_gb`; residual: the farthest point's, as a share of its time."""

    start_ms: float
    ms_a_gb: float
    residual: float

    @property
    def gb_per_s(self) -> float:
        """The rate that the slope comes to."""
        return 1 / (self.ms_a_gb * MILLI)


def fit_line(gigabytes: Sequence[float], ms: Sequence[float]) -> Line | None:
    """The line of least squares; None for too few points, all of them alike, or times that do not grow."""
    if len(gigabytes) < LEAST_POINTS or np.ptp(gigabytes) <= 0:
        return None
    slope, start = np.polyfit(gigabytes, ms, 1)
    if slope <= 0:
        return None
    far = np.abs(np.asarray(ms) - (start + slope * np.asarray(gigabytes))) / np.asarray(ms)
    return Line(float(start), float(slope), float(far.max()))


def points(
    results: Sequence[Result],
) -> Iterator[tuple[dict[str, str | int | float], list[float], list[float]]]:
    """For each model, fill and share: gigabytes that are not resident, and ms of a step, of all its cases."""
    for common, cases in groups(results):
        found = [(find(case, NOT_RESIDENT), find(case, STEP)) for case in cases]
        known = [(x, y) for x, y in found if x is not None and y is not None and x > 0]
        yield common, [x for x, _ in known], [y for _, y in known]


def fit_results(results: Sequence[Result]) -> Iterator[Result]:
    """Rows of every line that the results allow."""
    for common, gigabytes, ms in points(results):
        line = fit_line(gigabytes, ms)
        if line is None:
            continue
        parameters = {**common, "cases": len(ms)}
        for name, unit, value, better in (
            ("fit: rate", "GB/s", line.gb_per_s, Better.HIGHER),
            ("fit: step without bytes", "ms", line.start_ms, Better.LOWER),
            ("fit: farthest from the line", "%", 100 * line.residual, Better.LOWER),
        ):
            yield measured(Subject(NAME, name, parameters, unit, better), [value], NO_CEILING)
