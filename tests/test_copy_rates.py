"""Rates of copies: which method follows from them, and that a file of them is read with care."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tiermem._core import NUM_COPY_RUNS, NUM_COPY_SIZES
from tiermem.device.copy_rates import (
    CODES,
    KERNEL_MARGIN,
    CopyCase,
    CopyMethod,
    CopyRate,
    CopyRates,
    always,
)
from tiermem.device.protocol import Direction
from tiermem.errors import ConfigError

UP, DOWN, WITHIN = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST, Direction.DEVICE_TO_DEVICE
KIB = 1 << 10


def rows(
    direction: Direction, busy: bool, piece_bytes: int, run_length: int, **rates: float
) -> list[CopyRate]:
    case = CopyCase(direction, busy, piece_bytes, run_length)
    return [CopyRate(case, CopyMethod(name), rate) for name, rate in rates.items()]


RATES = CopyRates(
    (
        *rows(UP, False, 16 * KIB, 1, batch=30, kernel=51),
        *rows(UP, False, 16 * KIB, 16, batch=30, runs=54, kernel=51),
        *rows(UP, False, 256 * KIB, 1, batch=55, kernel=51),
        *rows(UP, False, 256 * KIB, 16, batch=55, runs=55.1, kernel=51),
        *rows(UP, True, 16 * KIB, 1, batch=40, kernel=30),
        *rows(DOWN, False, 64 * KIB, 1, single=20, batch=19),
    )
)


def test_the_fastest_method_of_the_nearest_case_is_chosen() -> None:
    assert RATES.best(UP, 16 * KIB) is CopyMethod.KERNEL
    assert RATES.best(UP, 16 * KIB, 16) is CopyMethod.RUNS
    assert RATES.best(UP, 256 * KIB) is CopyMethod.BATCH
    assert RATES.best(UP, 1) is CopyMethod.KERNEL
    assert RATES.best(UP, 60 * KIB, 100) is CopyMethod.RUNS
    assert RATES.best(UP, 70 * KIB, 3) is CopyMethod.BATCH
    assert RATES.best(UP, 1 << 40, 1 << 20) is CopyMethod.BATCH
    assert RATES.best(DOWN, 1) is CopyMethod.SINGLE


def test_what_was_measured_with_both_directions_at_work_counts_while_they_are() -> None:
    assert RATES.best(UP, 16 * KIB, busy=True) is CopyMethod.BATCH
    assert RATES.best(DOWN, 16 * KIB, busy=True) is CopyMethod.SINGLE


def test_batches_are_taken_where_nothing_is_known() -> None:
    assert RATES.best(WITHIN, 16 * KIB) is CopyMethod.BATCH
    assert (CopyRates().methods(UP, busy=False) == always(CopyMethod.BATCH)).all()


def test_a_method_that_needs_multiprocessors_must_be_clearly_faster() -> None:
    for factor, wanted in ((0.999, CopyMethod.BATCH), (1.001, CopyMethod.KERNEL)):
        rate = 50 * KERNEL_MARGIN * factor
        rates = CopyRates(tuple(rows(UP, False, 4096, 1, batch=50, kernel=rate)))
        assert rates.best(UP, 4096) is wanted


def test_the_table_for_the_native_core_says_the_same() -> None:
    table = RATES.methods(UP, busy=False).reshape(NUM_COPY_SIZES, NUM_COPY_RUNS)
    for size in range(NUM_COPY_SIZES):
        for run in range(NUM_COPY_RUNS):
            assert table[size, run] == CODES[RATES.best(UP, 1 << size, 1 << run)]


def test_rates_survive_json() -> None:
    assert CopyRates.from_dict(json.loads(json.dumps(RATES.to_dict()))) == RATES
    assert CopyRates.from_dict(CopyRates().to_dict()) == CopyRates()


def row(**changes: object) -> dict[str, Any]:
    good = {
        "direction": "h2d",
        "busy": False,
        "piece_bytes": 4096,
        "run_length": 1,
        "method": "batch",
        "gb_per_s": 5,
    }
    return {"format": 1, "rows": [good | changes]}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({}, r"copies.format=None: must be 1"),
        ({"format": 2, "rows": []}, r"copies.format=2: must be 1"),
        ({"format": 1}, r"copies.rows: must be a list"),
        ({"format": 1, "rows": {}}, r"copies.rows: must be a list"),
        ({"format": 1, "rows": [None] * 10_001}, r"at most 10000 rows"),
        ({"format": 1, "rows": [3]}, r"copies.rows\[0\]=3: must be a table"),
        (row(direction="up"), r"rows\[0\].direction='up': must be one of h2d, d2h, d2d"),
        (row(direction=["h2d"]), r"direction=\['h2d'\]: must be one of"),
        (row(busy=1), r"busy=1: must be true or false"),
        (row(piece_bytes=0), r"piece_bytes=0: must be at least 1"),
        (row(piece_bytes=4096.0), r"piece_bytes=4096.0: must be"),
        (row(piece_bytes=1 << 50), r"piece_bytes=\d+: must be at least 1 and at most"),
        (row(run_length=True), r"run_length=True: must be"),
        (row(method="fast"), r"method='fast': must be one of single, batch, runs, kernel"),
        (row(gb_per_s=0), r"gb_per_s=0: must be above 0"),
        (row(gb_per_s="5"), r"gb_per_s='5': must be"),
        (row(gb_per_s=float("nan")), r"gb_per_s=nan: must be"),
        (row(gb_per_s=float("inf")), r"gb_per_s=inf: must be"),
    ],
)
def test_a_damaged_table_is_refused_by_the_key(table: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CopyRates.from_dict(table)
