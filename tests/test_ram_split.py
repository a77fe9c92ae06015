"""The split of what is in RAM between link and CPU: sums made by hand, and every fraction tried."""

from __future__ import annotations

import random

import pytest

from tiermem.ram_split import Split, SplitRates, SplitWork, balance, best_split, split_time

RATES = SplitRates(link=50e9, cpu=100e9)
GB = 1e9


def test_a_step_without_anything_else_is_split_by_the_rates() -> None:
    # 30 GB at 150 GB/s together, two thirds of it by the CPU
    found = best_split(SplitWork(30 * GB), RATES)
    assert found.fraction == pytest.approx(2 / 3)
    assert found.step_s == pytest.approx(0.2)


def test_the_cpu_gets_less_where_it_waits_for_queries() -> None:
    # the link has 0.6 s of work, the CPU 0.3 s and 0.03 s of waiting:
    # f = (0.6 - 0.024 - 0.006) / 0.9, and the link streams 11 of 30 GB
    work = SplitWork(30 * GB, gpu_s=0.024, hand_over_s=60 * 1e-4)
    found = best_split(work, RATES)
    assert found.fraction == pytest.approx(0.57 / 0.9)
    assert found.step_s == pytest.approx(11 / 50)
    assert found.step_s == pytest.approx(0.03 + 19 / 100)


def test_bytes_of_the_ssd_take_the_links_time() -> None:
    # 6 GB for the link alone, then 24 GB of RAM: f = (0.6 - 0) / (0.48 + 0.24)
    found = best_split(SplitWork(24 * GB, cold_bytes=6 * GB), RATES)
    assert found.fraction == pytest.approx(0.6 / 0.72)
    assert found.step_s == pytest.approx(0.2)
    # so many that the CPU has done all of RAM before: the link decides
    far = best_split(SplitWork(GB, cold_bytes=50 * GB), RATES)
    assert far == Split(1.0, pytest.approx(1.0))


def test_the_cpu_gets_nothing_where_the_gpu_takes_longer_than_the_link() -> None:
    assert best_split(SplitWork(GB, gpu_s=0.03), RATES) == Split(0.0, 0.03)
    assert best_split(SplitWork(GB, hand_over_s=0.03), RATES) == Split(0.0, pytest.approx(0.02))
    assert best_split(SplitWork(0), RATES) == Split(0.0, 0.0)
    assert best_split(SplitWork(0, cold_bytes=5 * GB, gpu_s=0.01), RATES) == Split(
        0.0, pytest.approx(0.1)
    )


def test_one_that_is_faster_alone_than_both_together_stays_alone() -> None:
    slow_beside = SplitRates(link=10e9, cpu=10e9, link_alone=25e9, cpu_alone=12e9)
    assert best_split(SplitWork(GB), slow_beside) == Split(0.0, pytest.approx(0.04))
    slow_link = SplitRates(link=1e9, cpu=10e9, link_alone=1e9, cpu_alone=20e9)
    assert best_split(SplitWork(GB), slow_link) == Split(1.0, pytest.approx(0.05))


def test_rates_alone_are_never_below_those_beside() -> None:
    noisy = SplitRates(link=50e9, cpu=100e9, link_alone=40e9, cpu_alone=90e9)
    assert (noisy.only_link, noisy.only_cpu) == (50e9, 100e9)
    assert (RATES.only_link, RATES.only_cpu) == (50e9, 100e9)


@pytest.mark.parametrize("seed", range(20))
def test_no_fraction_is_better(seed: int) -> None:
    make = random.Random(seed)
    for _ in range(50):
        link, cpu = (10 ** make.uniform(9, 11.5) for _ in range(2))
        rates = SplitRates(
            link, cpu,
            make.choice([None, link * make.uniform(1, 1.5)]),
            make.choice([None, cpu * make.uniform(1, 1.5)]),
        )  # fmt: skip
        work = SplitWork(
            ram_bytes=make.choice([0.0, 10 ** make.uniform(6, 11)]),
            cold_bytes=make.choice([0.0, 10 ** make.uniform(6, 11)]),
            gpu_s=make.choice([0.0, 10 ** make.uniform(-4, 0)]),
            hand_over_s=make.choice([0.0, 10 ** make.uniform(-4, -1)]),
        )
        found = best_split(work, rates)
        assert 0 <= found.fraction <= 1
        assert found.step_s == split_time(work, rates, found.fraction)
        tried = [split_time(work, rates, i / 1000) for i in range(1001)]
        assert found.step_s <= min(tried) * (1 + 1e-12)
        # and nothing is given away between two of the fractions that were tried
        slope_s = work.ram_bytes * (1 / link + 1 / cpu)
        assert found.step_s >= min(tried) - slope_s / 1000
        if 0 < found.fraction < 1:
            assert found.fraction == balance(work, rates)
            attended = found.fraction * work.ram_bytes
            streamed = work.ram_bytes + work.cold_bytes - attended
            cpu_s = work.gpu_s + work.hand_over_s + attended / cpu
            assert cpu_s == pytest.approx(streamed / link)


@pytest.mark.parametrize("name", ["link", "cpu", "link_alone", "cpu_alone"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rates_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        SplitRates(**{"link": 1.0, "cpu": 1.0, name: value})


@pytest.mark.parametrize("name", ["ram_bytes", "cold_bytes", "gpu_s", "hand_over_s"])
def test_work_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1"):
        SplitWork(**{"ram_bytes": 1.0, name: -1.0})
