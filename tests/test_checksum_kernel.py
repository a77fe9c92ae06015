"""The kernel of checksums: in the interpreter, compiled for every GPU, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tiermem.attention.kernels import report, tiles
from tiermem.attention.kernels.checksum import checksum_variant

HERE = Path(__file__).parent


def test_the_kernel_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_checksum.py"],
        cwd=HERE,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("capability", tiles.SHARED_BYTES)
@pytest.mark.parametrize("slice_bytes", [64 << 10, 1024])
def test_it_fits_without_spilling(capability: tuple[int, int], slice_bytes: int) -> None:
    for verify in (False, True):
        took = report.resources(checksum_variant(slice_bytes, verify=verify), capability)
        assert took.spilled_bytes == 0
        assert took.registers * took.num_warps * 32 <= 65536 // 2
        assert took.shared_bytes <= tiles.SHARED_BYTES[capability] // 2


@pytest.mark.parametrize("slice_bytes", [0, 8, 1032])
def test_slices_start_at_multiples_of_16_bytes(slice_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"slice_bytes={slice_bytes}: must be a multiple of 16"):
        checksum_variant(slice_bytes, verify=True)
