"""The CUDA device's own code on a fake CUDA: errors, contexts, reuse of events, and what is undone."""

from __future__ import annotations

from collections.abc import Iterator

import fake_cuda
import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda

from tiermem.device import Direction, Memory, cuda, cuda_memory
from tiermem.device.cuda_device import CudaDevice
from tiermem.errors import ConfigError, DeadlineError, InvariantError, TransferError

NONE = 0
ILLEGAL_ADDRESS = 700
OUT_OF_MEMORY = 2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch, FakeCuda())


@pytest.fixture
def device(fake: FakeCuda) -> Iterator[CudaDevice]:
    opened = CudaDevice(1)
    yield opened
    fake.failing.clear()
    opened.close()


def pages(memory: Memory, num_pages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return memory.address + np.arange(num_pages, dtype=np.int64) * 512


def test_a_gpu_that_cannot_be_opened_is_a_config_error(fake: FakeCuda) -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:7'.*cudaErrorInvalidDevice"):
        CudaDevice(7)
    fake.failing["cudaSetDevice"] = OUT_OF_MEMORY
    with pytest.raises(ConfigError, match=r"device='cuda:0'.*cudaErrorMemoryAllocation"):
        CudaDevice(0)
    assert fake.context == NONE


def test_an_allocation_without_room_names_requested_and_free_bytes(
    fake: FakeCuda, device: CudaDevice
) -> None:
    device.allocate(fake.total_bytes // 4)
    free_bytes = device.memory_info().free_bytes
    with pytest.raises(
        ConfigError, match=rf"{fake.total_bytes} bytes.*{free_bytes} of {fake.total_bytes}.*free"
    ):
        device.allocate(fake.total_bytes)
    assert fake.calls["empty_cache"] == 1
    assert device.memory_info().free_bytes == free_bytes


def test_memory_is_given_back_if_torch_cannot_wrap_it(
    fake: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_instead(address: int, num_bytes: int, where: torch.device) -> torch.Tensor:
        raise InvariantError("torch copied")

    monkeypatch.setattr(cuda_memory, "as_tensor", copy_instead)
    with pytest.raises(InvariantError):
        device.allocate(1 << 20)
    assert not fake.device_memory


def test_small_memory_that_cuda_aligns_too_little_is_moved_up(
    fake: FakeCuda, device: CudaDevice
) -> None:
    memory = device.allocate(100)
    (base,) = fake.device_memory
    assert base % 4096 == 512
    assert memory.address % 4096 == 0
    assert base < memory.address <= base + 4096
    memory.free()
    assert not fake.device_memory


def test_host_memory_that_cannot_be_pinned_is_a_config_error(
    fake: FakeCuda, device: CudaDevice
) -> None:
    fake.failing["cudaHostRegister"] = OUT_OF_MEMORY
    with pytest.raises(ConfigError, match=r"pin 8192 bytes.*cudaErrorMemoryAllocation"):
        device.allocate_host(8192)
    assert fake.calls["cudaHostUnregister"] == 0


def test_whole_pages_are_pinned(fake: FakeCuda, device: CudaDevice) -> None:
    memory = device.allocate_host(4097)
    assert fake.pinned == {memory.address: 8192}
    memory.free()
    assert not fake.pinned


def apart(memory: Memory, num_pages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """As `pages`, none beside another."""
    return memory.address + np.arange(num_pages, dtype=np.int64) * 1024


def test_large_batches_go_to_the_driver_in_parts(fake: FakeCuda, device: CudaDevice) -> None:
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    dst, src = pages(hot, 600), apart(host, 600)
    host.tensor.copy_(torch.randint(0, 256, (1 << 20,), dtype=torch.uint8))
    device.copy(Direction.HOST_TO_DEVICE, dst, src, 512, device.new_stream())
    assert fake.batch_sizes == [16, 32, 64, 128, 256, 104]
    assert fake.calls["cuMemcpyAsync"] == 0
    wanted = host.tensor.view(-1, 1024)[:600, :512].flatten()
    assert torch.equal(hot.tensor[: 600 * 512], wanted)


def test_pieces_that_continue_each_other_are_one_copy(fake: FakeCuda, device: CudaDevice) -> None:
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    order = np.random.default_rng(2).permutation(500)
    dst, src = pages(hot, 500)[order], pages(host, 500)[order]
    device.copy(Direction.HOST_TO_DEVICE, dst, src, 512, device.new_stream())
    assert fake.batch_sizes == []
    assert fake.calls["cuMemcpyAsync"] == 1


def test_the_default_stream_gets_its_pieces_one_by_one(fake: FakeCuda, device: CudaDevice) -> None:
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    stream = device.compute_stream()
    device.copy(Direction.DEVICE_TO_HOST, pages(host, 5), apart(hot, 5), 512, stream)
    assert fake.batch_sizes == []
    assert fake.calls["cuMemcpyAsync"] == 5


def test_a_driver_without_batches_gets_the_pieces_one_by_one(fake: FakeCuda) -> None:
    fake.has_batch = False
    device = CudaDevice(0)
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    device.copy(Direction.HOST_TO_DEVICE, apart(hot, 5), pages(host, 5), 512, device.new_stream())
    assert fake.calls["cuMemcpyAsync"] == 5
    device.close()


def test_a_refused_copy_raises_when_its_first_pieces_have_ended(
    fake: FakeCuda, device: CudaDevice
) -> None:
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    streams = (device.new_stream(), device.compute_stream())
    fake.failing["cuMemcpyAsync"] = fake.failing["cuMemcpyBatchAsync"] = ILLEGAL_ADDRESS
    for stream, num_pieces in zip(streams, (300, 3), strict=True):
        fake.calls.clear()
        with pytest.raises(TransferError, match="cudaErrorIllegalAddress: "):
            device.copy(
                Direction.HOST_TO_DEVICE,
                apart(hot, num_pieces),
                pages(host, num_pieces),
                512,
                stream,
            )
        # its own, and the two whose kernels spread what is staged
        assert fake.calls["cudaStreamQuery"] == 3


def test_an_event_that_failed_says_so_every_time(fake: FakeCuda, device: CudaDevice) -> None:
    queried, waited = device.new_stream().record(), device.new_stream().record()
    fake.failing["cudaEventQuery"] = ILLEGAL_ADDRESS
    with pytest.raises(TransferError, match="cudaEventQuery: cudaErrorIllegalAddress: an illegal"):
        queried.done()
    with pytest.raises(TransferError, match="cudaEventQuery: cudaErrorIllegalAddress"):
        waited.wait()
    fake.failing.clear()
    for event in (queried, waited):
        with pytest.raises(TransferError):
            event.done()
        with pytest.raises(TransferError):
            event.wait()
        device.new_stream().wait_event(event)
    assert fake.waits == []


def test_an_unknown_code_is_named_by_its_number(fake: FakeCuda, device: CudaDevice) -> None:
    with pytest.raises(TransferError, match="cuX: CUDA error 987654"):
        cuda._ok("cuX", (987654,))


def test_an_event_is_not_done_while_cuda_says_not_ready(fake: FakeCuda, device: CudaDevice) -> None:
    stream = device.new_stream()
    event = stream.record()
    fake.held = True
    assert not event.done()
    device.compute_stream().wait_event(event)
    assert len(fake.waits) == 1
    fake.held = False
    assert event.done()
    fake.held = True
    assert event.done()


def test_events_are_reused_once_seen_done(fake: FakeCuda, device: CudaDevice) -> None:
    stream = device.new_stream()
    fake.calls.clear()
    kept = [stream.record() for _ in range(3)]
    for _ in range(100):
        assert stream.record().done()
    assert fake.calls["cudaEventCreateWithFlags"] == 4
    for event in kept:
        event.wait()
    again = [stream.record() for _ in range(4)]
    assert fake.calls["cudaEventCreateWithFlags"] == 4
    assert all(event.done() for event in kept + again)


def test_a_pending_event_is_never_lent_twice(fake: FakeCuda, device: CudaDevice) -> None:
    fake.held = True
    stream = device.new_stream()
    held = [stream.record() for _ in range(50)]
    assert not any(event.done() for event in held)
    assert len(fake.recorded) == 50


def test_no_wait_for_a_gpu_that_hangs_is_longer_than_its_deadline(
    fake: FakeCuda, device: CudaDevice
) -> None:
    stream = device.new_stream()
    device.copy_timeout_s = 0.02
    event, fake.hung = stream.record(), True
    for wait in (event.wait, stream.synchronize, device.drain):
        with pytest.raises(DeadlineError, match="within copy_timeout_s"):
            wait()
    assert event.is_late()
    fake.hung = False
    event.wait()
    assert not event.is_late()


def test_a_gpu_that_hangs_is_closed_without_freeing_what_it_may_use(fake: FakeCuda) -> None:
    device = CudaDevice(0)
    hot, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
    device.new_stream()
    device.copy_timeout_s, fake.hung = 0.02, True
    with pytest.raises(DeadlineError):
        device.close()
    device.close()
    hot.free()
    host.free()
    assert len(fake.device_memory) == 2  # the copies' staging besides
    assert len(fake.pinned) == 1
    assert fake.streams


def test_events_are_reused_when_their_handle_is_dropped(fake: FakeCuda, device: CudaDevice) -> None:
    fake.held = True
    stream, other = device.new_stream(), device.new_stream()
    fake.calls.clear()
    for _ in range(100):
        other.wait_event(stream.record())
    assert fake.calls["cudaEventCreateWithFlags"] <= 2


def test_an_event_that_could_not_be_recorded_is_kept_for_later(
    fake: FakeCuda, device: CudaDevice
) -> None:
    stream = device.new_stream()
    fake.calls.clear()
    fake.failing["cudaEventRecord"] = ILLEGAL_ADDRESS
    with pytest.raises(TransferError, match="cudaEventRecord"):
        stream.record()
    fake.failing.clear()
    stream.record().wait()
    assert fake.calls["cudaEventCreateWithFlags"] == 1


@pytest.mark.parametrize("before", [NONE, 0xC0, 0xC1])
def test_the_current_gpu_stays_what_it_was(fake: FakeCuda, before: int) -> None:
    fake.context = before
    device = CudaDevice(1)
    hot, host = device.allocate(4096), device.allocate_host(4096)
    stream = device.new_stream()
    dst, src = pages(hot, 1), pages(host, 1)
    device.copy(Direction.HOST_TO_DEVICE, dst, src, 512, stream)
    event = stream.record()
    device.compute_stream().wait_event(event)
    assert event.done()
    stream.record().wait()
    stream.synchronize()
    device.memory_info()
    hot.free()
    fake.failing["cudaHostRegister"] = OUT_OF_MEMORY
    with pytest.raises(ConfigError):
        device.allocate_host(4096)
    device.close()
    cuda.query_memory(1)
    assert fake.context == before
    assert fake.contexts_made == {1}


def test_close_gives_everything_back(fake: FakeCuda) -> None:
    for _ in range(20):
        device = CudaDevice(0)
        memories = [device.allocate(1 << 20) for _ in range(3)]
        memories += [device.allocate_host(1 << 20) for _ in range(3)]
        memories[0].free()
        memories[-1].free()
        streams = [device.new_stream() for _ in range(2)]
        events = [stream.record() for stream in streams for _ in range(5)]
        assert all(event.done() for event in events[::2])
        device.close()
        assert not fake.device_memory
        assert not fake.pinned
        assert not fake.streams
        assert not fake.events
        assert not fake.modules


def test_close_gives_back_what_it_can_after_a_failure(fake: FakeCuda) -> None:
    device = CudaDevice(0)
    device.allocate(1 << 20)
    device.allocate_host(1 << 20)
    device.new_stream().record()
    fake.failing["cudaDeviceSynchronize"] = fake.failing["cudaFree"] = ILLEGAL_ADDRESS
    with pytest.raises(TransferError, match="cudaErrorIllegalAddress"):
        device.close()
    device.close()
    assert not fake.pinned
    assert not fake.streams
    assert not fake.events
