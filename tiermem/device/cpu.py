"""CpuDevice: the device protocol on the host alone, so that the same code runs without a GPU.

Hot memory is host memory and a copy has ended when `copy` returns, so every event is done from the
start.
"""

from __future__ import annotations

import torch

from tiermem._core import move_pieces
from tiermem.device.copies import CopyBatch
from tiermem.device.host import (
    HostMemory,
    host_free_bytes,
    host_name,
    host_total_bytes,
    reporting,
    set_word,
    touch_threads,
    wait_for_word,
)
from tiermem.device.protocol import (
    COPY_TIMEOUT_S,
    Addresses,
    DeviceKind,
    Direction,
    Event,
    Memory,
    MemoryInfo,
    Progress,
    Slices,
    Stream,
)
from tiermem.device.sums import make_slices, sum_now, verify_now
from tiermem.errors import ClosedError


class CpuEvent:
    """A point in a stream whose work has always ended."""

    __slots__ = ()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def is_late(self) -> bool:
        return False


class CpuStream:
    """A queue that is always empty: work runs as it is given."""

    __slots__ = ("_device",)

    def __init__(self, device: CpuDevice) -> None:
        self._device = device

    def record(self) -> Event:
        self._device.check_open()
        return CpuEvent()

    def wait_event(self, event: Event) -> None:
        self._device.check_open()
        if not isinstance(event, CpuEvent):
            raise TypeError(f"event={event!r}: must be an event of the same device")

    def synchronize(self) -> None:
        self._device.check_open()


class CpuDevice:
    """Host memory in the part of hot memory, and copies by memmove."""

    def __init__(self) -> None:
        self._memories: set[HostMemory] = set()
        self._stream = CpuStream(self)
        self._closed = False
        self.copy_timeout_s = COPY_TIMEOUT_S

    @property
    def kind(self) -> DeviceKind:
        return DeviceKind.CPU

    @property
    def name(self) -> str:
        return host_name()

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        return None

    @property
    def staging_bytes(self) -> int:
        return 0

    def allocate(self, num_bytes: int) -> Memory:
        return self.allocate_host(num_bytes)

    def allocate_host(self, num_bytes: int, *, progress: Progress | None = None) -> Memory:
        self.check_open()
        memory = HostMemory(
            num_bytes,
            on_free=self._memories.discard,
            on_abandon=self._memories.discard,
            on_piece=reporting(num_bytes, progress),
        )
        self._memories.add(memory)
        return memory

    def new_stream(self) -> Stream:
        self.check_open()
        return CpuStream(self)

    def compute_stream(self) -> Stream:
        self.check_open()
        return self._stream

    def copy(
        self,
        direction: Direction,
        dst: Addresses,
        src: Addresses,
        num_bytes: Addresses | int,
        stream: Stream,
    ) -> None:
        self._check_stream(stream)
        batch = CopyBatch.checked(direction, dst, src, num_bytes)
        move_pieces(batch.dst, batch.src, batch.num_bytes, touch_threads())

    def slices(self, pages: Addresses, rows: Addresses, slice_bytes: int) -> Slices:
        self.check_open()
        return make_slices(pages, rows, slice_bytes)

    def sum_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._check_stream(stream)
        sum_now(slices, layers)

    def verify_slices(self, slices: Slices, layers: range, stream: Stream) -> None:
        self._check_stream(stream)
        verify_now(slices, layers)

    def write_word(self, address: int, value: int) -> None:
        self.check_open()
        set_word(address, value)

    def wait_word(self, address: int, value: int) -> None:
        self.check_open()
        wait_for_word(address, value, self.copy_timeout_s)

    def view(self, memory: Memory) -> torch.Tensor:
        self.check_open()
        return memory.tensor

    def memory_info(self) -> MemoryInfo:
        self.check_open()
        return MemoryInfo(free_bytes=host_free_bytes(), total_bytes=host_total_bytes())

    def drain(self) -> None:
        self.check_open()

    def close(self) -> None:
        self._closed = True
        for memory in list(self._memories):
            memory.free()

    def check_open(self) -> None:
        """Raise ClosedError once the device is closed."""
        if self._closed:
            raise ClosedError("the CPU device is closed")

    def _check_stream(self, stream: Stream) -> None:
        self.check_open()
        if not isinstance(stream, CpuStream):
            raise TypeError(f"stream={stream!r}: must be a stream of the same device")
