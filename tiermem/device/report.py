"""DeviceReport: what discovery found on this machine, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from tiermem.device.protocol import DeviceKind

LEAST_CAPABILITY = (7, 5)
"""The oldest GPU that the kernels are written for: a T4."""


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """One GPU as CUDA describes it.

    `free_bytes` is None where it was not asked for, which takes a context on the GPU, or where the
    GPU refused one. `problem` says why tiermem cannot use it.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None
    num_sms: int
    pci_bus_id: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """The GPUs of this machine, and why none is usable if none is.

    Versions are CUDA's numbers, 13000 for 13.0; None where cuda-python cannot say, 0 for no driver.
    """

    driver_version: int | None
    runtime_version: int | None
    torch_version: str
    torch_cuda_version: str | None
    gpus: tuple[GpuInfo, ...]
    problem: str | None

    def usable_gpus(self) -> tuple[GpuInfo, ...]:
        """The GPUs that tiermem can run on, by index."""
        if self.problem is not None:
            return ()
        return tuple(gpu for gpu in self.gpus if gpu.problem is None)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What a configured `device` means on this machine.

    `gpu` is None unless `kind` is CUDA. `is_fallback` says that a GPU was looked for in vain.
    """

    spec: str
    kind: DeviceKind
    gpu: GpuInfo | None
    reason: str
    is_fallback: bool = False


def version_text(version: int | None) -> str:
    """CUDA's number as people write it: 13000 is 13.0."""
    if not version:
        return "none"
    return f"{version // 1000}.{version % 1000 // 10}"


def report_lines(report: DeviceReport) -> list[str]:
    """The report as lines of text, a name and a value each."""
    torch_cuda = report.torch_cuda_version or "none"
    lines = [
        f"CUDA driver: {version_text(report.driver_version)}",
        f"CUDA runtime: {version_text(report.runtime_version)}",
        f"torch: {report.torch_version}, built for CUDA {torch_cuda}",
    ]
    lines += [f"GPU {gpu.index}: {_gpu_text(gpu)}" for gpu in report.gpus]
    if report.problem is not None:
        lines.append(f"no usable GPU: {report.problem}")
    return lines


def gib_text(num_bytes: int) -> str:
    """Bytes in GiB with one decimal."""
    return f"{num_bytes / (1 << 30):.1f} GiB"


def _gpu_text(gpu: GpuInfo) -> str:
    major, minor = gpu.compute_capability
    free = "free unknown" if gpu.free_bytes is None else f"{gib_text(gpu.free_bytes)} free"
    text = (
        f"{gpu.name}, compute capability {major}.{minor}, {gpu.num_sms} SMs, "
        f"{gib_text(gpu.total_bytes)} ({free}), PCI {gpu.pci_bus_id}"
    )
    return text if gpu.problem is None else f"{text}; not usable: {gpu.problem}"
