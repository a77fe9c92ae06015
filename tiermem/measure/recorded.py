"""Recorded: work on torch's current stream that is launched as one CUDA graph where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tiermem.device.capture import capture
from tiermem.device.protocol import Device, DeviceKind

WARMUPS = 3


class Recorded:
    """`body` captured once and replayed; without a GPU `body` runs anew each time.

    What the body returns by side effect, such as tensors, stays valid and is filled anew by each replay.
    """

    def __init__(self, device: Device, body: Callable[[], object]) -> None:
        self._body = body
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.kind is not DeviceKind.CUDA:
            return
        side = torch.cuda.Stream(device.torch_device)
        side.wait_stream(torch.cuda.current_stream(device.torch_device))
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):  # kernels are compiled before the capture
                body()
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, stream=side):
            body()

    def replay(self) -> None:
        """Launch it all; does not wait."""
        if self._graph is None:
            self._body()
        else:
            self._graph.replay()
