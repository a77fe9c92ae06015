"""Every way of copying on a real GPU: right bytes, in stream order beside kernels, after a refusal too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from copy_cases import LAYOUTS, SIZES, Layout, check_bytes
from latch import Latch

from tiermem.device import Direction, Memory, copy_measure, cuda, cuda_copies
from tiermem.device.copy_measure import measure_copies
from tiermem.device.copy_rates import CopyMethod, CopyRates
from tiermem.device.cuda_copies import CudaCopies
from tiermem.device.cuda_device import CudaDevice
from tiermem.errors import TransferError

pytestmark = pytest.mark.gpu

UP, DOWN, WITHIN = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST, Direction.DEVICE_TO_DEVICE
KIB = 1 << 10
PAGE = 16 * KIB
NUM_PAGES = 512
POLLS = 2000


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    opened = CudaDevice(0, CopyRates())
    yield opened
    opened.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", CopyMethod)
def test_every_method_moves_the_bytes(
    device: CudaDevice, method: CopyMethod, layout: Layout
) -> None:
    device.copy_method = method
    for size in SIZES:
        check_bytes(device, size, layout, [UP, DOWN, WITHIN])


@pytest.mark.parametrize("method", CopyMethod)
def test_every_method_moves_large_pieces(device: CudaDevice, method: CopyMethod) -> None:
    device.copy_method = method
    for size in (1 << 20, 16 << 20, (5 << 20) + 3):
        check_bytes(device, size, Layout.SCATTERED, [UP, DOWN, WITHIN])


@pytest.mark.parametrize("method", CopyMethod)
def test_the_kernel_for_any_pieces_moves_aligned_ones_too(
    monkeypatch: pytest.MonkeyPatch, method: CopyMethod
) -> None:
    monkeypatch.setattr(cuda_copies, "LEAST_ALIGNED_CAPABILITY", (99, 0))
    device = CudaDevice(0, CopyRates())
    device.copy_method = method
    for layout in LAYOUTS:
        check_bytes(device, PAGE, layout, [UP, DOWN, WITHIN])
    device.close()


def test_all_parts_are_there_on_a_machine_with_nvrtc(device: CudaDevice) -> None:
    capability = device.compute_capability
    assert capability is not None
    assert cuda_copies._machine_code(capability) is not None
    assert cuda.driver_function("cuMemcpyBatchAsync") != 0
    assert cuda.driver_function("cuNoSuchFunction") == 0


@pytest.mark.parametrize("method", CopyMethod)
def test_copies_up_and_down_keep_the_order_of_their_stream(
    device: CudaDevice, method: CopyMethod
) -> None:
    """Ten rounds through one stream without waiting, the other direction at work in another one."""
    device.copy_method = method
    rng = np.random.default_rng(1)
    size = NUM_PAGES * PAGE
    first, second = device.allocate_host(size), device.allocate_host(size)
    hot, beside, noise = device.allocate(size), device.allocate(size), device.allocate_host(size)
    data = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    first.tensor.copy_(data)
    stream, other = device.new_stream(), device.new_stream()
    pages = np.arange(NUM_PAGES, dtype=np.int64) * PAGE
    for _ in range(10):
        places = rng.permutation(pages)
        device.copy(UP, hot.address + places, first.address + pages, PAGE, stream)
        device.copy(DOWN, second.address + pages, hot.address + places, PAGE, stream)
        device.copy(DOWN, noise.address + pages, beside.address + places, PAGE, other)
        device.copy(UP, hot.address + pages, second.address + pages, PAGE, stream)
        device.copy(DOWN, first.address + pages, hot.address + pages, PAGE, stream)
    stream.synchronize()
    other.synchronize()
    assert torch.equal(first.tensor, data)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("method", CopyMethod)
def test_no_method_starts_before_its_stream_gets_there(
    device: CudaDevice, method: CopyMethod, direction: Direction
) -> None:
    device.copy_method = method
    size = NUM_PAGES * PAGE
    hot, memory = device.allocate(size), device.allocate_host(size)
    src, dst = (memory, hot) if direction is UP else (hot, memory)
    pages = np.arange(NUM_PAGES, dtype=np.int64) * PAGE
    places = np.random.default_rng(2).permutation(pages)
    stream, latch = device.new_stream(), Latch(device)

    def copy() -> None:
        device.copy(direction, dst.address + places, src.address + pages, PAGE, stream)

    copy()  # loads what must not be loaded under the latch
    stream.synchronize()
    src.tensor.fill_(1)
    dst.tensor.fill_(2)
    torch.empty_like(src.tensor).copy_(src.tensor)
    torch.cuda.synchronize()
    with latch.holding(stream):
        copy()
        event = stream.record()
        if src is memory:
            src.tensor.fill_(7)  # a source is read when the copy runs
        assert not any(event.done() for _ in range(POLLS))
        if dst is memory:
            assert bool((dst.tensor == 2).all())
    event.wait()
    assert bool((dst.tensor == (7 if src is memory else 1)).all())


@pytest.mark.parametrize("method", CopyMethod)
def test_kernels_wait_for_copies_and_copies_for_kernels(
    device: CudaDevice, method: CopyMethod
) -> None:
    device.copy_method = method
    size = NUM_PAGES * PAGE
    hot, memory, back = (
        device.allocate(size),
        device.allocate_host(size),
        device.allocate_host(size),
    )
    pages = np.arange(NUM_PAGES, dtype=np.int64) * PAGE
    places = np.random.default_rng(3).permutation(pages)
    up, down = device.new_stream(), device.new_stream()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        compute = device.compute_stream()
        for value in range(20):
            memory.tensor.fill_(value)
            device.copy(UP, hot.address + places, memory.address + pages, PAGE, up)
            compute.wait_event(up.record())
            hot.tensor.add_(1)
            down.wait_event(compute.record())
            device.copy(DOWN, back.address + pages, hot.address + places, PAGE, down)
            down.record().wait()
            assert bool((back.tensor == value + 1).all())


def neighbours(device: CudaDevice) -> tuple[Memory, Memory]:
    """Two pinned memories of 4,096 bytes beside each other."""
    memories = sorted((device.allocate_host(4096) for _ in range(64)), key=lambda m: m.address)
    for first, second in pairwise(memories):
        if first.address + 4096 == second.address:
            return first, second
    pytest.skip("the system put no two mappings beside each other")


@pytest.mark.parametrize("method", CopyMethod)
def test_no_copy_reaches_from_one_memory_into_the_next(
    device: CudaDevice, method: CopyMethod
) -> None:
    device.copy_method = method
    stream = device.new_stream()
    first, second = neighbours(device)
    first.tensor.fill_(1)
    second.tensor.fill_(2)
    hot = device.allocate(8192)
    places = hot.address + np.array([0, 4096], dtype=np.int64)
    addresses = np.array([first.address, second.address], dtype=np.int64)
    device.copy(UP, places, addresses, 4096, stream)
    stream.synchronize()
    assert bool((hot.tensor.view(2, 4096).cpu() == torch.tensor([[1], [2]])).all())


@pytest.mark.parametrize("method", CopyMethod)
def test_a_first_copy_waits_for_nothing(method: CopyMethod) -> None:
    """Neither for its own stream, which is held, nor for the GPU, to load or allocate something."""
    device = CudaDevice(0, CopyRates())
    device.copy_method = method
    size = NUM_PAGES * PAGE
    hot, memory = device.allocate(size), device.allocate_host(size)
    memory.tensor.fill_(5)
    hot.tensor.fill_(1)
    pages = np.arange(NUM_PAGES, dtype=np.int64) * PAGE
    places = np.random.default_rng(2).permutation(pages)
    stream, other, latch = device.new_stream(), device.new_stream(), Latch(device)
    torch.cuda.synchronize()
    with latch.holding(stream, other):
        device.copy(UP, hot.address + places, memory.address + pages, PAGE, stream)
        event = stream.record()
        device.copy(DOWN, memory.address + pages, hot.address + places, PAGE, other)
        # Done if a copy had waited until the latch gave up.
        assert not any(event.done() for _ in range(POLLS))
        other.wait_event(event)
    other.synchronize()
    stream.synchronize()
    device.close()


@pytest.mark.parametrize("method", [CopyMethod.SINGLE, CopyMethod.BATCH, CopyMethod.RUNS])
def test_a_refused_copy_harms_nothing(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, method: CopyMethod
) -> None:
    """CUDA refuses copies over the border of two memories, which the engine here does not know."""
    monkeypatch.setattr(CudaCopies, "set_borders", lambda *_: None)
    device.copy_method = method
    stream = device.new_stream()
    first, second = neighbours(device)
    hot = device.allocate(NUM_PAGES * PAGE)
    places = hot.address + np.array([0, 4096], dtype=np.int64)
    addresses = np.array([first.address, second.address], dtype=np.int64)
    with pytest.raises(TransferError, match=r"cuMemcpy\w+: cudaErrorInvalidValue"):
        device.copy(UP, places, addresses, 4096, stream)
    memory = device.allocate_host(NUM_PAGES * PAGE)
    memory.tensor.random_(0, 256)
    pages = np.arange(NUM_PAGES, dtype=np.int64) * PAGE
    device.copy(UP, hot.address + pages[::-1].copy(), memory.address + pages, PAGE, stream)
    stream.synchronize()
    assert torch.equal(
        hot.tensor.cpu().view(NUM_PAGES, PAGE).flip(0), memory.tensor.view(NUM_PAGES, PAGE)
    )


def test_the_first_stream_of_a_process_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_measure, "_measured", {})
    device = CudaDevice(0)
    device.new_stream()
    rates = device.copy_rates
    assert rates is not None
    assert {row.case.direction for row in rates.rows} == set(Direction)
    assert {row.method for row in rates.rows} == set(CopyMethod) - {CopyMethod.SINGLE}
    assert device.copy_method is None
    device.new_stream()
    assert device.copy_rates is rates
    device.close()


def test_measured_rates_survive_a_file(device: CudaDevice) -> None:
    rates = measure_copies(device, seconds=1)
    assert all(row.gb_per_s > 0 for row in rates.rows)
    assert CopyRates.from_dict(json.loads(json.dumps(rates.to_dict()))) == rates
    for direction in Direction:
        for busy in (False, True):
            assert rates.methods(direction, busy=busy).size > 0
