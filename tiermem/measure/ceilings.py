"""Ceilings: the rates that this machine cannot exceed, measured with the largest and simplest work there is.

Each is the median of several runs. A benchmark measures them in its own run and reports a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tiermem import _core
from tiermem.device.copy_measure import MeasurableDevice
from tiermem.device.copy_rates import CopyMethod
from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import Addresses, Device, DeviceKind, Direction, Memory
from tiermem.measure.attended import AttendedPages
from tiermem.measure.beside_link import BesideLink, HostWork, beside_link
from tiermem.measure.products import ProductCosts, product_costs
from tiermem.measure.timing import time_device, time_host

LINK_WAYS = (Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST)

Reduction = Callable[[torch.Tensor], torch.Tensor]

ROW = 1 << 14
"""Elements of 8 bytes in a row."""
COMPILED_REDUCTION = "exclusive or, in Triton"
GPU_REDUCTIONS: dict[str, Reduction] = {
    "sum of float64": lambda data: data.view(torch.float64).sum(),
    "sums of rows of float64": lambda data: data.view(torch.float64).view(-1, ROW).sum(1),
    "sums of rows of int64": lambda data: data.view(torch.int64).view(-1, ROW).sum(1),
    "largest of rows of float64": lambda data: data.view(torch.float64).view(-1, ROW).amax(1),
}
"""Ways to read everything once; which is fastest depends on the GPU and on torch's version. Of 8 bytes an element,
so that 8 GiB are one launch: more elements than 32 bits can index are split."""
CPU_REDUCTIONS: dict[str, Reduction] = {
    "largest int32": lambda part: part.view(torch.int32).amax(),
    "sum of float32": lambda part: part.view(torch.float32).sum(),
}
"""The same for host memory; torch reads with vector instructions, its threads side by side. It does not prefetch
past the borders of pages, as attention does: so there is a loop of ours as well, and the best counts."""

PASSES = 4
"""A timed run reads or copies the GPU's buffer so often, back to back, so that its start does not count."""
ROW_BYTES = 8 * ROW
"""Sizes are multiples of this, a row of the reductions by rows, and what a program of the compiled one reads."""
PATTERN = 0x3F
"""Every byte of what is read: no zeros, NaN or denormal numbers in any type."""

GPU_MATRIX_SIDE = {2: 8192, 4: 4096}
CPU_MATRIX_SIDE = {2: 256, 4: 1024}
"""Rows and columns of the square matrices, by bytes an element."""
MATRIX_PRODUCTS = 8
"""In one timed run, back to back."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: at most so many bytes of hot and of host memory, and how often."""

    hot_bytes: int
    host_bytes: int
    repeats: int


FULL = Effort(hot_bytes=8 << 30, host_bytes=4 << 30, repeats=9)
QUICK = Effort(hot_bytes=1 << 30, host_bytes=512 << 20, repeats=3)

MOST_OF_FREE = 8
"""Buffers take at most this fraction, one in 8, of the memory that is free."""


class Ceilings:
    """The ceilings of one device and its host, each measured when it is first asked for.

    A context that holds one buffer of hot and one of host memory: a GPU is up to 12 % slow for half a second
    after tens of gigabytes were freed on it, so nothing is allocated between two measurements.

    Parameters
    ----------
    device: stays the caller's. effort: FULL, or QUICK for tests and previews.

    Raises
    ------
    ConfigError: there is no room for the buffers.
    """

    def __init__(self, device: Device, effort: Effort = FULL) -> None:
        self._device = device
        self._effort = effort
        self._known: dict[tuple[object, ...], float] = {}
        self._products: dict[torch.dtype, ProductCosts] = {}
        self._beside: dict[tuple[object, ...], BesideLink] = {}
        on_gpu = device.kind is DeviceKind.CUDA
        self._reductions = {**GPU_REDUCTIONS, **_compiled()} if on_gpu else CPU_REDUCTIONS
        self._hot = device.allocate(
            _room(
                effort.hot_bytes if on_gpu else effort.host_bytes, device.memory_info().free_bytes
            )
        )
        try:
            self._host = device.allocate_host(_room(effort.host_bytes, host_free_bytes()))
        except BaseException:
            self._hot.free()
            raise
        self._streams = [device.new_stream(), device.new_stream()]
        for memory in (self._hot, self._host):
            memory.tensor.fill_(PATTERN)
        device.compute_stream().synchronize()

    def __enter__(self) -> Ceilings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the buffers back; the rates measured so far can still be asked for."""
        self._hot.free()
        self._host.free()

    @property
    def repeats(self) -> int:
        """How often everything is measured."""
        return self._effort.repeats

    def link_rate(self, direction: Direction) -> float:
        """Bytes/s of one large copy between pinned host memory and the device.

        Raises
        ------
        ValueError: a direction that does not cross the link.
        """
        if direction not in LINK_WAYS:
            raise ValueError(f"direction={direction}: must be HOST_TO_DEVICE or DEVICE_TO_HOST")
        return self._once("link", direction, measure=lambda: self._measure_link([direction]))

    def two_way_link_rate(self) -> float:
        """Bytes/s of both directions together, one large copy each, side by side."""
        return self._once("two-way link", measure=lambda: self._measure_link(list(LINK_WAYS)))

    def hbm_read_rate(self) -> float:
        """Bytes/s at which the device reads its own memory: the best of several reductions."""
        return max(self.reduction_rates().values())

    def torch_read_rate(self) -> float:
        """The same by torch's own reductions, without the one that is compiled here."""
        rates = self.reduction_rates()
        return max(rates[name] for name in rates if name != COMPILED_REDUCTION)

    def reduction_rates(self) -> dict[str, float]:
        """Bytes/s that each reduction reads of hot memory."""
        return {
            name: self._once("reduction", name, measure=partial(self._measure_hot_read, way))
            for name, way in self._reductions.items()
        }

    def hbm_copy_rate(self) -> float:
        """Bytes/s, read and written ones together, of a copy within the device's memory."""
        return self._once("hot copy", measure=self._measure_hot_copy)

    def ram_read_rate(self, threads: int) -> float:
        """Bytes/s at which `threads` threads read host memory: the best of torch's reductions and of a plain loop.

        Raises
        ------
        ValueError: `threads` is below 1.
        """
        with _threads(threads):
            return self._once("ram", threads, measure=lambda: self._measure_ram_read(threads))

    def ram_copy_rate(self, threads: int) -> float:
        """Bytes/s, read and written ones together, at which `threads` threads copy host memory.

        Raises
        ------
        ValueError: `threads` is below 1.
        """
        with _threads(threads):
            return self._once("ram copy", threads, measure=self._measure_ram_copy)

    def ram_beside_link(self, threads: int) -> BesideLink:
        """Bytes/s at which `threads` threads read host memory while the link streams to the device.

        Raises
        ------
        ValueError: `threads` is below 1, or the device copies while the host waits.
        """
        rate, data = self.ram_read_rate(threads), _halves(self._host)[1]
        works = [HostWork(way, data.numel(), rate) for way in _ways_to_read(data, threads)]
        with _threads(threads):
            return self._beside_link("ram", threads, works=works)

    def attend_rate(self, dtype: str, threads: int) -> float:
        """Bytes/s of K and V, pages of `dtype` in host memory, that `threads` threads attend for one new token.

        Raises
        ------
        ValueError: as AttendedPages.
        """
        pages = AttendedPages(_halves(self._host)[1], dtype, threads)
        return self._once("attend", dtype, threads, measure=lambda: self._measure_attention(pages))

    def attend_beside_link(self, dtype: str, threads: int) -> BesideLink:
        """The same while the link streams to the device.

        Raises
        ------
        ValueError: as AttendedPages, or the device copies while the host waits.
        """
        pages = AttendedPages(_halves(self._host)[1], dtype, threads)
        work = HostWork(pages, pages.num_bytes, self.attend_rate(dtype, threads))
        return self._beside_link("attend", dtype, threads, works=[work])

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of large square matrices of random numbers."""
        return self._once("matmul", dtype, measure=lambda: self._measure_matmul(dtype))

    def product_costs(self, dtype: torch.dtype) -> ProductCosts:
        """What the products of decoding cost, which read weights to multiply them with one row."""
        if dtype not in self._products:
            self._products[dtype] = product_costs(
                self._device, self._hot.tensor, dtype, self._effort.repeats
            )
        return self._products[dtype]

    # ---- inside ------------------------------------------------------------------------------------

    def _once(self, *key: object, measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _beside_link(self, *key: object, works: list[HostWork]) -> BesideLink:
        """The best of several ways to read host memory beside the link."""
        if self._device.kind is not DeviceKind.CUDA:
            raise ValueError(f"{self._device.name}: copies nothing beside the host")
        if key not in self._beside:
            link_rate = self.link_rate(Direction.HOST_TO_DEVICE)
            with _by_dma(self._device):
                found = [
                    beside_link(
                        self._device, self._hot, self._host, work, link_rate, self._effort.repeats
                    )
                    for work in works
                ]
            self._beside[key] = max(found, key=lambda each: each.total)
        return self._beside[key]

    def _measure_link(self, ways: list[Direction]) -> float:
        """Each way has a part of both buffers and a stream of its own."""
        part = min(self._hot.num_bytes, self._host.num_bytes) // len(LINK_WAYS)
        places = [self._place(way, i * part) for i, way in enumerate(ways)]
        streams = self._streams[: len(ways)]

        def run() -> None:
            for way, stream, (dst, src) in zip(ways, streams, places, strict=True):
                self._device.copy(way, dst, src, part, stream)

        with _by_dma(self._device):
            samples = time_device(
                self._device, run, self._effort.repeats, streams=streams, warmups=2
            )
        return len(ways) * part / samples.median_s

    def _place(self, way: Direction, offset: int) -> tuple[Addresses, Addresses]:
        hot, host = (
            np.array([memory.address + offset], dtype=np.int64)
            for memory in (self._hot, self._host)
        )
        return (hot, host) if way is Direction.HOST_TO_DEVICE else (host, hot)

    def _measure_hot_read(self, reduction: Reduction) -> float:
        data = self._hot.tensor
        return self._passes_a_second(lambda: reduction(data)) * self._hot.num_bytes

    def _measure_hot_copy(self) -> float:
        src, dst = _halves(self._hot)
        return self._passes_a_second(lambda: dst.copy_(src)) * 2 * src.numel()

    def _passes_a_second(self, one_pass: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(passes):
                one_pass()

        passes = PASSES if self._device.kind is DeviceKind.CUDA else 1
        samples = time_device(self._device, run, self._effort.repeats, warmups=2)
        return passes / samples.median_s

    def _measure_ram_read(self, threads: int) -> float:
        data = self._host.tensor
        medians = [
            time_host(way, self._effort.repeats).median_s for way in _ways_to_read(data, threads)
        ]
        return data.numel() / min(medians)

    def _measure_ram_copy(self) -> float:
        src, dst = _halves(self._host)
        samples = time_host(lambda: dst.copy_(src), self._effort.repeats)
        return 2 * src.numel() / samples.median_s

    def _measure_attention(self, pages: AttendedPages) -> float:
        return pages.num_bytes / time_host(pages, self._effort.repeats).median_s

    def _measure_matmul(self, dtype: torch.dtype) -> float:
        sides = GPU_MATRIX_SIDE if self._device.kind is DeviceKind.CUDA else CPU_MATRIX_SIDE
        side = sides[dtype.itemsize]
        make = torch.Generator(self._device.torch_device).manual_seed(0)
        a, b = (
            torch.randn(side, side, generator=make, device=self._device.torch_device).to(dtype)
            for _ in range(2)
        )
        out = torch.empty_like(a)

        def run() -> None:
            for _ in range(MATRIX_PRODUCTS):
                torch.matmul(a, b, out=out)

        samples = time_device(self._device, run, self._effort.repeats, warmups=2)
        return MATRIX_PRODUCTS * 2 * side**3 / samples.median_s


def _ways_to_read(data: torch.Tensor, threads: int) -> list[Callable[[], object]]:
    """Each reads all of `data`, with what torch was told and with threads of its own."""
    reader = _core.MemoryReader(threads)
    ways: list[Callable[[], object]] = [partial(way, data) for way in CPU_REDUCTIONS.values()]
    return [*ways, lambda: reader.sum(data.data_ptr(), data.numel())]


def _compiled() -> dict[str, Reduction]:
    """Reductions that are compiled here; only a GPU needs them."""
    from tiermem.attention.kernels.read import fold

    return {COMPILED_REDUCTION: fold}


def _room(wanted: int, free_bytes: int) -> int:
    """`wanted` bytes or what may be taken of those that are free, in whole rows for both halves."""
    room = min(wanted, free_bytes // MOST_OF_FREE)
    return max(room // (2 * ROW_BYTES), 1) * 2 * ROW_BYTES


def _halves(memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = memory.tensor.split(memory.num_bytes // 2)
    return first, second


@contextmanager
def _by_dma(device: Device) -> Iterator[None]:
    """Let a device that has several ways of copying give each copy to the driver for a while."""
    if not isinstance(device, MeasurableDevice):
        yield
        return
    before = device.copy_method
    device.copy_method = CopyMethod.SINGLE
    try:
        yield
    finally:
        device.copy_method = before


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` threads on the host for a while."""
    if threads < 1:
        raise ValueError(f"threads={threads}: must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
