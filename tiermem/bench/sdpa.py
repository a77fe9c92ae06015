"""Sdpa: how fast torch's fused attention computes over contiguous K and V."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiermem.bench.kernel_cases import Heads
from tiermem.bench.run import Run
from tiermem.measure.timing import time_device

HEAD_DIM = 128
FUSED = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, slots=True)
class FusedRate:
    """The fastest of torch's implementations."""

    name: str
    flop_per_s: float


def best_sdpa(bench: Run, heads: Heads, rows: int, tokens: int) -> FusedRate:
    """`rows` queries over `tokens` tokens that all of them see, so that no FLOP is wasted on a mask."""
    on = bench.device.torch_device
    q, k, v = (
        torch.randn(1, count, length, HEAD_DIM, dtype=torch.float16, device=on)
        for count, length in ((heads.q, rows), (heads.kv, tokens), (heads.kv, tokens))
    )
    flop = 4 * HEAD_DIM * heads.q * rows * tokens

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    found = []
    for name, context in _ways(bench):
        try:
            with context, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of each reason why one is not used
                samples = time_device(bench.device, attend, bench.repeats, warmups=2)
        except RuntimeError:
            continue  # not for this GPU, or not for these shapes
        label = f"torch SDPA ({name}), as many FLOP, contiguous"
        found.append(FusedRate(label, flop / samples.median_s))
    return max(found, key=lambda rate: rate.flop_per_s)


def _ways(bench: Run) -> Iterator[tuple[str, AbstractContextManager[object]]]:
    if not bench.on_gpu:
        yield "CPU", nullcontext()
        return
    for name, backend in FUSED.items():
        yield name, sdpa_kernel([backend])
