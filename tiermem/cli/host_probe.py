"""Host probe: processor, memory and what the native core can use of them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiermem import _core
from tiermem.device.host import host_free_bytes, host_name, host_total_bytes

FEATURES = (
    "avx2", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "asimd", "sve",
)  # fmt: skip
"""Flags of /proc/cpuinfo that matter to checksums and to attention on the CPU."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """`cores` are those this process may use; `features` those of FEATURES that the processor has."""

    processor: str
    cores: int
    features: tuple[str, ...]
    total_bytes: int
    free_bytes: int
    fast_checksum: bool
    kernel: str


def probe_host() -> HostReport:
    """Look at the machine."""
    fast = (_core.ChecksumPath.AVX512, _core.ChecksumPath.AVX2)
    return HostReport(
        processor=host_name(),
        cores=len(os.sched_getaffinity(0)),
        features=_features(),
        total_bytes=host_total_bytes(),
        free_bytes=host_free_bytes(),
        fast_checksum=any(_core.checksum_path_supported(path) for path in fast),
        kernel=os.uname().release,
    )


def _features() -> tuple[str, ...]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = set(value.split())
                return tuple(feature for feature in FEATURES if feature in flags)
    return ()
