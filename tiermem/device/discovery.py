"""Discovery: which GPUs this machine has, and which device a configuration means."""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import replace
from functools import cache

import torch

from tiermem.device.cpu import CpuDevice
from tiermem.device.host import host_free_bytes, host_name, host_total_bytes
from tiermem.device.protocol import Device, DeviceKind
from tiermem.device.report import DeviceChoice, DeviceReport, GpuInfo, gib_text, report_lines
from tiermem.errors import ConfigError, TransferError

ALLOWED = "'auto', 'cpu', 'cuda' or 'cuda:N'"


def survey() -> DeviceReport:
    """What GPUs there are and whether tiermem can use them; makes no context.

    `cudaGetDeviceCount` decides whether there is a GPU; torch and Triton must be able to use it
    too.
    """
    driver_version = runtime_version = None
    gpus: tuple[GpuInfo, ...] = ()
    problem = None
    try:
        from tiermem.device import cuda

        driver_version, runtime_version = cuda.versions()
        gpus = cuda.list_gpus()
    except (ImportError, RuntimeError) as error:
        problem = f"cuda-python does not work here: {error}"
    except (ConfigError, TransferError) as error:
        problem = str(error)
    return DeviceReport(
        driver_version=driver_version,
        runtime_version=runtime_version,
        torch_version=torch.__version__,
        torch_cuda_version=torch.version.cuda,
        gpus=gpus,
        problem=problem or _software_problem() or _hardware_problem(gpus),
    )


def probe() -> DeviceReport:
    """`survey()` with every GPU's free bytes; makes a context on each for a moment."""
    report = survey()
    return replace(report, gpus=tuple(_with_memory(gpu) for gpu in report.gpus))


def choose(spec: str, report: DeviceReport) -> DeviceChoice:
    """The device that `spec` means, given what there is.

    Parameters
    ----------
    spec: "auto" (a GPU if one is usable, else the CPU), "cpu", "cuda" (torch's current GPU) or
        "cuda:N".

    Raises
    ------
    ConfigError: an unknown spec, or a GPU that does not exist or cannot be used, and why.
    """
    if spec == "auto":
        return _choose_any(report)
    if spec == "cpu":
        return DeviceChoice(spec, DeviceKind.CPU, None, "device='cpu' asks for it")
    match = re.fullmatch(r"cuda(?::(\d+))?", spec) if isinstance(spec, str) else None
    if match is None:
        raise ConfigError(f"device={spec!r}: must be {ALLOWED}")
    gpu = _find_gpu(spec, match[1], report)
    return DeviceChoice(spec, DeviceKind.CUDA, gpu, f"device={spec!r} asks for it")


def open_device(spec: str) -> tuple[Device, DeviceChoice]:
    """Open the device that `spec` means, as `choose` says, and tell why it is that one.

    "auto" without a usable GPU opens the CPU device; the first time in a process it warns, with the
    reason.

    Raises
    ------
    ConfigError: as `choose`; or the GPU asked for cannot be opened.
    """
    choice = choose(spec, survey())
    if choice.gpu is not None:
        from tiermem.device.cuda_device import CudaDevice

        try:
            return CudaDevice(choice.gpu.index), choice
        except ConfigError as error:
            if spec != "auto":
                raise
            choice = _fall_back(str(error))
    if choice.is_fallback:
        _warn_once(f"tiermem runs on the CPU, which is slow: {choice.reason}")
    return CpuDevice(), choice


def describe(spec: str = "auto", report: DeviceReport | None = None) -> list[str]:
    """Lines of text: driver, every GPU with capability and memory, host, the choice and why."""
    report = probe() if report is None else report
    memory = f"{gib_text(host_total_bytes())} ({gib_text(host_free_bytes())} free)"
    return [*report_lines(report), f"host: {host_name()}, {memory}", _choice_text(spec, report)]


def _choice_text(spec: str, report: DeviceReport) -> str:
    try:
        choice = choose(spec, report)
    except ConfigError as error:
        return f"device: none; {error}"
    name = "CPU" if choice.gpu is None else f"GPU {choice.gpu.index} ({choice.gpu.name})"
    return f"device: {name}, because {choice.reason}"


def _choose_any(report: DeviceReport) -> DeviceChoice:
    usable = report.usable_gpus()
    if not usable:
        return _fall_back(report.problem or "no GPU is usable")
    current = torch.cuda.current_device()
    gpu = next((gpu for gpu in usable if gpu.index == current), usable[0])
    reason = f"device='auto' takes torch's current GPU, or else the first of {len(usable)} usable"
    return DeviceChoice("auto", DeviceKind.CUDA, gpu, reason)


def _fall_back(reason: str) -> DeviceChoice:
    return DeviceChoice("auto", DeviceKind.CPU, None, f"no GPU is usable: {reason}", True)


def _find_gpu(spec: str, index_text: str | None, report: DeviceReport) -> GpuInfo:
    if report.problem is not None:
        raise ConfigError(f"device={spec!r}: no GPU is usable: {report.problem}")
    index = torch.cuda.current_device() if index_text is None else int(index_text)
    if index >= len(report.gpus):
        last = len(report.gpus) - 1
        raise ConfigError(f"device={spec!r}: there is no such GPU; must be cuda:0 to cuda:{last}")
    gpu = report.gpus[index]
    if gpu.problem is not None:
        raise ConfigError(f"device={spec!r}: {gpu.name} is not usable: {gpu.problem}")
    return gpu


def _with_memory(gpu: GpuInfo) -> GpuInfo:
    from tiermem.device import cuda

    try:
        info = cuda.query_memory(gpu.index)
    except TransferError as error:
        return replace(gpu, problem=gpu.problem or f"it refuses a context: {error}")
    return replace(gpu, free_bytes=info.free_bytes)


def _software_problem() -> str | None:
    """Why torch or Triton could not use a GPU that CUDA shows."""
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) has no CUDA: pip install torch as pytorch.org says "
            "for CUDA 13"
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def _hardware_problem(gpus: tuple[GpuInfo, ...]) -> str | None:
    """Why no GPU is usable, if none is."""
    if any(gpu.problem is None for gpu in gpus):
        return None
    return "; ".join(f"{gpu.name}: {gpu.problem}" for gpu in gpus) or "there is no GPU"


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
