"""Every way of copying moves the right bytes, on a fake CUDA; what is missing is done without."""

from __future__ import annotations

from collections.abc import Iterator

import fake_cuda
import numpy as np
import pytest
import torch
from copy_cases import LAYOUTS, SIZES, Layout, check_bytes
from fake_cuda import FakeCuda

from tiermem.device import Direction, copy_measure, cuda, cuda_copies, host
from tiermem.device.copy_measure import CopyPlan, measure_copies
from tiermem.device.copy_rates import CopyMethod, CopyRates
from tiermem.device.cpu import CpuDevice
from tiermem.device.cuda_device import CudaDevice
from tiermem.device.simulated import SimulatedDevice
from tiermem.errors import ConfigError, TransferError

UP, DOWN, WITHIN = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST, Direction.DEVICE_TO_DEVICE
KIB = 1 << 10
PAGE = 512
OUT_OF_MEMORY = 2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch, FakeCuda())


@pytest.fixture
def device(fake: FakeCuda) -> Iterator[CudaDevice]:
    opened = CudaDevice(0)
    yield opened
    fake.failing.clear()
    opened.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", CopyMethod)
def test_every_method_moves_the_bytes(
    device: CudaDevice, method: CopyMethod, size: int, layout: Layout
) -> None:
    device.copy_method = method
    check_bytes(device, size, layout, [UP, DOWN, WITHIN])


@pytest.mark.parametrize("size", [1, 4096, 5 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_alone_moves_the_bytes(size: int, layout: Layout) -> None:
    device = CpuDevice()
    check_bytes(device, size, layout, [UP, DOWN, WITHIN])
    device.close()


@pytest.mark.parametrize(
    ("method", "used", "unused"),
    [
        (CopyMethod.SINGLE, {"cuMemcpyAsync"}, {"cuMemcpyBatchAsync", "cuLaunchKernel"}),
        (CopyMethod.BATCH, {"cuMemcpyBatchAsync"}, {"cuMemcpyAsync", "cuLaunchKernel"}),
        (CopyMethod.RUNS, {"cuLaunchKernel", "cuMemcpyAsync"}, {"cuMemcpyBatchAsync"}),
        (CopyMethod.KERNEL, {"cuLaunchKernel"}, {"cuMemcpyAsync", "cuMemcpyBatchAsync"}),
    ],
)
def test_a_forced_method_is_the_one_used(
    fake: FakeCuda, device: CudaDevice, method: CopyMethod, used: set[str], unused: set[str]
) -> None:
    device.copy_method = method
    hot, memory = device.allocate(64 * KIB), device.allocate_host(64 * KIB)
    stream = device.new_stream()
    src = memory.address + np.arange(40, dtype=np.int64) * PAGE
    dst = hot.address + np.arange(40, dtype=np.int64) * 2 * PAGE
    fake.calls.clear()
    device.copy(UP, dst, src, PAGE, stream)
    assert all(fake.calls[name] for name in used)
    assert not any(fake.calls[name] for name in unused)


def test_rates_choose_the_method_by_size_and_runs(fake: FakeCuda, device: CudaDevice) -> None:
    table = {
        "format": 1,
        "rows": [
            {"direction": "h2d", "busy": False, "piece_bytes": size, "run_length": run,
             "method": method, "gb_per_s": 1}
            for size, run, method in ((512, 1, "kernel"), (512, 16, "runs"), (8192, 1, "batch"))
        ],
    }  # fmt: skip
    device.copy_rates = CopyRates.from_dict(table)
    hot, memory = device.allocate(1 << 20), device.allocate_host(1 << 20)
    stream = device.new_stream()

    def used(size: int, step: int) -> set[str]:
        src = memory.address + np.arange(16, dtype=np.int64) * step
        dst = hot.address + np.arange(16, dtype=np.int64) * 4 * size
        fake.calls.clear()
        device.copy(UP, dst, src, size, stream)
        return {name for name in ("cuMemcpyBatchAsync", "cuLaunchKernel") if fake.calls[name]}

    assert used(512, 1024) == {"cuLaunchKernel"}
    assert fake.calls["cuStreamWaitEvent"] == 0
    assert used(512, 512) == {"cuLaunchKernel"}
    assert fake.calls["cuStreamWaitEvent"] > 0
    assert used(8192, 16384) == {"cuMemcpyBatchAsync"}


def test_streams_of_others_get_no_batches_and_no_staging(
    fake: FakeCuda, device: CudaDevice
) -> None:
    hot, memory = device.allocate(64 * KIB), device.allocate_host(64 * KIB)
    device.new_stream()
    for method in CopyMethod:
        device.copy_method = method
        fake.calls.clear()
        src = memory.address + np.arange(9, dtype=np.int64) * PAGE
        dst = hot.address + np.arange(9, dtype=np.int64) * 2 * PAGE
        device.copy(UP, dst, src, PAGE, device.compute_stream())
        assert fake.calls["cuMemcpyBatchAsync"] == fake.calls["cuEventRecord"] == 0
        assert fake.calls["cuMemcpyAsync"] == (0 if method is CopyMethod.KERNEL else 9)


@pytest.mark.parametrize("missing", ["compiler", "batches", "staging"])
@pytest.mark.parametrize("method", CopyMethod)
def test_what_is_missing_is_done_without(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, missing: str, method: CopyMethod
) -> None:
    fake.has_compiler = missing != "compiler"
    fake.has_batch = missing != "batches"
    if missing == "staging":
        monkeypatch.setattr(cuda_copies, "STAGE_BYTES", fake.total_bytes)
    device = CudaDevice(0)
    device.copy_method = method
    check_bytes(device, 4096, LAYOUTS[1], [UP, DOWN, WITHIN])
    device.close()
    assert not fake.streams | fake.events | fake.modules
    assert not fake.device_memory


def test_an_old_gpu_gets_the_kernel_for_any_pieces(fake: FakeCuda) -> None:
    fake.capability = (7, 5)
    device = CudaDevice(0)
    device.copy_method = CopyMethod.KERNEL
    check_bytes(device, 4096, LAYOUTS[0], [UP, DOWN])
    assert fake.calls["cuFuncSetAttribute"] == 0
    device.close()


@pytest.mark.parametrize("method", CopyMethod)
def test_no_copy_reaches_from_one_memory_into_the_next(
    fake: FakeCuda, device: CudaDevice, method: CopyMethod
) -> None:
    """CUDA refuses it, even where the memories lie beside each other."""
    device.copy_method = method
    stream = device.new_stream()
    size = 4096
    memories = sorted((device.allocate_host(size) for _ in range(64)), key=lambda m: m.address)
    addresses = np.array([memory.address for memory in memories], dtype=np.int64)
    assert (np.diff(addresses) == size).any()
    hot = device.allocate(64 * size)
    for i, memory in enumerate(memories):
        memory.tensor.fill_(i)
    places = hot.address + np.arange(64, dtype=np.int64) * size
    device.copy(UP, places, addresses, size, stream)
    assert (hot.tensor.view(64, size) == torch.arange(64, dtype=torch.uint8)[:, None]).all()
    hot.tensor.add_(100)
    device.copy(DOWN, addresses, places, size, stream)
    assert all(bool((memory.tensor == 100 + i).all()) for i, memory in enumerate(memories))


def test_pinning_tells_how_far_it_is(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PIECE_BYTES", 16 * KIB)
    seen: list[tuple[int, int]] = []
    CpuDevice().allocate_host(40 * KIB, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(16 * KIB, 40 * KIB), (32 * KIB, 40 * KIB), (40 * KIB, 40 * KIB)]
    seen.clear()
    device.allocate_host(40 * KIB, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(part * KIB, 40 * KIB) for part in (8, 16, 20, 40)]


def test_memory_that_cannot_be_pinned_is_given_back_and_the_limits_are_named(
    fake: FakeCuda, device: CudaDevice
) -> None:
    fake.failing["cudaHostRegister"] = OUT_OF_MEMORY
    text = rf"pin {80 * KIB} bytes.*cudaHostRegister: .*: \D*; \d+ bytes are free, .* may be locked"
    with pytest.raises(ConfigError, match=text):
        device.allocate_host(80 * KIB)
    assert not fake.pinned
    assert not device._pinned


@pytest.mark.parametrize("method", CopyMethod)
def test_after_a_refused_batch_the_next_one_goes_through(
    fake: FakeCuda, device: CudaDevice, method: CopyMethod
) -> None:
    device.copy_method = method
    hot, memory = device.allocate(64 * KIB), device.allocate_host(64 * KIB)
    stream = device.new_stream()
    src = memory.address + np.arange(40, dtype=np.int64) * PAGE
    dst = hot.address + np.arange(40, dtype=np.int64) * 2 * PAGE
    for name in ("cuMemcpyAsync", "cuLaunchKernel", "cuEventRecord"):
        fake.failing[name] = 700
        fake.calls.clear()
        try:
            device.copy(UP, dst, src, PAGE, stream)
        except TransferError as error:
            assert f"{name}: cudaErrorIllegalAddress" in str(error)  # noqa: PT017
            assert fake.calls["cudaStreamQuery"] == 3
        fake.failing.clear()
        memory.tensor.random_(0, 256)
        device.copy(UP, dst, src, PAGE, stream)
        wanted = memory.tensor[: 40 * PAGE].view(40, PAGE)
        assert torch.equal(hot.tensor[: 80 * PAGE].view(40, 2 * PAGE)[:, :PAGE], wanted)


def test_measuring_tries_every_method_in_every_case(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_measure, "FINE", CopyPlan((1024, 4096), (1, 8, 64), 64 * KIB, 2, 1))
    monkeypatch.setattr(copy_measure, "MIN_TOTAL_BYTES", 64 * KIB)
    device.copy_method = CopyMethod.SINGLE
    rates = measure_copies(device, seconds=1)
    assert device.copy_method is CopyMethod.SINGLE
    found = {
        (r.case.direction, r.case.busy, r.case.piece_bytes, r.case.run_length): set(
            rates.of(r.case)
        )
        for r in rates.rows
    }
    sizes_and_runs = {(size, run) for _, _, size, run in found}
    # a run of 64 × 4,096 bytes does not fit
    assert sizes_and_runs == {(1024, 1), (1024, 8), (1024, 64), (4096, 1), (4096, 8)}
    assert len(found) == 5 * 2 * 2 + 2
    for (direction, _, _, run_length), methods in found.items():
        wanted = {CopyMethod.BATCH, CopyMethod.KERNEL}
        if run_length > 1 and direction is not WITHIN:
            wanted.add(CopyMethod.RUNS)
        assert methods == wanted
    assert all(row.gb_per_s > 0 for row in rates.rows)
    assert CopyRates.from_dict(rates.to_dict()) == rates


def test_the_first_stream_measures_once_for_all_devices_of_a_kind(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_measure, "_measured", {})
    monkeypatch.setattr(copy_measure, "COARSE", CopyPlan((4096,), (1,), 16 * KIB, 1, 1))
    first = CudaDevice(0)
    assert first.copy_rates is None
    first.new_stream()
    assert first.copy_rates is not None
    assert len(first.copy_rates.rows) == 10
    first.close()
    again = CudaDevice(1)
    fake.calls.clear()
    again.new_stream()
    assert again.copy_rates is first.copy_rates
    assert fake.calls["cuMemcpyBatchAsync"] == 0
    given = CudaDevice(1, CopyRates())
    given.new_stream()
    assert given.copy_rates == CopyRates()
    for device in (again, given):
        device.close()


def test_devices_with_one_way_of_copying_have_no_rates() -> None:
    for device in (CpuDevice(), SimulatedDevice()):
        assert measure_copies(device) == CopyRates()
        device.close()


def test_without_room_for_buffers_nothing_is_measured(fake: FakeCuda, device: CudaDevice) -> None:
    device.allocate(fake.total_bytes - (1 << 20))
    assert measure_copies(device) == CopyRates()


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_no_time_is_an_error(device: CudaDevice, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds="):
        measure_copies(device, seconds=seconds)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_the_kernels_compile_for_every_gpu(capability: tuple[int, int]) -> None:
    try:
        code = cuda.compile_kernels(cuda_copies.SOURCE.read_bytes(), capability)
    except RuntimeError:
        pytest.skip("NVRTC is not installed")
    assert code.startswith(b"\x7fELF")
    assert b"copy_any" in code
    assert (b"copy_aligned" in code) is (capability >= cuda_copies.LEAST_ALIGNED_CAPABILITY)


def test_what_does_not_compile_is_a_transfer_error() -> None:
    try:
        with pytest.raises(TransferError, match="nvrtcCompileProgram"):
            cuda.compile_kernels(b"no CUDA", (9, 0))
    except RuntimeError:
        pytest.skip("NVRTC is not installed")


def test_staging_is_counted(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(0)
    assert device.staging_bytes == 0
    device.new_stream()
    assert device.staging_bytes == cuda_copies.staging_bytes() == 6 * cuda_copies.STAGE_BYTES
    device.new_stream()
    assert len(fake.device_memory) == 1
    device.close()
    monkeypatch.setattr(cuda_copies, "STAGE_BYTES", fake.total_bytes)
    crowded = CudaDevice(0)
    crowded.new_stream()
    assert crowded.staging_bytes == 0
    crowded.close()
    for other in (CpuDevice(), SimulatedDevice()):
        assert other.staging_bytes == 0
        other.close()
