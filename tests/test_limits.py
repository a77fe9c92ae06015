"""Limits of routes: taken from the calibration, shown beside the rates, missing where nothing was measured."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiermem import PageLayout, TierConfig, TierManager, _core, calibration, guarded_io
from tiermem._core import EngineKind
from tiermem.attention.queued import QueuedAttention
from tiermem.calibration import Calibration, DiskPlace
from tiermem.cli.manager_text import attended_text, flow_table
from tiermem.cli.snapshot import read_stats
from tiermem.device.copy_rates import CopyCase, CopyMethod, CopyRate, CopyRates
from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Direction
from tiermem.device.simulated import SimulatedDevice
from tiermem.disk_rates import DiskOptions, DiskRate, DiskRates
from tiermem.limits import (
    attended_limit,
    calibration_of,
    route_limits,
    share_at_start,
    split_rates,
)
from tiermem.machine import Machine
from tiermem.measure.ceilings import Ceilings, Effort
from tiermem.pools import Tier
from tiermem.ram_attention import StepBytes
from tiermem.ram_split import SplitRates
from tiermem.rates import Rates
from tiermem.stats import FlowStats

THREADS = DiskOptions(EngineKind.THREADS, 1 << 20, 8)
URING = DiskOptions(EngineKind.IO_URING, 1 << 20, 16)
DISK = DiskRates(True, 4.0, 3.0, 2.0, (DiskRate(THREADS, 4.0, 3.0), DiskRate(URING, 4.0, 2.0)))
RATES = Rates(link_to_device=50e9, link_to_host=40e9, hbm_copy=4e12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERMEM_CACHE_DIR", str(tmp_path / "cache"))


def made(path: Path) -> Calibration:
    disk = DiskPlace.at(path, time.time(), DISK)
    return Calibration(Machine.here(None), time.time(), False, RATES, (disk,))


def test_a_route_is_as_fast_as_its_slowest_part(tmp_path: Path) -> None:
    assert route_limits(made(tmp_path), tmp_path) == {
        (Tier.RAM, Tier.GPU): 50, (Tier.GPU, Tier.RAM): 40, (Tier.SSD, Tier.RAM): 4,
        (Tier.RAM, Tier.SSD): 3, (Tier.SSD, Tier.GPU): 4, (Tier.GPU, Tier.SSD): 3,
        (Tier.GPU, Tier.GPU): 2000,
    }  # fmt: skip


def test_what_was_not_measured_has_no_limit(tmp_path: Path) -> None:
    assert route_limits(None, tmp_path) == {}
    limits = route_limits(made(tmp_path), None)
    assert set(limits) == {(Tier.RAM, Tier.GPU), (Tier.GPU, Tier.RAM), (Tier.GPU, Tier.GPU)}


def test_a_simulated_device_is_not_calibrated(tmp_path: Path) -> None:
    calibration.save(made(tmp_path))
    assert calibration_of(SimulatedDevice()) is None
    assert calibration_of(CpuDevice()) == calibration.load(Machine.here(None)).calibration


@pytest.mark.parametrize(
    ("engine", "wanted"), [("auto", THREADS), ("threads", THREADS), ("uring", URING)]
)
def test_the_disk_is_used_in_the_way_that_was_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, wanted: DiskOptions
) -> None:
    used = []

    def open_engine(options: DiskOptions) -> _core.IoEngine:
        used.append(options)
        return _core.IoEngine(EngineKind.THREADS)

    monkeypatch.setattr(guarded_io, "open_engine", open_engine)
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
    config = TierConfig(
        gpu="16KiB", ram=0, ssd="4MiB", ssd_path=tmp_path / "store", device="cpu", io_engine=engine
    )
    with TierManager(layout, config):
        assert used == []  # nothing was measured
    calibration.save(made(tmp_path))
    with TierManager(layout, config):
        assert used == [wanted]


class ManyWays(CpuDevice):
    """A device that can copy in several ways."""

    copy_rates: CopyRates | None = None
    copy_method: CopyMethod | None = None


def test_a_manager_hands_its_device_what_was_measured_of_copies(tmp_path: Path) -> None:
    case = CopyCase(Direction.HOST_TO_DEVICE, False, 1 << 16, 1)
    copies = CopyRates((CopyRate(case, CopyMethod.KERNEL, 51.0),))
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
    config = TierConfig(gpu="16KiB", ram=0, ssd=0)
    device = ManyWays()
    with TierManager(layout, config, device=device):
        assert device.copy_rates is None
    calibration.save(replace(made(tmp_path), copies=copies))
    device = ManyWays()
    with TierManager(layout, config, device=device):
        assert device.copy_rates == copies


def test_the_link_is_measured_by_the_drivers_copies_alone() -> None:
    device = ManyWays()
    device.copy_method = CopyMethod.KERNEL
    seen = []

    def copy(*_arguments: object) -> None:
        seen.append(device.copy_method)

    device.copy = copy  # type: ignore[method-assign]
    with Ceilings(device, Effort(1 << 20, 1 << 20, 1)) as ceilings:
        ceilings.link_rate(Direction.HOST_TO_DEVICE)
    assert set(seen) == {CopyMethod.SINGLE}
    assert device.copy_method is CopyMethod.KERNEL


def test_a_manager_shows_its_rates_as_shares(tmp_path: Path) -> None:
    calibration.save(made(tmp_path))
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
    config = TierConfig(gpu="16KiB", ram="64KiB", ssd=0, device="cpu", high_watermark=1.0)
    with TierManager(layout, config) as tm:
        sequence = tm.open_sequence()
        kv = torch.rand(128, 1, 16)
        with tm.step([sequence], 128) as step:
            step.append(0, kv, kv)
        tm.poll()
        stats = tm.stats()
        flow = next(flow for flow in stats.flows if (flow.src, flow.dst) == ("GPU", "RAM"))
    assert flow.limit_gb_per_s == 40
    read = read_stats(stats.to_json())
    assert read == stats


def test_shares_are_shown_and_old_figures_are_read() -> None:
    flow = FlowStats("RAM", "GPU", 10**9, 3, 0, 45.0, 0, 50.0)
    assert flow.share_of_limit == 0.9
    assert "90.0%" in "\n".join(flow_table([flow]).lines())
    assert FlowStats("RAM", "GPU", 0, 0, 0, 0.0, 0, 50.0).share_of_limit is None
    assert FlowStats("RAM", "GPU", 10**9, 3, 0, 45.0, 0).share_of_limit is None


# ---- the CPU's share ------------------------------------------------------------------------------

SHARED = Rates(
    link_to_device=55e9, ram_read=160e9, cpu_attend_fp16=120e9, cpu_attend_fp16_beside=100e9,
    link_beside_fp16=50e9, cpu_attend_bf16=110e9, cpu_attend_bf16_beside=75e9,
    link_beside_bf16=50e9, cpu_attend_threads=4,
)  # fmt: skip


def calibrated(rates: Rates) -> Calibration:
    return Calibration(Machine.here(None), time.time(), False, rates)


def test_pages_of_each_dtype_have_their_rates() -> None:
    found = calibrated(SHARED)
    assert split_rates(found, "float16", 4) == SplitRates(50e9, 100e9, 55e9, 120e9)
    assert split_rates(found, "bfloat16", 4) == SplitRates(50e9, 75e9, 55e9, 110e9)
    assert split_rates(found, "float32", 4) == split_rates(found, "float16", 4)


def test_fewer_threads_attend_slower_and_more_do_not_attend_faster() -> None:
    found = calibrated(SHARED)
    assert split_rates(found, "float16", 2) == SplitRates(50e9, 50e9, 55e9, 60e9)
    assert split_rates(found, "float16", 9) == split_rates(found, "float16", 4)


def test_without_a_measurement_there_are_no_rates() -> None:
    assert split_rates(None, "float16", 4) is None
    alone = Rates(cpu_attend_fp16=120e9, cpu_attend_threads=4)  # of a machine without a GPU
    assert split_rates(calibrated(alone), "float16", 4) is None
    assert share_at_start(None) == 0
    assert attended_limit(None) is None
    assert attended_limit(calibrated(alone)) is None
    assert attended_limit(calibrated(SHARED)) == 160


def test_the_share_at_the_start_is_that_of_the_rates() -> None:
    assert share_at_start(split_rates(calibrated(SHARED), "float16", 4)) == pytest.approx(2 / 3)
    assert share_at_start(split_rates(calibrated(SHARED), "bfloat16", 4)) == pytest.approx(0.6)
    slow_cpu = replace(
        SHARED, cpu_attend_fp16=2e9, cpu_attend_fp16_beside=1e9
    )  # takes more than it adds
    assert share_at_start(split_rates(calibrated(slow_cpu), "float16", 4)) == 0


@pytest.mark.parametrize(
    ("share", "rates", "wanted"),
    [
        (None, SHARED, 2 / 3), (None, RATES, None), (None, None, None), (0.25, SHARED, 0.25),
        (0.25, None, 0.25), (0, SHARED, None), (1, SHARED, 1.0),
    ],
)  # fmt: skip
def test_beside_a_device_the_share_is_chosen_where_none_was_given(
    monkeypatch: pytest.MonkeyPatch,
    share: float | None,
    rates: Rates | None,
    wanted: float | None,
) -> None:
    """On any device but the CPU; a simulated one here."""
    found = None if rates is None else calibrated(rates)
    monkeypatch.setattr("tiermem.manager.calibration_of", lambda _device: found)
    monkeypatch.setattr("tiermem.build.cpus_beside_gpu", lambda: 4)
    monkeypatch.setattr("tiermem.build.QueuedAttention", one_thread_queue)
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float16", page_tokens=16)
    config = TierConfig(gpu="16KiB", ram="32KiB", cpu_share=share)
    with TierManager(layout, config, device=SimulatedDevice(total_bytes=1 << 28)) as manager:
        ram = manager._core.ram
        found = None if ram is None else ram.policy.fraction(StepBytes(1 << 30, 0, 1))
        assert found == (None if wanted is None else pytest.approx(wanted))


def one_thread_queue(threads: int, *, deadline_s: float) -> QueuedAttention:
    """As many threads as any machine has."""
    assert threads == 4
    return QueuedAttention(1, deadline_s=deadline_s)


def test_attention_is_shown_as_a_share_of_ram_reads(tmp_path: Path) -> None:
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
    calibration.save(calibrated(replace(SHARED, ram_read=2e9)))
    config = TierConfig(gpu="16KiB", ram="32KiB", device="cpu")
    with TierManager(layout, config) as manager:
        stats = manager.stats()
    assert stats.attended_limit_gb_per_s == 2
    assert stats.attended_share_of_limit is None  # it did not attend
    half = replace(stats, attended_bytes=10**9, attended_s=1.0)
    assert half.attended_share_of_limit == 0.5
    assert read_stats(half.to_json()) == half
    assert "1.00 GB/s, 50.0% of RAM reads" in attended_text(half)
    assert replace(half, attended_limit_gb_per_s=None).attended_share_of_limit is None
