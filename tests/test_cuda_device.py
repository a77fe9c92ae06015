"""The CUDA device on a real GPU: order shown with held streams, torch beside it, and no leak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from latch import Latch

from tiermem.device import Device, Direction, Event, Memory, Stream, cuda, discovery
from tiermem.device.cuda_device import CudaDevice
from tiermem.device.cuda_events import CudaStream
from tiermem.errors import ConfigError

pytestmark = pytest.mark.gpu

SIZE = 4 << 20
PAGE = 64 << 10
UP, DOWN = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST
ROUNDS = 4
POLLS = 2000
"""How often an event is asked that must not be done: for some milliseconds."""


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    opened = CudaDevice(0)
    _warm_up(opened)
    yield opened
    opened.close()


@pytest.fixture
def latch(device: CudaDevice) -> Latch:
    return Latch(device)


def _warm_up(device: CudaDevice) -> None:
    """Load what copies and torch's fill and copy need, which must not happen under a latch."""
    hot, host = device.allocate(SIZE), device.allocate_host(SIZE)
    for stream in (device.new_stream(), device.compute_stream()):
        for direction, dst, src in ((UP, hot, host), (DOWN, host, hot)):
            copy_pages(device, direction, dst, src, stream)
        stream.synchronize()
    hot.tensor.fill_(1)
    torch.empty_like(hot.tensor).copy_(hot.tensor)
    torch.cuda.synchronize(device.torch_device)
    hot.free()
    host.free()


def side_stream(device: CudaDevice) -> AbstractContextManager[None]:
    """Let torch launch on a stream of its own, beside the default one."""
    side = torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(side)


def offsets() -> Any:
    return np.arange(0, SIZE, PAGE, dtype=np.int64)


def copy_pages(
    device: Device, direction: Direction, dst: Memory, src: Memory, stream: Stream
) -> Event:
    device.copy(direction, dst.address + offsets(), src.address + offsets(), PAGE, stream)
    return stream.record()


def filled(memory: Memory, value: int) -> Memory:
    memory.tensor.fill_(value)
    if memory.tensor.is_cuda:
        torch.cuda.synchronize(memory.tensor.device)
    return memory


def holds(memory: Memory, value: int) -> bool:
    return bool((memory.tensor == value).all())


def stays_undone(*events: Event) -> bool:
    return not any(event.done() for _ in range(POLLS) for event in events)


def done_soon(event: Event) -> bool:
    deadline = monotonic() + 10
    while not event.done():
        if monotonic() > deadline:
            return False
    return True


def test_an_event_is_done_only_when_its_stream_got_there(device: CudaDevice, latch: Latch) -> None:
    hot, host = device.allocate(SIZE), filled(device.allocate_host(SIZE), 5)
    stream = device.new_stream()
    before = stream.record()
    before.wait()
    with latch.holding(stream):
        empty = stream.record()
        copied = copy_pages(device, UP, hot, host, stream)
        assert stays_undone(empty, copied)
        assert before.done()
    copied.wait()
    assert empty.done()
    assert copied.done()
    assert holds(hot, 5)


def test_a_copy_does_not_start_before_the_event_its_stream_waits_for(
    device: CudaDevice, latch: Latch
) -> None:
    hot, source = filled(device.allocate(SIZE), 1), filled(device.allocate_host(SIZE), 2)
    back = filled(device.allocate_host(SIZE), 3)
    up, down = device.new_stream(), device.new_stream()
    with latch.holding(up):
        down.wait_event(copy_pages(device, UP, hot, source, up))
        copied = copy_pages(device, DOWN, back, hot, down)
        assert stays_undone(copied)
        assert holds(back, 3)
    copied.wait()
    assert holds(back, 2)


def test_a_source_is_read_when_the_copy_runs(device: CudaDevice, latch: Latch) -> None:
    hot, source = device.allocate(SIZE), filled(device.allocate_host(SIZE), 2)
    stream = device.new_stream()
    with latch.holding(stream):
        copied = copy_pages(device, UP, hot, source, stream)
        filled(source, 9)
        assert stays_undone(copied)
    copied.wait()
    assert holds(hot, 9)


def test_a_held_stream_does_not_hold_the_others(device: CudaDevice, latch: Latch) -> None:
    hot, more = device.allocate(SIZE), device.allocate(SIZE)
    source = filled(device.allocate_host(SIZE), 4)
    held, free = device.new_stream(), device.new_stream()
    with latch.holding(held):
        late = copy_pages(device, UP, hot, source, held)
        assert done_soon(copy_pages(device, UP, more, source, free))
        assert not late.done()
    late.wait()
    assert holds(more, 4)


def test_a_kernel_waits_for_the_copy_into_its_pages(device: CudaDevice, latch: Latch) -> None:
    hot, source = filled(device.allocate(SIZE), 1), filled(device.allocate_host(SIZE), 6)
    out = torch.zeros(SIZE, dtype=torch.uint8, device=device.torch_device)
    torch.cuda.synchronize(device.torch_device)
    stream = device.new_stream()
    with side_stream(device), latch.holding(stream):
        compute = device.compute_stream()
        compute.wait_event(copy_pages(device, UP, hot, source, stream))
        out.copy_(hot.tensor)
        step = compute.record()
        assert stays_undone(step)
        latch.release()
        step.wait()
    assert bool((out == 6).all())


def test_a_copy_waits_for_the_kernel_that_uses_its_pages(device: CudaDevice, latch: Latch) -> None:
    hot, back = filled(device.allocate(SIZE), 1), filled(device.allocate_host(SIZE), 2)
    stream = device.new_stream()
    with side_stream(device):
        compute = device.compute_stream()
        with latch.holding(compute):
            hot.tensor.fill_(7)
            stream.wait_event(compute.record())
            copied = copy_pages(device, DOWN, back, hot, stream)
            assert stays_undone(copied)
            assert holds(back, 2)
        copied.wait()
    assert holds(back, 7)


def test_a_pending_event_dropped_by_its_owner_still_holds_the_waiter(
    device: CudaDevice, latch: Latch
) -> None:
    hot, source = filled(device.allocate(SIZE), 1), filled(device.allocate_host(SIZE), 2)
    back = filled(device.allocate_host(SIZE), 3)
    up, down, other = (device.new_stream() for _ in range(3))
    with latch.holding(up):
        copy_pages(device, UP, hot, source, up)
        down.wait_event(up.record())
        for _ in range(20):  # the dropped event is lent again and recorded elsewhere
            other.record().wait()
        copied = copy_pages(device, DOWN, back, hot, down)
        assert stays_undone(copied)
    copied.wait()
    assert holds(back, 2)


def test_compute_stream_follows_torch(device: CudaDevice) -> None:
    default = device.compute_stream()
    with side_stream(device):
        inner = device.compute_stream()
        assert isinstance(inner, CudaStream)
        assert inner.handle == torch.cuda.current_stream(device.torch_device).cuda_stream
    assert isinstance(default, CudaStream)
    assert default.handle == cuda.LEGACY_STREAM


def test_batches_are_found_and_move_the_same_bytes_as_single_copies(device: CudaDevice) -> None:
    rng = np.random.default_rng(4)
    source, back = device.allocate_host(SIZE), device.allocate_host(SIZE)
    data = torch.from_numpy(rng.integers(0, 256, SIZE, dtype=np.uint8))
    source.tensor.copy_(data)
    hot = device.allocate(SIZE)
    order = rng.permutation(SIZE // 512).astype(np.int64) * 512
    own = device.new_stream()
    for up, down in ((own, device.compute_stream()), (device.compute_stream(), own)):
        filled(hot, 0)
        filled(back, 0)
        device.copy(UP, hot.address + order, source.address + order[::-1], 512, up)
        down.wait_event(up.record())
        device.copy(DOWN, back.address + order[::-1], hot.address + order, 512, down)
        down.record().wait()
        assert torch.equal(back.tensor, data)


def test_hot_memory_is_a_tensor_like_any_other(device: CudaDevice) -> None:
    memory = device.allocate(64 * 64 * 2)
    matrix = memory.tensor.view(torch.float16).view(64, 64)
    matrix.copy_(torch.eye(64, dtype=torch.float16))
    product = matrix @ torch.full((64, 64), 3.0, dtype=torch.float16, device=device.torch_device)
    assert bool((product == 3).all())
    assert matrix.data_ptr() == memory.address


def test_host_memory_is_pinned_for_torch_too(device: CudaDevice) -> None:
    assert device.allocate_host(SIZE).tensor.is_pinned()


def test_an_allocation_beyond_the_gpu_names_the_free_bytes_and_harms_nothing(
    device: CudaDevice,
) -> None:
    total_bytes = device.memory_info().total_bytes
    with pytest.raises(ConfigError, match=rf"{total_bytes} bytes.*\d+ of {total_bytes}.*free"):
        device.allocate(total_bytes)
    assert holds(filled(device.allocate(SIZE), 8), 8)


def test_memory_that_torch_keeps_unused_is_asked_back(device: CudaDevice) -> None:
    free_bytes = device.memory_info().free_bytes
    cached = torch.empty(free_bytes // 2, dtype=torch.uint8, device=device.torch_device)
    del cached
    assert device.memory_info().free_bytes < free_bytes * 6 // 10
    device.allocate(free_bytes * 7 // 10).free()


def test_the_report_agrees_with_torch() -> None:
    report = discovery.probe()
    assert report.problem is None
    assert len(report.gpus) == torch.cuda.device_count()
    for gpu in report.gpus:
        properties = torch.cuda.get_device_properties(gpu.index)
        assert gpu.name == properties.name
        assert gpu.compute_capability == (properties.major, properties.minor)
        assert gpu.num_sms == properties.multi_processor_count
        assert gpu.free_bytes is not None
        assert 0 < gpu.free_bytes <= gpu.total_bytes
    opened, choice = discovery.open_device("auto")
    assert isinstance(opened, CudaDevice)
    assert choice.gpu is not None
    opened.close()


def test_another_gpu_can_be_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    device = CudaDevice(1)
    hot, source = device.allocate(SIZE), filled(device.allocate_host(SIZE), 3)
    assert hot.tensor.device == torch.device("cuda", 1)
    stream = device.new_stream()
    copied = copy_pages(device, UP, hot, source, stream)
    device.compute_stream().wait_event(copied)
    copied.wait()
    assert holds(hot, 3)
    assert torch.cuda.current_device() == 0
    device.close()
    assert torch.cuda.current_device() == 0


def _used() -> tuple[int, int, int]:
    """Device bytes in use, resident bytes of this process, open files."""
    gc.collect()
    torch.cuda.synchronize()
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    process = psutil.Process()
    return total_bytes - free_bytes, process.memory_info().rss, process.num_fds()


def _cycle(device: CudaDevice) -> None:
    hot, host = device.allocate(SIZE), device.allocate_host(SIZE)
    stream = device.new_stream()
    copy_pages(device, UP, hot, host, stream).wait()
    copy_pages(device, DOWN, host, hot, stream)


def _assert_no_growth(cycle: Callable[[], None]) -> None:
    """200 cycles leave nothing behind; they are tried again, because others may use the GPU too."""
    for _ in range(5):
        cycle()
    growths = []
    for _ in range(ROUNDS):
        before = _used()
        for _ in range(200):
            cycle()
        growths.append([now - then for now, then in zip(_used(), before, strict=True)])
        if _is_little(growths[-1]):
            return
    raise AssertionError(f"bytes of the GPU, of this process and files that stayed: {growths}")


def _is_little(growth: list[int]) -> bool:
    # 200 cycles of 4 MiB would leave 800 MiB behind; CUDA and malloc keep a little of their own.
    return growth[0] <= 8 << 20 and growth[1] <= 64 << 20 and growth[2] == 0


def test_200_opened_and_closed_devices_leave_nothing_behind() -> None:
    def cycle() -> None:
        device = CudaDevice(0)
        _cycle(device)
        device.close()

    _assert_no_growth(cycle)


def test_200_allocations_leave_nothing_behind(device: CudaDevice) -> None:
    def cycle() -> None:
        memories = [device.allocate(SIZE), device.allocate_host(SIZE)]
        filled(memories[1], 1)
        copy_pages(device, UP, memories[0], memories[1], stream).wait()
        for memory in memories:
            memory.free()

    stream = device.new_stream()
    _assert_no_growth(cycle)
