"""What every device promises: the CPU, simulated and, on a GPU, the CUDA device.

The CUDA device runs on a fake CUDA too, which finds wrong calls without a GPU but no wrong order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import fake_cuda
import numpy as np
import pytest
import torch

from tiermem.device import MEMORY_ALIGN_BYTES, Device, Direction, Event, Memory, Stream
from tiermem.device.cpu import CpuDevice
from tiermem.device.host import set_word
from tiermem.device.simulated import SimulatedDevice
from tiermem.errors import ClosedError, ConfigError

SIZE = 1 << 20
FAKE = "cuda-calls"


def _open_cuda() -> Device:
    from tiermem.device.cuda_device import CudaDevice

    return CudaDevice(0)


DEVICES: dict[str, Callable[[], Device]] = {
    "cpu": CpuDevice,
    "simulated": lambda: SimulatedDevice(seed=11),
    "simulated-lazy": lambda: SimulatedDevice(seed=12, eagerness=0.0),
    "cuda": _open_cuda,
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name
        for name in [*DEVICES, FAKE]
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == FAKE:
        fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    opened = DEVICES["cuda" if request.param == FAKE else request.param]()
    yield opened
    opened.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20_26)


def fill(memory: Memory, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Write random bytes into `memory` and return them."""
    data = rng.integers(0, 256, memory.num_bytes, dtype=np.uint8)
    memory.tensor.copy_(torch.from_numpy(data))
    settle(memory)
    return data


def settle(memory: Memory) -> None:
    """Let torch's own work on hot memory end, which no stream of the device waits for."""
    if memory.tensor.is_cuda:
        torch.cuda.synchronize(memory.tensor.device)


def content(memory: Memory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return memory.tensor.cpu().numpy()


def one(address: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([address], dtype=np.int64)


def copy_all(device: Device, direction: Direction, dst: Memory, src: Memory, on: Stream) -> Event:
    device.copy(direction, one(dst.address), one(src.address), dst.num_bytes, on)
    return on.record()


def random_pieces(rng: np.random.Generator, num_pieces: int) -> tuple[Any, Any, Any]:
    """Offsets in dst and in src and sizes of pieces, odd ones, that do not overlap in dst."""
    cuts = np.sort(rng.choice(np.arange(1, SIZE), 2 * num_pieces, replace=False)).astype(np.int64)
    dst, sizes = cuts[0::2], cuts[1::2] - cuts[0::2]
    src = rng.integers(0, SIZE - sizes + 1)
    order = rng.permutation(num_pieces)
    return dst[order], src[order], sizes[order]


def allocate_pair(device: Device, direction: Direction) -> tuple[Memory, Memory]:
    """Memory to write and memory to read for a copy in `direction`."""
    to_host = direction is Direction.DEVICE_TO_HOST
    from_host = direction is Direction.HOST_TO_DEVICE
    dst = device.allocate_host(SIZE) if to_host else device.allocate(SIZE)
    src = device.allocate_host(SIZE) if from_host else device.allocate(SIZE)
    return dst, src


def test_a_device_satisfies_the_protocol(device: Device) -> None:
    assert isinstance(device, Device)
    assert isinstance(device.new_stream(), Stream)
    assert isinstance(device.compute_stream(), Stream)
    assert isinstance(device.compute_stream().record(), Event)
    assert isinstance(device.allocate(1), Memory)
    assert device.name


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, (2 << 20) + 5])
@pytest.mark.parametrize("kind", ["hot", "host"])
def test_memory_is_aligned_and_its_tensor_is_the_memory(
    device: Device, kind: str, num_bytes: int
) -> None:
    allocate = device.allocate if kind == "hot" else device.allocate_host
    memories = [allocate(num_bytes) for _ in range(3)]
    for memory in memories:
        assert memory.num_bytes == num_bytes
        assert memory.address % MEMORY_ALIGN_BYTES == 0
        assert memory.tensor.data_ptr() == memory.address
        assert memory.tensor.shape == (num_bytes,)
        assert memory.tensor.dtype == torch.uint8
        expected = device.torch_device if kind == "hot" else torch.device("cpu")
        assert memory.tensor.device == expected
    spans = sorted((memory.address, memory.address + num_bytes) for memory in memories)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("num_pieces", [1, 7, 700])
def test_a_batch_of_random_pieces_moves_exactly_its_bytes(
    device: Device, rng: np.random.Generator, direction: Direction, num_pieces: int
) -> None:
    dst, src = allocate_pair(device, direction)
    expected, data = fill(dst, rng).copy(), fill(src, rng)
    dst_start, src_start, sizes = random_pieces(rng, num_pieces)
    stream = device.new_stream()
    device.copy(direction, dst.address + dst_start, src.address + src_start, sizes, stream)
    stream.record().wait()
    for to, start, size in zip(dst_start, src_start, sizes, strict=True):
        expected[to : to + size] = data[start : start + size]
    assert np.array_equal(content(dst), expected)
    assert np.array_equal(content(src), data)


def test_one_number_of_bytes_serves_all_pieces(device: Device, rng: np.random.Generator) -> None:
    dst, src = allocate_pair(device, Direction.HOST_TO_DEVICE)
    before, data = fill(dst, rng), fill(src, rng)
    offsets = np.arange(0, SIZE, 8192, dtype=np.int64)
    stream = device.new_stream()
    device.copy(
        Direction.HOST_TO_DEVICE, dst.address + offsets, src.address + offsets[::-1], 4096, stream
    )
    stream.synchronize()
    got = content(dst).reshape(-1, 2, 4096)
    assert np.array_equal(got[:, 0], data.reshape(-1, 2, 4096)[::-1, 0])
    assert np.array_equal(got[:, 1], before.reshape(-1, 2, 4096)[:, 1])


def test_a_batch_without_pieces_does_nothing(device: Device) -> None:
    none = np.empty(0, dtype=np.int64)
    stream = device.new_stream()
    device.copy(Direction.HOST_TO_DEVICE, none, none, none, stream)
    device.copy(Direction.HOST_TO_DEVICE, none, none, 4096, stream)
    event = stream.record()
    event.wait()
    assert event.done()


def test_batches_of_one_stream_run_in_order(device: Device, rng: np.random.Generator) -> None:
    first, second = device.allocate_host(SIZE), device.allocate_host(SIZE)
    hot, back = device.allocate(SIZE), device.allocate_host(SIZE)
    fill(first, rng)
    data = fill(second, rng)
    stream = device.new_stream()
    for source in (first, second):
        copy_all(device, Direction.HOST_TO_DEVICE, hot, source, stream)
    copy_all(device, Direction.DEVICE_TO_HOST, back, hot, stream).wait()
    assert np.array_equal(content(back), data)


def test_a_stream_waits_for_an_event_of_another(device: Device, rng: np.random.Generator) -> None:
    source, hot, back = (
        device.allocate_host(SIZE),
        device.allocate(SIZE),
        device.allocate_host(SIZE),
    )
    down, up = device.new_stream(), device.new_stream()
    for _ in range(20):
        data = fill(source, rng)
        down.wait_event(copy_all(device, Direction.HOST_TO_DEVICE, hot, source, up))
        copy_all(device, Direction.DEVICE_TO_HOST, back, hot, down).wait()
        assert np.array_equal(content(back), data)


def test_the_compute_stream_sees_what_it_waited_for(
    device: Device, rng: np.random.Generator
) -> None:
    source, hot = device.allocate_host(SIZE), device.allocate(SIZE)
    stream = device.new_stream()
    for _ in range(20):
        data = fill(source, rng)
        copied = copy_all(device, Direction.HOST_TO_DEVICE, hot, source, stream)
        device.compute_stream().wait_event(copied)
        doubled = hot.tensor.to(torch.int16) * 2
        device.compute_stream().record().wait()
        assert np.array_equal(doubled.cpu().numpy(), data.astype(np.int16) * 2)


def test_copies_on_the_compute_stream_come_before_its_next_kernel(
    device: Device, rng: np.random.Generator
) -> None:
    src, dst = device.allocate(SIZE), device.allocate(SIZE)
    data = fill(src, rng)
    copy_all(device, Direction.DEVICE_TO_DEVICE, dst, src, device.compute_stream())
    assert np.array_equal(dst.tensor.clone().cpu().numpy(), data)


def test_a_copy_waits_for_the_compute_stream_when_told(
    device: Device, rng: np.random.Generator
) -> None:
    hot, back = device.allocate(SIZE), device.allocate_host(SIZE)
    stream = device.new_stream()
    for value in (3, 200):
        hot.tensor.fill_(value)
        stream.wait_event(device.compute_stream().record())
        copy_all(device, Direction.DEVICE_TO_HOST, back, hot, stream).wait()
        assert np.array_equal(content(back), np.full(SIZE, value, dtype=np.uint8))


def test_an_event_waited_for_is_done_and_stays_done(device: Device) -> None:
    source, hot = device.allocate_host(SIZE), device.allocate(SIZE)
    events = []
    for _ in range(50):
        stream = device.new_stream()
        event = copy_all(device, Direction.HOST_TO_DEVICE, hot, source, stream)
        event.wait()
        events.append(event)
        assert all(seen.done() for seen in events)


def test_an_event_of_an_idle_stream_becomes_done(device: Device) -> None:
    for stream in (device.new_stream(), device.compute_stream()):
        event = stream.record()
        event.wait()
        assert event.done()


def test_waiting_for_an_event_that_is_done_or_forgotten_holds_nothing_back(
    device: Device, rng: np.random.Generator
) -> None:
    source, hot = device.allocate_host(SIZE), device.allocate(SIZE)
    data = fill(source, rng)
    stream, other = device.new_stream(), device.new_stream()
    done = other.record()
    done.wait()
    stream.wait_event(done)
    for _ in range(100):
        stream.wait_event(other.record())
        stream.wait_event(stream.record())
    copy_all(device, Direction.HOST_TO_DEVICE, hot, source, stream).wait()
    assert np.array_equal(content(hot), data)


@pytest.mark.parametrize("num_bytes", [0, -1, -4096])
def test_a_size_below_one_is_refused(device: Device, num_bytes: int) -> None:
    for allocate in (device.allocate, device.allocate_host):
        with pytest.raises(ValueError, match=f"num_bytes={num_bytes}"):
            allocate(num_bytes)
    hot, host = device.allocate(4096), device.allocate_host(4096)
    stream = device.new_stream()
    sizes = np.array([16, num_bytes], dtype=np.int64)
    for sized in (num_bytes, sizes):
        dst = np.full(2, hot.address) + np.array([0, 64])
        src = np.full(2, host.address) + np.array([0, 64])
        with pytest.raises(ValueError, match=f"num_bytes={num_bytes}"):
            device.copy(Direction.HOST_TO_DEVICE, dst, src, sized, stream)


def test_arguments_of_the_wrong_type_are_refused(device: Device) -> None:
    hot, host = device.allocate(4096), device.allocate_host(4096)
    stream = device.new_stream()
    dst, src = one(hot.address), one(host.address)
    wrong: list[Any] = [
        [hot.address],
        dst.astype(np.float64),
        dst.astype(np.int32),
        dst.reshape(1, 1),
        hot.address,
    ]
    for bad in wrong:
        with pytest.raises(TypeError):
            device.copy(Direction.HOST_TO_DEVICE, bad, src, 16, stream)
        with pytest.raises(TypeError):
            device.copy(Direction.HOST_TO_DEVICE, dst, bad, 16, stream)
    with pytest.raises(TypeError, match="direction='h2d'"):
        device.copy("h2d", dst, src, 16, stream)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        device.copy(Direction.HOST_TO_DEVICE, dst, src, 16.0, stream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many"):
        device.copy(Direction.HOST_TO_DEVICE, dst, np.repeat(src, 2), 16, stream)
    for bad_size in (1.5, "4096", None, True):
        with pytest.raises(TypeError):
            device.allocate(bad_size)  # type: ignore[arg-type]


def test_streams_and_events_of_another_device_are_refused(device: Device) -> None:
    stranger = SimulatedDevice()
    hot, host = device.allocate(4096), device.allocate_host(4096)
    with pytest.raises(TypeError):
        device.copy(
            Direction.HOST_TO_DEVICE, one(hot.address), one(host.address), 16, stranger.new_stream()
        )
    for stream in (device.new_stream(), device.compute_stream()):
        with pytest.raises(TypeError):
            stream.wait_event(stranger.compute_stream().record())
    stranger.close()


def test_memory_that_does_not_exist_is_refused_with_the_free_bytes(device: Device) -> None:
    for allocate in (device.allocate, device.allocate_host):
        with pytest.raises(ConfigError, match=rf"{1 << 50} bytes.*\d+.*free"):
            allocate(1 << 50)
    memory = device.allocate(4096)
    memory.tensor.fill_(7)
    assert (content(memory) == 7).all()


def test_memory_info_is_plausible(device: Device) -> None:
    info = device.memory_info()
    assert 0 < info.free_bytes <= info.total_bytes


def test_free_is_idempotent_and_the_tensor_is_gone(device: Device) -> None:
    for allocate in (device.allocate, device.allocate_host):
        memory = allocate(SIZE)
        memory.free()
        memory.free()
        with pytest.raises(ClosedError):
            _ = memory.tensor


def test_close_frees_what_is_left_and_ends_the_device(
    device: Device, rng: np.random.Generator
) -> None:
    hot, host = device.allocate(SIZE), device.allocate_host(SIZE)
    stream, compute = device.new_stream(), device.compute_stream()
    event = copy_all(device, Direction.HOST_TO_DEVICE, hot, host, stream)
    device.close()
    device.close()
    assert event.done()
    event.wait()
    for memory in (hot, host):
        memory.free()
        with pytest.raises(ClosedError):
            _ = memory.tensor
    uses: list[Callable[[], object]] = [
        lambda: device.allocate(1),
        lambda: device.allocate_host(1),
        device.new_stream,
        device.compute_stream,
        device.memory_info,
        stream.record,
        stream.synchronize,
        compute.record,
        lambda: compute.wait_event(event),
        lambda: device.copy(Direction.HOST_TO_DEVICE, one(0), one(0), 1, stream),
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()


# ---- words that streams and threads wait for ---------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2**31, 2**32 - 1, 0, 3])
def test_a_word_is_written_and_waited_for(device: Device, value: int) -> None:
    memory = device.allocate_host(4096)
    memory.tensor.zero_()
    words = memory.tensor.view(torch.int32)
    before = (value - 5) % 2**32
    words[:2] = torch.tensor([before, before], dtype=torch.int64).to(torch.int32)
    setter = threading.Timer(0.02, lambda: set_word(memory.address, value + 2))
    start_s = time.perf_counter()
    setter.start()
    device.wait_word(memory.address, value)  # one that has gone past it does as well
    device.write_word(memory.address + 4, value)
    device.compute_stream().synchronize()
    assert time.perf_counter() - start_s >= 0.02
    assert int(words[1]) % 2**32 == value
    setter.join()
    memory.free()


def test_a_view_shows_what_the_host_writes(
    device: Device, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    if FAKE in request.node.name:
        pytest.skip("a fake CUDA has no tensors on a GPU")
    memory = device.allocate_host(SIZE)
    view = device.view(memory)
    assert (view.device, view.shape) == (device.torch_device, (SIZE,))
    want = fill(memory, rng)
    assert np.array_equal((view + 0).cpu().numpy(), want)
    memory.free()
