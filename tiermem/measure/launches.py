"""Launches: what a kernel costs that does next to nothing, for the host and for the GPU."""

from __future__ import annotations

import torch

from tiermem.device.protocol import Device, DeviceKind
from tiermem.measure.timing import time_device, time_host

OPERATIONS = 256
"""In one timed run; fewer than a GPU's queue holds, so that the host never waits."""


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
    run = _Additions(device)
    with torch.cuda.device(device.torch_device):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return time_device(device, graph.replay, repeats, warmups=2).median_s / OPERATIONS


class _Additions:
    """OPERATIONS additions in place, each after the one before."""

    def __init__(self, device: Device) -> None:
        self._value = torch.zeros(32, device=device.torch_device)

    def __call__(self) -> None:
        for _ in range(OPERATIONS):
            self._value.add_(1)
