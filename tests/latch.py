"""A latch holds a GPU stream until the host lets go, so that an ordering bug fails every time.

The stream waits in front of its next work for a number in pinned memory (cuStreamWaitValue32): no
kernel spins, and none has to be compiled. While a stream is held nothing may be called that waits
for the whole GPU (cudaFree, pinning, loading a kernel for the first time), so everything is made
ready before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cuda.bindings import driver

from tiermem.device import Stream
from tiermem.device.cuda_device import CudaDevice
from tiermem.device.cuda_events import CudaStream

GIVE_UP_S = 30.0
"""A latch that nobody releases opens after this time, so that a failing test ends."""


class Latch:
    """Holds any number of a device's streams at once; lives until the device is closed."""

    def __init__(self, device: CudaDevice) -> None:
        memory = device.allocate_host(4096)
        self._device = device
        self._flag = memory.tensor[:4].view(torch.int32)
        self._flag.fill_(0)
        with device.current():
            code, self._address = driver.cuMemHostGetDevicePointer(memory.address, 0)
        assert int(code) == 0, code

    @contextmanager
    def holding(self, *streams: Stream) -> Iterator[None]:
        """Hold `streams` from now on; let go at the end or when `release` is called."""
        self._flag.fill_(0)
        watchdog = threading.Timer(GIVE_UP_S, self.release)
        watchdog.start()
        try:
            for stream in streams:
                self._hold(stream)
            yield
        finally:
            self.release()
            watchdog.cancel()

    def release(self) -> None:
        """Let all held streams go on."""
        self._flag.fill_(1)

    def _hold(self, stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        equal = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
        with self._device.current():
            (code,) = driver.cuStreamWaitValue32(stream.handle, self._address, 1, equal)
        assert int(code) == 0, code
