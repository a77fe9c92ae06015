"""The kernel that only reads, against NumPy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tiermem.attention.kernels.read import BLOCK_INTS, READ_BYTES, TURNS, fold
from tiermem.measure.ceilings import ROW_BYTES


def want(data: torch.Tensor) -> torch.Tensor:
    numbers = data.cpu().view(torch.int32).numpy().reshape(-1, TURNS * BLOCK_INTS)
    return torch.from_numpy(np.bitwise_xor.reduce(numbers, axis=1))


def random_bytes(parts: int, device: str) -> torch.Tensor:
    return torch.randint(0, 256, (parts * READ_BYTES,), dtype=torch.uint8, device=device)


def test_buffers_of_ceilings_are_whole_parts() -> None:
    assert ROW_BYTES % READ_BYTES == 0


def test_every_number_counts_in_the_interpreter() -> None:
    code = (
        "import torch; import test_read_kernel as t; data = t.random_bytes(2, 'cpu');"
        "assert torch.equal(t.fold(data), t.want(data))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=__file__.rpartition("/")[0],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_every_number_counts_on_a_gpu() -> None:
    data = random_bytes(1000, "cuda")
    assert torch.equal(fold(data).cpu(), want(data))
