"""Which device a configuration means, and that every reason against a GPU is told."""

from __future__ import annotations

import importlib.util
import sys
import warnings

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda

from tiermem import device as device_package
from tiermem.device import DeviceKind, discovery
from tiermem.device.cpu import CpuDevice
from tiermem.device.cuda_device import CudaDevice
from tiermem.device.discovery import choose, describe, open_device, probe, survey
from tiermem.errors import ConfigError

NO_DRIVER = "no NVIDIA driver is installed"


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    discovery._warn_once.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Two usable GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return fake_cuda.install(monkeypatch, FakeCuda())


def without_driver(fake: FakeCuda) -> None:
    fake.driver_version = 0
    fake.failing["cudaGetDeviceCount"] = 35


def test_this_machine_as_it_is() -> None:
    report = probe()
    assert (report.problem is None) == bool(report.usable_gpus())
    lines = describe(report=report)
    assert lines[-1].startswith("device: ")
    assert any(line.startswith("host: ") for line in lines)
    if report.problem is not None:
        assert report.problem in "\n".join(lines)
        with pytest.raises(ConfigError, match="device='cuda'"):
            open_device("cuda")


def test_cpu_needs_no_gpu_and_warns_of_nothing(fake: FakeCuda) -> None:
    without_driver(fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened, choice = open_device("cpu")
    assert isinstance(opened, CpuDevice)
    assert (choice.kind, choice.gpu, choice.is_fallback) == (DeviceKind.CPU, None, False)
    opened.close()


def test_auto_takes_the_gpu(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        opened, choice = open_device("auto")
        assert isinstance(opened, CudaDevice)
        assert choice.gpu is not None
        assert choice.gpu.index == current
        assert "torch's current GPU" in choice.reason
        opened.close()


def test_cuda_is_torchs_current_gpu_and_an_index_is_that_gpu(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for spec, index in (("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)):
        opened, choice = open_device(spec)
        assert choice.gpu is not None
        assert choice.gpu.index == index
        assert fake.contexts_made == {index}
        opened.close()
        fake.contexts_made.clear()


@pytest.mark.parametrize("spec", ["cuda:2", "cuda:17"])
def test_an_index_out_of_range_names_the_range(fake: FakeCuda, spec: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{spec}'.*must be cuda:0 to cuda:1"):
        open_device(spec)


@pytest.mark.parametrize(
    "spec", ["", "gpu", "cuda:", "cuda:-1", "cuda:0x", "cuda0", "CPU", "cpu:0", " cuda", None, 0]
)
def test_an_unknown_spec_names_key_value_and_what_is_allowed(fake: FakeCuda, spec: object) -> None:
    with pytest.raises(ConfigError, match=r"device=.*must be 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        open_device(spec)  # type: ignore[arg-type]


def test_auto_without_a_driver_warns_once_and_runs_on_the_cpu(fake: FakeCuda) -> None:
    without_driver(fake)
    with pytest.warns(RuntimeWarning, match=NO_DRIVER) as caught:
        opened, choice = open_device("auto")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = open_device("auto")
    assert isinstance(opened, CpuDevice)
    assert isinstance(again, CpuDevice)
    assert choice.is_fallback
    assert NO_DRIVER in choice.reason


def test_cuda_without_a_driver_is_an_error(fake: FakeCuda) -> None:
    without_driver(fake)
    for spec in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"device='{spec}'.*{NO_DRIVER}"):
            open_device(spec)


def _old_driver(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.driver_version = 12040
    fake.failing["cudaGetDeviceCount"] = 35


def _no_device(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.failing["cudaGetDeviceCount"] = 100


def _zero_devices(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.num_gpus = 0


def _broken_driver(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.failing["cudaGetDeviceCount"] = 803


def _driver_library_missing(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("libcuda.so.1 is missing")

    monkeypatch.setattr(fake, "cudaGetDeviceCount", refuse)


def _no_bindings(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(device_package, "cuda")
    monkeypatch.setitem(sys.modules, "tiermem.device.cuda", None)


def _old_bindings(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "cudaRuntimeGetVersion", lambda: (0, 12090))


def _cpu_torch(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def _blind_torch(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _no_triton(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def _old_gpus(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.capability = (7, 0)


REASONS = [
    (_old_driver, "driver is too old: it supports CUDA 12.4, and CUDA 13.0 is needed"),
    (_no_device, "CUDA finds no GPU .cudaErrorNoDevice"),
    (_zero_devices, "CUDA finds no GPU .cudaErrorNoDevice"),
    (_broken_driver, "CUDA finds no GPU .cudaErrorSystemDriverMismatch"),
    (_driver_library_missing, "cuda-python does not work here: libcuda.so.1 is missing"),
    (_no_bindings, "cuda-python does not work here: .*tiermem.device.cuda"),
    (_old_bindings, "cuda-bindings for CUDA 12.9 are installed, at least 13.0 is needed"),
    (_cpu_torch, "has no CUDA: pip install torch"),
    (_blind_torch, "built for CUDA 13.0, finds no GPU"),
    (_no_triton, "triton is not installed: pip install triton"),
    (_old_gpus, "Fake GPU: compute capability 7.0 is below 7.5"),
]


@pytest.mark.parametrize(("break_it", "reason"), REASONS, ids=lambda value: str(value)[:24])
def test_every_reason_against_a_gpu_is_told(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, break_it: object, reason: str
) -> None:
    assert callable(break_it)
    break_it(fake, monkeypatch)
    with pytest.raises(ConfigError, match=f"device='cuda:0'.*{reason}"):
        open_device("cuda:0")
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        opened, choice = open_device("auto")
    assert len(caught) == 1
    assert isinstance(opened, CpuDevice)
    assert choice.is_fallback
    text = "\n".join(describe())
    assert "device: CPU, because no GPU is usable" in text


def test_a_gpu_that_cannot_be_opened_is_a_reason_too(fake: FakeCuda) -> None:
    fake.failing["cudaSetDevice"] = 2
    with pytest.raises(ConfigError, match=r"cudaErrorMemoryAllocation"):
        open_device("cuda:0")
    with pytest.warns(RuntimeWarning, match="cudaErrorMemoryAllocation"):
        opened, choice = open_device("auto")
    assert isinstance(opened, CpuDevice)
    assert choice.is_fallback


def test_one_unusable_gpu_beside_a_usable_one_is_skipped(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = fake.cudaGetDeviceProperties

    def first_is_old(index: int) -> tuple[object, ...]:
        fake.capability = (7, 0) if index == 0 else (9, 0)
        return properties(index)

    monkeypatch.setattr(fake, "cudaGetDeviceProperties", first_is_old)
    assert survey().problem is None
    choice = choose("auto", survey())
    assert choice.gpu is not None
    assert choice.gpu.index == 1
    with pytest.raises(ConfigError, match=r"device='cuda:0'.*not usable.*7\.0"):
        choose("cuda:0", survey())


def test_the_report_names_every_gpu_with_its_memory(fake: FakeCuda) -> None:
    report = probe()
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    assert all(gpu.free_bytes == gpu.total_bytes == fake.total_bytes for gpu in report.gpus)
    assert fake.context == 0
    assert not any(fake.retained.values())
    lines = describe("cuda:1", report)
    assert lines[0] == "CUDA driver: 13.0"
    assert (
        "GPU 1: Fake GPU, compute capability 9.0, 132 SMs, 1.0 GiB (1.0 GiB free), PCI 0000:01:00.0"
        in lines
    )
    assert lines[-1] == "device: GPU 1 (Fake GPU), because device='cuda:1' asks for it"
    assert describe("gpu7", report)[-1].startswith("device: none; device='gpu7'")


def test_a_gpu_that_refuses_a_context_is_reported_and_its_memory_unknown(fake: FakeCuda) -> None:
    fake.failing["cuDevicePrimaryCtxRetain"] = 2
    report = probe()
    assert all(gpu.free_bytes is None for gpu in report.gpus)
    text = "\n".join(describe(report=report))
    assert "free unknown" in text
    assert "refuses a context: cuDevicePrimaryCtxRetain: cudaErrorMemoryAllocation" in text


def test_a_survey_makes_no_context(fake: FakeCuda) -> None:
    survey()
    assert fake.contexts_made == set()
    assert fake.calls["cuDevicePrimaryCtxRetain"] == 0
