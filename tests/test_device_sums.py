"""Checksums of slices on every device, against the native function, in the order of streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tiermem import _core
from tiermem.device import Device, Direction, Memory
from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Slices
from tiermem.device.simulated import SimulatedDevice
from tiermem.errors import ClosedError

NUM_PAGES, NUM_LAYERS = 7, 3
EVERY = range(NUM_LAYERS)


def _open_cuda() -> Device:
    from tiermem.device.cuda_device import CudaDevice

    return CudaDevice(0)


DEVICES: dict[str, Callable[[], Device]] = {
    "cpu": CpuDevice,
    "simulated": lambda: SimulatedDevice(seed=31),
    "simulated-lazy": lambda: SimulatedDevice(seed=32, eagerness=0.0),
    "cuda": _open_cuda,
}


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.gpu) if n == "cuda" else n for n in DEVICES]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    opened = DEVICES[request.param]()
    yield opened
    opened.close()


class Pages:
    """Random pages in hot memory, in another order than their rows of sums in host memory."""

    def __init__(self, device: Device, slice_bytes: int) -> None:
        self.device, self.slice_bytes = device, slice_bytes
        self.page_bytes = NUM_LAYERS * slice_bytes
        self.hot = device.allocate(NUM_PAGES * self.page_bytes)
        self.host = device.allocate_host(self.hot.num_bytes)
        self.table = device.allocate_host(NUM_PAGES * NUM_LAYERS * 8)
        random = np.random.default_rng(slice_bytes)
        data = random.integers(0, 256, self.hot.num_bytes, dtype=np.uint8)
        self.host.tensor.copy_(torch.from_numpy(data))
        self.order = random.permutation(NUM_PAGES)
        self.sums = self.table.tensor.numpy().view(np.uint64).reshape(NUM_PAGES, NUM_LAYERS)
        self.sums[:] = 0

    def expected(self) -> np.ndarray:
        """Of the host's pages, in the order of the rows."""
        sources = self.host.address + self.order * self.page_bytes
        return _core.checksum_pages(sources, self.slice_bytes, NUM_LAYERS)

    def upload(self) -> None:
        """Give a stream of its own the copy, and let the compute stream wait for it."""
        stream = self.device.new_stream()
        src, dst = (np.array([m.address]) for m in (self.host, self.hot))
        self.device.copy(Direction.HOST_TO_DEVICE, dst, src, self.hot.num_bytes, stream)
        self.device.compute_stream().wait_event(stream.record())

    def slices(self) -> Slices:
        rows = self.table.address + np.arange(NUM_PAGES) * NUM_LAYERS * 8
        return self.device.slices(
            self.hot.address + self.order * self.page_bytes, rows, self.slice_bytes
        )

    def free(self) -> None:
        memories: list[Memory] = [self.hot, self.host, self.table]
        for memory in memories:
            memory.free()


@pytest.mark.parametrize("slice_bytes", [16, 1040, 16 << 10, (64 << 10) + 4096])
def test_sums_are_stored_and_found_again(device: Device, slice_bytes: int) -> None:
    pages = Pages(device, slice_bytes)
    pages.upload()
    slices, compute = pages.slices(), device.compute_stream()
    device.sum_slices(slices, EVERY, compute)
    device.verify_slices(slices, EVERY, compute)
    compute.record().wait()
    assert np.array_equal(pages.sums, pages.expected())
    assert not slices.marked().any()
    pages.sums[3, 2] ^= np.uint64(1)
    device.verify_slices(slices, EVERY, compute)
    compute.record().wait()
    assert slices.marked().tolist() == [0, 0, 0, 3, 0, 0, 0]
    pages.free()


def test_a_flipped_bit_is_found(device: Device) -> None:
    pages = Pages(device, 4096)
    pages.sums[:] = pages.expected()
    where = int(pages.order[4]) * pages.page_bytes + 4096 + 77
    pages.host.tensor[where] ^= 16
    pages.upload()
    slices, compute = pages.slices(), device.compute_stream()
    device.verify_slices(slices, EVERY, compute)
    compute.record().wait()
    assert slices.marked().tolist() == [0, 0, 0, 0, 2, 0, 0]
    pages.free()


def test_one_layer_at_a_time(device: Device) -> None:
    """As slices in a ring are: each page's place has the slice of one layer."""
    pages = Pages(device, 2048)
    pages.upload()
    slices, compute = pages.slices(), device.compute_stream()
    device.sum_slices(slices, range(2, 3), compute)
    compute.record().wait()
    assert np.array_equal(pages.sums[:, 2], pages.expected()[:, 0])
    assert not pages.sums[:, :2].any()
    pages.free()


def test_sums_come_in_the_order_of_their_stream(device: Device) -> None:
    """Behind a copy on the same stream, and before the next one."""
    pages = Pages(device, 1024)
    other = device.allocate_host(pages.hot.num_bytes)
    other.tensor.fill_(9)
    stream = device.new_stream()
    src, dst, wrong = (np.array([m.address]) for m in (pages.host, pages.hot, other))
    size = pages.hot.num_bytes
    slices = pages.slices()
    device.copy(Direction.HOST_TO_DEVICE, dst, src, size, stream)
    device.sum_slices(slices, EVERY, stream)
    device.verify_slices(slices, EVERY, stream)
    device.copy(Direction.HOST_TO_DEVICE, dst, wrong, size, stream)
    stream.record().wait()
    assert np.array_equal(pages.sums, pages.expected())
    assert not slices.marked().any()
    pages.free()
    other.free()


def test_nothing_to_sum(device: Device) -> None:
    none = np.empty(0, dtype=np.int64)
    slices = device.slices(none, none, 1024)
    device.sum_slices(slices, EVERY, device.compute_stream())
    device.verify_slices(slices, EVERY, device.compute_stream())
    assert len(slices.marked()) == 0


def test_what_is_refused(device: Device) -> None:
    none, one = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match="one for each page"):
        device.slices(one, none, 1024)
    with pytest.raises(ValueError, match="slice_bytes=24: must be a multiple of 16"):
        device.slices(none, none, 24)
    with pytest.raises(TypeError, match="stream of the same device"):
        device.sum_slices(device.slices(none, none, 16), EVERY, CpuDeviceStream())  # type: ignore[arg-type]
    device.close()
    with pytest.raises(ClosedError):
        device.slices(none, none, 16)


class CpuDeviceStream:
    """No stream of any device."""


def test_what_inference_mode_has_made_works_outside_it(device: Device) -> None:
    """Streams run late, whatever the mode is then."""
    pages = Pages(device, 1024)
    with torch.inference_mode():
        slices = pages.slices()
    pages.upload()
    device.verify_slices(slices, EVERY, device.compute_stream())
    device.compute_stream().record().wait()
    assert slices.marked().all(), "all sums are zero yet"
    pages.free()
