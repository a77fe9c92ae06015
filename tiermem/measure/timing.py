"""Timing: how long a piece of work takes, on the host's clock or between two events of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tiermem.device.protocol import Device, DeviceKind, Stream

Work = Callable[[], object]
"""What is timed; its result is not looked at."""

FLUSH_BYTES = 256 << 20
"""Written to push other data out of a GPU's L2: 4 times the 60 MB of the largest one known."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of equal repeats, seconds, in the order in which they were taken; at least one.

    Raises
    ------
    ValueError: no times.
    """

    times_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times_s:
            raise ValueError("times_s=(): must hold at least one time")

    @property
    def repeats(self) -> int:
        """How many times were taken."""
        return len(self.times_s)

    @property
    def median_s(self) -> float:
        """Half of the repeats took longer."""
        return self.percentile_s(50)

    @property
    def p5_s(self) -> float:
        """One repeat in twenty was faster."""
        return self.percentile_s(5)

    @property
    def p95_s(self) -> float:
        """One repeat in twenty took longer."""
        return self.percentile_s(95)

    @property
    def best_s(self) -> float:
        """The shortest time: what a ceiling is made of."""
        return min(self.times_s)

    def percentile_s(self, percent: float) -> float:
        """The time that `percent` of the repeats did not exceed, interpolated."""
        return float(np.percentile(self.times_s, percent))


def time_host(run: Work, repeats: int, *, warmups: int = 1, prepare: Work | None = None) -> Samples:
    """Host time of `run`, on the monotonic clock.

    Parameters
    ----------
    repeats: at least 1. warmups: runs before the first one that counts.
    prepare: called before every run, outside of its time.

    Raises
    ------
    ValueError: repeats or warmups that cannot be.
    """
    _check_counts(repeats, warmups)
    times = []
    for _ in range(warmups + repeats):
        if prepare is not None:
            prepare()
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return Samples(tuple(times[warmups:]))


def time_device(
    device: Device,
    run: Work,
    repeats: int,
    *,
    streams: Sequence[Stream] | None = None,
    warmups: int = 1,
    prepare: Work | None = None,
) -> Samples:
    """Time that the device needs for what `run` gives to `streams`, between events.

    Without a GPU, work has ended when `run` returns, and the host's clock is taken.

    Parameters
    ----------
    streams: every stream that `run` uses; torch's current one if not given. The first one's start and the
        last one's end count.
    repeats, warmups, prepare: as `time_host`; what `prepare` gives to the streams is waited for.

    Raises
    ------
    ValueError: as `time_host`. TransferError: the device reports that work failed.

    Ordering: returns when everything has ended.
    """
    if device.kind is not DeviceKind.CUDA:
        return time_host(run, repeats, warmups=warmups, prepare=prepare)
    _check_counts(repeats, warmups)
    used = list(streams) if streams is not None else [device.compute_stream()]
    times = []
    for _ in range(warmups + repeats):
        if prepare is not None:
            prepare()
            torch.cuda.synchronize(device.torch_device)
        times.append(_time_once(device, run, used))
    return Samples(tuple(times[warmups:]))


def flusher(device: Device) -> Work:
    """Pushes what is in the device's L2 out of it, as a `prepare`; does nothing without a GPU."""
    if device.kind is not DeviceKind.CUDA:
        return _nothing
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device.torch_device)
    return buffer.zero_


def _time_once(device: Device, run: Work, streams: Sequence[Stream]) -> float:
    first, *others = streams
    clock = torch_stream(device, first)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record(clock)
    begun = first.record()
    for stream in others:
        stream.wait_event(begun)
    run()
    for stream in others:
        first.wait_event(stream.record())
    end.record(clock)
    first.synchronize()
    return float(start.elapsed_time(end)) / 1000


def torch_stream(device: Device, stream: Stream) -> torch.cuda.Stream:
    """The stream as torch records events on it."""
    from tiermem.device import cuda
    from tiermem.device.cuda_events import CudaStream

    if not isinstance(stream, CudaStream):
        raise TypeError(f"stream={stream!r}: must be a stream of {device.name}")
    if stream.handle in cuda.DEFAULT_STREAMS:
        return torch.cuda.default_stream(device.torch_device)
    return torch.cuda.ExternalStream(stream.handle, device=device.torch_device)


def _check_counts(repeats: int, warmups: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    if warmups < 0:
        raise ValueError(f"warmups={warmups}: must be at least 0")


def _nothing() -> None:
    return None
