"""Forecasts of steps that the CPU shares: sums made by hand, and what is assumed where nothing was measured."""

from __future__ import annotations

import pytest
from forecast_cases import ROUND, ask, work

from tiermem.configfile import read_table
from tiermem.errors import ConfigError
from tiermem.forecast import Hardware, WeightFormat
from tiermem.forecast.hardware import complete, machine_profiles
from tiermem.forecast.speed import Limit, Mode, shared_time, step_time
from tiermem.ram_split import SplitRates
from tiermem.rates import Rates

# Round rates of both beside each other: 5 GB/s and 20 GB/s.
SPLIT = SplitRates(link=5e9, cpu=20e9, link_alone=10e9)
RESIDENT = {"kv_bytes": 25 * 10**8, "streamed_bytes": 20 * 10**8}
"""2.5 GB of K and V, of which 0.5 GB are on the GPU: 1 ms and 0.1 ms, beside 20 ms of weights."""


def test_a_step_that_the_cpu_shares_worked_out_by_hand() -> None:
    step = shared_time(work(**RESIDENT), ROUND, SPLIT)
    # kernels: 10 x (4 x 3 + 14 x 1.8 + 21 x 2) us = 0.792 ms; hand-overs: 10 x 0.1 ms
    before_s = 20e-3 + 1e-3 + 1e-4 + 0.792e-3 + 1e-3
    # 2 GB: 0.4 s by the link, 0.1 s by the CPU
    share = (0.4 - before_s) / 0.5
    assert step.shared is not None
    assert step.shared.share == pytest.approx(share)
    assert step.shared.before_s == pytest.approx(before_s)
    assert step.shared.hand_over_s == pytest.approx(1e-3)
    assert step.shared.attended_bytes == pytest.approx(share * 2e9)
    assert step.link_s == pytest.approx((1 - share) * 0.4)
    assert step.cpu_s == pytest.approx(step.link_s)
    assert step.total_s == pytest.approx(1e-4 + step.link_s)
    assert step.attention_s == pytest.approx((2.5e9 - share * 2e9) / 5e11 + 1e-4)
    assert step.limit is Limit.LINK_AND_CPU
    assert step.mode is Mode.SHARED


def test_a_step_that_the_link_ends_behind_the_gpu_is_not_shared() -> None:
    step = shared_time(work(kv_bytes=25 * 10**7, streamed_bytes=10**8), ROUND, SPLIT)
    assert step.shared is not None
    assert (step.shared.share, step.cpu_s) == (0, 0)
    fixed = step_time(Mode.FIXED, work(kv_bytes=25 * 10**7, streamed_bytes=10**8), ROUND)
    assert step.total_s == pytest.approx(fixed.total_s)
    assert step.limit is fixed.limit


def test_bytes_of_the_ssd_cross_the_link_and_are_read_before() -> None:
    cold = work(kv_bytes=25 * 10**8, streamed_bytes=20 * 10**8, cold_bytes=10**9)
    step = shared_time(cold, ROUND, SplitRates(link=5e9, cpu=20e9))
    # more than the CPU can help with: it attends all of RAM, the link streams the SSD's
    assert step.shared is not None
    assert step.shared.share == 1
    assert step.shared.attended_bytes == cold.ram_bytes == 10**9
    assert step.link_s == pytest.approx(0.2)
    assert step.disk_s == pytest.approx(1.0)
    assert step.total_s == pytest.approx(1e-4 + 0.2 + 1.0)
    assert step.limit is Limit.DISK


def test_a_cpu_that_does_it_all_limits_the_step() -> None:
    lame = SplitRates(link=1e6, cpu=5e9, cpu_alone=10e9)
    step = shared_time(work(**RESIDENT), ROUND, lame)
    assert step.shared is not None
    assert step.shared.share == 1
    assert step.link_s == 0
    assert step.shared.attend_s == pytest.approx(0.2)  # nothing streams beside it
    assert step.limit is Limit.CPU


def test_a_shared_step_is_never_slower_than_streaming() -> None:
    for gpu in ("2GiB", "8GiB", "24GiB", "30GiB"):
        for machine in ("h200", "h100", "a100", "a10"):
            modes = ask(machine, context=131072, gpu=gpu, weights=WeightFormat.INT4).modes
            times = {step.mode: step.total_s for step in modes}
            if Mode.SHARED in times:
                assert times[Mode.SHARED] <= times[Mode.FIXED] * (1 + 1e-9)


def test_the_reference_request_is_predicted_as_a_study_measured_it() -> None:
    # 33B, 128K, 8 GiB hot: 165 to 210 ms with fp16 pages, by the host; streaming alone 462 ms
    shared, fixed, _ = ask("h200", context=131072, gpu="8GiB", ram="48GiB").modes
    assert 0.165 < shared.total_s < 0.210
    assert fixed.total_s == pytest.approx(0.462, rel=0.05)
    assert shared.shared is not None
    assert 0.5 < shared.shared.share < 0.66


# ---- rates that were not measured ----------------------------------------------------------------


def test_attention_on_the_cpu_is_assumed_from_what_ram_and_link_do() -> None:
    given = {
        "hbm_read": 1e12,
        "matmul": 1e14,
        "link_to_device": 2e10,
        "link_to_host": 2e10,
        "disk_read": 1e9,
    }
    full = complete(Rates(**given, ram_read=4e10))
    assert full.split("float16") == SplitRates(1.8e10, 2.2e10, 2e10, 3e10)
    assert full.split("bfloat16") == full.split("float16")
    # RAM that reads all the link takes and more: as fast as alone
    assert complete(Rates(**given, ram_read=1e11)).split("float16") == SplitRates(
        1.8e10, 7.5e10, 2e10, 7.5e10
    )
    # nothing is left beside the link, or nothing is known of RAM: no such mode
    assert complete(Rates(**given, ram_read=1.7e10)).split("float16") is None
    assert complete(Rates(**given)).split("float16") is None
    # what was measured is not mixed with what is assumed
    assert complete(Rates(**given, ram_read=4e10, cpu_attend_fp16=1e10)).split("float16") is None


def test_what_is_estimated_of_a_machine_is_said() -> None:
    estimated = ask("t4", model="7b", context=65536, weights=WeightFormat.INT8)
    assert any("is an estimate" in note for note in estimated.notes)
    assert estimated.hardware.estimated == {
        "cpu_attend_fp16", "cpu_attend_fp16_beside", "link_beside_fp16",
    }  # fmt: skip
    measured = ask("h200", gpu="4GiB")
    assert measured.hardware.estimated == frozenset()
    assert not any("estimate" in note for note in measured.notes)
    assert len(Hardware.from_profile("a100").estimated) == 6
    table = read_table(machine_profiles()["t4"])
    with pytest.raises(ConfigError, match=r"estimated='ram_read'"):
        Hardware._from_table("t4", {**table, "estimated": ["ram_read"]})
