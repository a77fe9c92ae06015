"""Machine: what tells one machine and GPU from another, so that figures of one are not used on another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from tiermem.device.host import host_name, host_total_bytes
from tiermem.device.report import GpuInfo, version_text
from tiermem.fields import check_int, check_keys, refuse

NO_GPU = ""
MAX_TEXT = 200
RAM_UNIT_BYTES = 64 << 20
"""The system's own share of the memory differs a little from boot to boot."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER_VERSION = re.compile(r"\b[0-9]{3,4}(?:\.[0-9]{1,4}){1,2}\b")
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine with one of its GPUs, or with none: then the texts about the GPU are empty.

    ram_units: memory that this process may use, in units of 64 MiB. cores: those this process may use.
    """

    gpu: str
    gpu_uuid: str
    pci_bus_id: str
    driver: str
    cpu: str
    cores: int
    ram_units: int
    kernel: str

    @classmethod
    def here(cls, gpu: GpuInfo | None, driver_version: int | None = None) -> Machine:
        """This machine with `gpu`; `driver_version` is CUDA's number for what the driver supports."""
        return cls(
            gpu=NO_GPU if gpu is None else gpu.name,
            gpu_uuid=NO_GPU if gpu is None else _uuid(gpu.index),
            pci_bus_id=NO_GPU if gpu is None else gpu.pci_bus_id,
            driver=NO_GPU if gpu is None else _driver(driver_version),
            cpu=host_name(),
            cores=len(os.sched_getaffinity(0)),
            ram_units=host_total_bytes() // RAM_UNIT_BYTES,
            kernel=os.uname().release,
        )

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Machine:
        """The machine whose `to_table` gave `table`.

        Raises
        ------
        ConfigError: a key or a value that cannot be.
        """
        check_keys(table, [field.name for field in fields(cls)])
        return cls(
            cores=check_int("cores", table.get("cores"), 1, 1 << 20),
            ram_units=check_int("ram_units", table.get("ram_units"), 0, 1 << 40),
            **{name: _text(name, table.get(name)) for name in _TEXTS},
        )

    def to_table(self) -> dict[str, object]:
        """Names and plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def key(self) -> str:
        """Part of a file's name: "cpu", or what tells the GPU from the others of one machine."""
        if not self.gpu:
            return "cpu"
        return _UNSAFE.sub("-", self.gpu_uuid or self.pci_bus_id or self.gpu).strip("-")[:64]

    def difference(self, other: Machine) -> str | None:
        """The first thing in which `other` differs, as text; None where it is the same machine."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {theirs!r}, here {mine!r}"
        return None


_TEXTS = ("gpu", "gpu_uuid", "pci_bus_id", "driver", "cpu", "kernel")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise refuse(key, value, f"text of at most {MAX_TEXT} characters")
    return value


def _uuid(index: int) -> str:
    """The GPU's own number as torch gives it; empty where it cannot."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return ""
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


def _driver(driver_version: int | None) -> str:
    """The driver's version, or what CUDA it supports where the system does not tell."""
    with suppress(OSError):
        match = _DRIVER_VERSION.search(_DRIVER_FILE.read_text()[:1000])
        if match:
            return match[0]
    return f"CUDA {version_text(driver_version)}"
