"""Measured ways to move bytes: the choice among them, their text, and a measurement that leaves nothing behind."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from io_support import PAGE, memory

from tiermem import ConfigError, TransferError, _core, disk_rates
from tiermem._core import BlockFile, EngineKind, IoDirection, OpenMode
from tiermem.disk_rates import (
    LEAST_BYTES,
    DiskOptions,
    DiskRate,
    DiskRates,
    measure_disk,
    open_engine,
)

THREADS = DiskOptions(EngineKind.THREADS, 1 << 20, 8)
URING = DiskOptions(EngineKind.IO_URING, 1 << 20, 64, 4)


def rates_of(*rows: tuple[DiskOptions, float, float]) -> DiskRates:
    return DiskRates(True, 5.0, 4.0, 3.0, tuple(DiskRate(*row) for row in rows))


# ---- the choice --------------------------------------------------------------------------------------


def test_the_way_that_suits_both_directions_is_chosen() -> None:
    one_sided = DiskOptions(EngineKind.THREADS, 4096, 1)
    rates = rates_of((one_sided, 9.0, 1.0), (THREADS, 8.0, 4.0), (URING, 6.0, 4.5))
    assert rates.choose() == THREADS
    assert rates.choose(EngineKind.IO_URING) == URING


def test_of_equally_good_ways_the_one_with_the_least_in_flight() -> None:
    small = DiskOptions(EngineKind.IO_URING, 1 << 19, 16)
    rates = rates_of((URING, 4.0, 4.0), (small, 3.95, 3.95), (THREADS, 3.5, 4.0))
    assert rates.choose() == small


def test_a_kind_that_was_not_measured_has_no_choice() -> None:
    assert rates_of((THREADS, 1.0, 1.0)).choose(EngineKind.IO_URING) is None


@pytest.mark.parametrize("options", [THREADS, URING])
def test_an_engine_goes_the_way_of_its_options(options: DiskOptions) -> None:
    try:
        engine = open_engine(options)
    except OSError as error:
        if options.kind is EngineKind.THREADS:
            raise
        pytest.skip(f"no io_uring here: {error}")
    with engine:
        assert engine.kind is options.kind


# ---- as JSON -----------------------------------------------------------------------------------------


def test_rates_survive_json() -> None:
    rates = rates_of((THREADS, 3.25, 2.5), (URING, 4.0, 3.5))
    assert DiskRates.from_dict(json.loads(json.dumps(rates.to_dict()))) == rates
    assert DiskOptions.from_dict(URING.to_dict()) == URING


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("is_direct", [None, 1, "true"]),
        ("read_ceiling_gbs", [0, -1.0, math.nan, math.inf, "1", None, True, 1e7]),
        ("write_ceiling_gbs", [0, []]),
        ("first_write_gbs", [0, {}]),
        ("rates", [[], {}, None, [{}], [None], [1], "threads"]),
    ],
)
def test_rates_that_cannot_be_are_refused(name: str, values: list[object]) -> None:
    good = rates_of((THREADS, 3.0, 2.0)).to_dict()
    for value in values:
        with pytest.raises(ConfigError, match=r"must"):
            DiskRates.from_dict({**good, name: value})
    with pytest.raises(ConfigError, match="nothing else"):
        DiskRates.from_dict({k: v for k, v in good.items() if k != name})
    with pytest.raises(ConfigError, match="nothing else"):
        DiskRates.from_dict({**good, "more": 1})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("engine", ["aio", "", None, 3, ["threads"]]),
        ("piece_bytes", [0, -4096, 4095, 4097, (1 << 30) + 4096, 4096.0, "4096", True]),
        ("depth", [0, 257, -1, 1.5, None]),
        ("num_rings", [0, 2, True]),
        ("read_gbs", [0, math.nan, "3"]),
        ("write_gbs", [None]),
    ],
)
def test_a_way_that_cannot_be_is_refused(name: str, values: list[object]) -> None:
    good = rates_of((THREADS, 3.0, 2.0)).to_dict()
    for value in values:
        bad = copy.deepcopy(good)
        rows = bad["rates"]
        assert isinstance(rows, list)
        rows[0][name] = value
        with pytest.raises(ConfigError, match=name):
            DiskRates.from_dict(bad)
    with pytest.raises(ConfigError, match="num_rings=17"):
        DiskOptions.from_dict({**URING.to_dict(), "num_rings": 17})
    for value in (None, [], "threads", 1):
        with pytest.raises(ConfigError):
            DiskOptions.from_dict(value)
        with pytest.raises(ConfigError):
            DiskRates.from_dict(value)


# ---- a measurement -----------------------------------------------------------------------------------


@pytest.fixture(name="seen")
def seen_fixture(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modes of the files that were opened for measuring."""
    modes: list[int] = []
    real = _core.BlockFile

    def opened(path: str, num_bytes: int, mode: OpenMode) -> BlockFile:
        file = real(path, num_bytes, mode)
        modes.append(Path(path).stat().st_mode & 0o777)
        return file

    monkeypatch.setattr(_core, "BlockFile", opened)
    return modes


def test_a_disk_is_measured_and_nothing_stays(
    tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = (THREADS, DiskOptions(EngineKind.IO_URING, 1 << 20, 8, 2))
    monkeypatch.setattr(disk_rates, "WAYS", ways)
    rates = measure_disk(tmp_path, num_bytes=LEAST_BYTES, seconds=0.5)
    assert list(tmp_path.iterdir()) == []
    assert seen == [0o600]
    assert [rate.options for rate in rates.rates] in ([*ways], [ways[0]])
    assert rates.choose() in ways
    assert DiskRates.from_dict(json.loads(json.dumps(rates.to_dict()))) == rates


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ConfigError, match=r"takes \d+ bytes, \d+ bytes are free"):
        measure_disk(tmp_path, num_bytes=free - free % (4 << 20), seconds=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing can be written there"):
        measure_disk(tmp_path / "absent", num_bytes=LEAST_BYTES, seconds=1.0)


@pytest.mark.parametrize("arguments", [{"num_bytes": LEAST_BYTES - 1}, {"seconds": 0.4},
                                       {"seconds": 601.0}, {"seconds": math.nan}])  # fmt: skip
def test_measurements_that_cannot_be(tmp_path: Path, arguments: dict[str, float]) -> None:
    good: dict[str, float] = {"num_bytes": LEAST_BYTES, "seconds": 1.0}
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}="):
        measure_disk(tmp_path, **(good | arguments))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = _core.FaultOps()
    faults.fail(_core.FileCall.WRITE, first=3, error=errno.EIO)

    def faulty(options: DiskOptions) -> _core.IoEngine:
        return _core.IoEngine(EngineKind.THREADS, num_threads=1, faults=faults)

    monkeypatch.setattr(disk_rates, "open_engine", faulty)
    with pytest.raises(TransferError, match="Input/output error"):
        measure_disk(tmp_path, num_bytes=LEAST_BYTES, seconds=0.5)
    assert list(tmp_path.iterdir()) == []


# ---- the raw loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EngineKind.THREADS, EngineKind.IO_URING])
def test_the_raw_loop_moves_the_bytes_it_counts(tmp_path: Path, kind: EngineKind) -> None:
    source = memory(8 * PAGE)
    source[:] = np.arange(8 * PAGE, dtype=np.uint64).astype(np.uint8)
    path = tmp_path / "raw"
    with BlockFile(path, 64 * PAGE, OpenMode.CREATE) as file:

        def run(direction: IoDirection, at: int) -> float:
            return _core.raw_disk_rate(
                file, at, 8 * PAGE, direction=direction, kind=kind, num_at_once=4,
                piece_bytes=PAGE, seconds=0.05,
            )  # fmt: skip

        try:
            assert run(IoDirection.WRITE, source.ctypes.data) > 0
        except OSError as error:
            if kind is EngineKind.THREADS:
                raise
            pytest.skip(f"no io_uring here: {error}")
        stored = np.fromfile(path, dtype=np.uint8).reshape(-1, PAGE)
        written = {row.tobytes() for row in source.reshape(-1, PAGE)} | {bytes(PAGE)}
        assert {row.tobytes() for row in stored} <= written
        assert stored[:4].any()
        target = memory(8 * PAGE)
        assert run(IoDirection.READ, target.ctypes.data) > 0
        rows = {row.tobytes() for row in target.reshape(-1, PAGE)[:4]}
        assert rows <= {row.tobytes() for row in stored}
        os.truncate(path, PAGE)
        with pytest.raises(OSError, match="raw transfer failed"):
            run(IoDirection.READ, target.ctypes.data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_at_once", 0), ("num_at_once", 257), ("piece_bytes", 100), ("piece_bytes", 0),
     ("address", 0), ("num_bytes", PAGE)],
)  # fmt: skip
def test_raw_loops_that_cannot_be(tmp_path: Path, name: str, value: int) -> None:
    target = memory(8 * PAGE)
    arguments = {"address": target.ctypes.data, "num_bytes": 8 * PAGE, "num_at_once": 4,
                 "piece_bytes": PAGE}  # fmt: skip
    with (
        BlockFile(tmp_path / "raw", 64 * PAGE, OpenMode.CREATE) as file,
        pytest.raises(ValueError, match=r"must be"),
    ):
        _core.raw_disk_rate(
            file, direction=IoDirection.READ, kind=EngineKind.THREADS, seconds=0.01,
            **(arguments | {name: value}),
        )  # fmt: skip
