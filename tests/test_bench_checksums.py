"""`tiermem bench checksums`: both sides are what they say, damage would be found, and costs are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Cli, one_thread

from tiermem.bench import checksum_rates, checksum_steps, checksum_store, disk
from tiermem.bench.checksum_steps import Size
from tiermem.bench.checksum_turns import Row, Turns, Unit, take_turns
from tiermem.bench.result import Figures, Result
from tiermem.bench.run import Run, Scale, open_ceilings
from tiermem.device.cpu import CpuDevice
from tiermem.errors import ConfigError, CorruptPageError, InvariantError, TierMemError
from tiermem.layout import PageLayout
from tiermem.page_sums import PageSums
from tiermem.store import ColdStore
from tiermem.store_transfer import StoreTransfer

TINY = Size(PageLayout(2, 1, 32, "float32", 16), 1, 16, 40, 30, 9, 5)
Rows = Callable[[Run], Iterator[Result]]


@pytest.fixture(name="bench", scope="module")
def bench_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    device = CpuDevice()
    place = tmp_path_factory.mktemp("disk")
    with one_thread(), open_ceilings(device, Scale.QUICK) as ceilings:
        yield Run(device, Scale.QUICK, ceilings, place, 1 << 20, lambda _: None)
    assert list(place.iterdir()) == []
    device.close()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is of no matter here."""
    for module in (checksum_steps, checksum_store, checksum_rates):
        monkeypatch.setattr(module, "size_of", lambda _: TINY)


def results(rows: Rows, bench: Run) -> dict[str, Result]:
    return {result.subject.name: result for result in rows(bench)}


# ---- turns and costs ------------------------------------------------------------------------------


def test_turns_are_balanced_and_have_no_period() -> None:
    order: list[str] = []

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    turns = take_turns(timed("a"), timed("b"), 8)
    assert "".join(order) == "ab" + "abbabaabbaababba"
    assert turns.with_s == (3.0, 6.0, 8.0, 9.0, 12.0, 13.0, 15.0, 18.0)
    assert turns.without_s == (4.0, 5.0, 7.0, 10.0, 11.0, 14.0, 16.0, 17.0)


def test_costs_are_shares_of_the_time_and_of_the_rate(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns((2.0, 2.5, 9.0), (2.0, 2.0, 1.0))
    step = Row("step", {}, Unit.MILLISECONDS, 2.0)
    copies = Row("copies", {}, Unit.RATE, 1.0, 10**10)
    for row in (step, copies):
        found = row.measured(bench, turns, "eager")
        assert found.percent_of_ceiling == pytest.approx(80.0)
        assert found.subject.note == "eager; checksums cost 20.00 %"
        assert found.subject.target_percent is None  # not on a CPU
        assert found.ceiling is not None and found.ceiling.name == "without comparing"
    assert step.measured(bench, turns).figures == Figures(2500.0, 2050.0, 8350.0, 3)
    monkeypatch.setattr(Run, "aim", lambda _, value: value)
    for row, most in ((step, 98.0), (copies, 99.0)):
        found = row.measured(bench, turns)
        assert (found.subject.target_percent, found.meets_aim) == (most, False)
        assert row.measured(bench, Turns((1.0, 1.005), (1.0, 1.0))).meets_aim is True
    rate = Row("kernel", {}, Unit.RATE, None, 10**10).measured(bench, turns)
    assert (rate.subject.note, rate.subject.target_percent, rate.meets_aim) == ("", None, None)
    assert rate.figures is not None and rate.figures.median == pytest.approx(4.0)


# ---- both sides -----------------------------------------------------------------------------------


def test_half_of_the_turns_compare_nothing(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device sums and compares with the switch on, and never with it off."""
    seen: dict[bool, int] = {True: 0, False: 0}
    sides: list[PageSums] = []
    make = PageSums.__init__

    def remember(sums: PageSums, *arguments: Any, **options: Any) -> None:
        make(sums, *arguments, **options)
        sides.append(sums)

    for name in ("sum_slices", "verify_slices"):
        real = getattr(CpuDevice, name)

        def counted(device: CpuDevice, *arguments: Any, real: Any = real) -> None:
            seen[sides[-1].verifies] += 1
            real(device, *arguments)

        monkeypatch.setattr(CpuDevice, name, counted)
    monkeypatch.setattr(PageSums, "__init__", remember)
    found = results(checksum_steps.rows, bench)
    assert seen[True] > 20 and seen[False] == 0
    assert len(sides) == 1 and sides[0].verifies
    assert all(result.figures is not None for result in found.values())


def test_comparing_is_on_again_after_an_error(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[bool] = []
    field = checksum_steps._Field

    def fails(self: Any) -> Turns:
        def run() -> float:
            if not self._core.mover.sums.verifies:
                raise TierMemError("in a turn without")
            return 1.0

        try:
            return self._in_turns(run)  # type: ignore[no-any-return]
        finally:
            sides.append(self._core.mover.sums.verifies)

    monkeypatch.setattr(field, "streamed", fails)
    with pytest.raises(TierMemError, match="in a turn without"):
        list(checksum_steps.rows(bench))
    assert sides == [True]


def test_what_was_left_unchecked_never_counts_as_intact(tmp_path: Path) -> None:
    layout = TINY.layout
    store = ColdStore(tmp_path / "s", layout, 64 << 20, "threads", 30.0)
    memory = np.zeros(2 * layout.slot_bytes + 4096, dtype=np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 4096
    at = start + np.arange(2, dtype=np.int64) * layout.slot_bytes
    slots = np.arange(2, dtype=np.int64)
    try:
        checksum_store._wait([store.write(slots, at, [None, None])])
        for leave in (StoreTransfer.leave_unchecked, lambda _: None):
            transfer = store.read(slots, at)
            leave(transfer)
            checksum_store._wait([transfer])
            assert (
                store.verify(transfer).tolist() == [leave is not StoreTransfer.leave_unchecked] * 2
            )
    finally:
        store.close()


# ---- comparisons that find nothing ----------------------------------------------------------------


def _nothing(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("rows", "place", "name", "instead", "error", "words"),
    [
        (checksum_steps.rows, PageSums, "verify", _nothing, InvariantError, r"found the pages \[\[\], \[\]\]"),
        (checksum_steps.rows, CpuDevice, "verify_slices", lambda _, slices, *__: slices.marks.fill_(1),
         TierMemError, "not what was written there"),
        (checksum_store.rows, StoreTransfer, "leave_unchecked", _nothing, InvariantError,
         "128 pages were compared where none was to be"),
        (checksum_store.rows, checksum_store, "_change", _nothing, InvariantError,
         "of one damaged page on the SSD 0 were found"),
        (checksum_store.rows, StoreTransfer, "intact", lambda transfer: np.zeros(len(transfer.slots), np.bool_),
         CorruptPageError, "128 pages came back damaged"),
    ],
)  # fmt: skip
def test_a_comparison_that_does_not_find_what_is_there_fails(
    bench: Run,
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
    place: Any,
    name: str,
    instead: Any,
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(Run, "pick", lambda *_, **__: 1 << 20)
    monkeypatch.setattr(place, name, instead)
    with pytest.raises(error, match=words):
        list(rows(bench))


def test_sums_that_differ_between_instructions_fail(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checksum_rates._core.checksum
    wrong = checksum_rates._core.ChecksumPath.AUTO
    monkeypatch.setattr(
        checksum_rates._core,
        "checksum",
        lambda at, size, path: real(at, size, path) ^ (path is wrong),
    )
    with pytest.raises(InvariantError, match="different sums"):
        list(checksum_rates.rows(bench))


# ---- machines that lack something -----------------------------------------------------------------


def test_without_room_in_memory_tiers_are_skipped(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("gpu=8GiB: only 1GiB is free")

    monkeypatch.setattr(checksum_steps, "TierManager", refuse)
    found = results(checksum_steps.rows, bench)
    assert len(found) == 3
    assert {result.skipped for result in found.values()} == {"gpu=8GiB: only 1GiB is free"}
    assert all(result.figures is None for result in found.values())


def test_without_room_on_the_disk_it_is_skipped(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = disk.shutil.disk_usage(bench.directory)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    monkeypatch.setattr(checksum_store, "ColdStore", lambda *_: pytest.fail("wrote"))
    found = results(checksum_store.rows, bench)
    assert set(found) == {"reads from the SSD", "writes to the SSD"}
    assert all("10485760 bytes are free" in (each.skipped or "") for each in found.values())


def test_without_a_gpu_its_kernel_is_skipped(bench: Run) -> None:
    found = results(checksum_rates.rows, bench)
    assert found["kernel on the GPU"].skipped == "needs a GPU"
    cpu = found["function on the CPU, one thread"]
    assert cpu.figures is not None and cpu.ceiling is not None
    assert cpu.ceiling.name == "a loop that only reads"


# ---- the command ----------------------------------------------------------------------------------


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(capsys)
    for name in ("checksums", "copy"):
        ran = cli("bench", name, "--help")
        assert ran.code == 0
        assert f"tiermem bench {name} --quick --device cpu" in ran.out


@pytest.mark.gpu
def test_the_kernel_finds_damage_on_a_gpu(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiermem.device.discovery import open_device

    device, _ = open_device("cuda")
    on_gpu = Run(device, Scale.QUICK, bench.ceilings, bench.directory, 1 << 20, lambda _: None)
    monkeypatch.setattr(Run, "pick", lambda *_, **__: 8 << 20)
    try:
        layout = PageLayout(8, 2, 128, "float16", 128)
        turns = checksum_rates._kernel(on_gpu, layout, 8 * layout.page_bytes)
        assert len(turns.with_s) == len(turns.without_s) == 2 * on_gpu.repeats
        monkeypatch.setattr(type(device), "verify_slices", _nothing)
        with pytest.raises(InvariantError, match="of one damaged page the kernel found 0"):
            checksum_rates._kernel(on_gpu, layout, 8 * layout.page_bytes)
    finally:
        torch.cuda.synchronize()
        device.close()
