"""Timing: percentiles of repeats, what is counted and what is not."""

from __future__ import annotations

import pytest
import torch

from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Device
from tiermem.measure import timing
from tiermem.measure.timing import Samples, flusher, time_device, time_host


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_s)

    def spend(self, seconds: float) -> None:
        self.now_s += seconds


def test_percentiles() -> None:
    samples = Samples(tuple(float(i) for i in (5, 3, 1, 2, 4)))
    assert (samples.median_s, samples.best_s, samples.repeats) == (3.0, 1.0, 5)
    assert samples.p5_s == pytest.approx(1.2)
    assert samples.p95_s == pytest.approx(4.8)


def test_one_sample_is_all_its_percentiles() -> None:
    samples = Samples((0.5,))
    assert samples.median_s == samples.p5_s == samples.p95_s == samples.best_s == 0.5


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Samples(())


@pytest.mark.parametrize("on_device", [False, True])
def test_only_the_runs_after_warming_up_count(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    clock = Clock(monkeypatch)
    durations = iter([50.0, 40.0, 1.0, 2.0, 3.0])
    prepared = []

    def prepare() -> None:
        prepared.append(clock.now_s)
        clock.spend(1000.0)

    def run() -> None:
        clock.spend(next(durations))

    if on_device:
        found = time_device(CpuDevice(), run, 3, warmups=2, prepare=prepare)
    else:
        found = time_host(run, 3, warmups=2, prepare=prepare)
    assert found.times_s == (1.0, 2.0, 3.0)
    assert len(prepared) == 5


@pytest.mark.parametrize(("repeats", "warmups", "name"), [(0, 0, "repeats=0"), (1, -1, "warmups")])
def test_counts_that_cannot_be(repeats: int, warmups: int, name: str) -> None:
    for call in (
        lambda: time_host(int, repeats, warmups=warmups),
        lambda: time_device(CpuDevice(), int, repeats, warmups=warmups),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_there_is_nothing_to_flush_without_a_gpu() -> None:
    assert flusher(CpuDevice())() is None


@pytest.fixture
def gpu() -> Device:
    from tiermem.device.cuda_device import CudaDevice

    return CudaDevice(torch.cuda.current_device())


@pytest.mark.gpu
def test_time_between_events_covers_every_stream(gpu: Device) -> None:
    """A spin of known cycles on the second of two streams is in the time of both."""
    streams = [gpu.new_stream(), gpu.new_stream()]
    held = torch.cuda.ExternalStream(streams[1].handle)  # type: ignore[attr-defined]

    def spin() -> None:
        with torch.cuda.stream(held):
            torch.cuda._sleep(20_000_000)

    def nothing() -> None:
        return None

    busy = time_device(gpu, spin, 3, streams=streams)
    idle = time_device(gpu, nothing, 3, streams=streams, prepare=flusher(gpu))
    assert busy.best_s > 0.005  # at 4 GHz; no GPU is faster
    assert idle.best_s < busy.best_s
