"""Launches: what a kernel costs that does next to nothing, for the host and for the GPU."""

from __future__ import annotations

import torch

from tiermem.device.protocol import Device, DeviceKind
from tiermem.measure.recorded import Recorded
from tiermem.measure.timing import Samples, time_device, time_host

OPERATIONS = 256
"""In one timed run; fewer than a GPU's queue holds, so that the host never waits."""
BLOCKING_SIDE, BLOCKING_PRODUCTS = 8192, 8
"""Products that keep a GPU busy for longer than the host needs to launch the operations: 11 ms on an H200."""


def launch_time_s(device: Device, repeats: int) -> float:
    """Host time of one torch operation on next to nothing, given to the device one by one."""
    run = _Additions(device)
    samples = time_host(run, repeats, warmups=2, prepare=device.compute_stream().synchronize)
    device.compute_stream().synchronize()
    return samples.median_s / OPERATIONS


def kernel_time_s(device: Device, repeats: int) -> float | None:
    """GPU time of one kernel on next to nothing in a CUDA graph; None without a GPU."""
    if device.kind is not DeviceKind.CUDA:
        return None
    recorded = Recorded(device, _Additions(device))
    return time_device(device, recorded.replay, repeats, warmups=2).median_s / OPERATIONS


def queued_kernel_time_s(device: Device, repeats: int) -> float | None:
    """GPU time of one such kernel launched by itself, long before the GPU comes to it; None without a GPU."""
    if device.kind is not DeviceKind.CUDA:
        return None
    where = device.torch_device
    run = _Additions(device)
    block = torch.randn(BLOCKING_SIDE, BLOCKING_SIDE, device=where).half()
    out = torch.empty_like(block)
    times = []
    for _ in range(repeats + 1):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for _ in range(BLOCKING_PRODUCTS):
            torch.matmul(block, block, out=out)
        start.record(torch.cuda.current_stream(where))
        run()
        end.record(torch.cuda.current_stream(where))
        device.compute_stream().synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return Samples(tuple(times[1:])).median_s / OPERATIONS


class _Additions:
    """OPERATIONS additions in place, each after the one before."""

    def __init__(self, device: Device) -> None:
        self._value = torch.zeros(32, device=device.torch_device)

    def __call__(self) -> None:
        for _ in range(OPERATIONS):
            self._value.add_(1)
