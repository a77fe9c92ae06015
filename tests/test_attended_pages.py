"""Attention over host memory as it is timed: it reads every byte that it counts, and computes attention."""

from __future__ import annotations

import pytest
import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.measure.attended import GROUP, HEAD_DIM, KV_HEADS, LAYERS, AttendedPages

SLICE = 2 * KV_HEADS * 64 * HEAD_DIM * 2
"""Bytes of one layer of a page of 64 tokens."""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_output_is_attention_over_every_token(dtype: str) -> None:
    pages, layers = 3, LAYERS
    values = torch.randn(
        (pages, layers, 2, KV_HEADS, 64, HEAD_DIM), generator=torch.Generator().manual_seed(1)
    ).to(TORCH_DTYPES[dtype])
    attended = AttendedPages(values.flatten().view(torch.uint8), dtype, 1)
    assert attended.num_bytes == pages * layers * SLICE
    last = values[:, -1].double()  # (pages, 2, heads, tokens, head_dim)
    keys, vs = (last[:, i].transpose(0, 1).flatten(1, 2) for i in range(2))
    q = attended._q[0].double().unflatten(0, (KV_HEADS, GROUP))
    weights = torch.softmax(q @ keys.transpose(1, 2) * HEAD_DIM**-0.5, -1)
    wanted = (weights @ vs).flatten(0, 1)
    assert torch.allclose(attended()[0].double(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("num_bytes", "layers", "tokens", "pages"),
    [
        (64 << 10, 1, 16, 1), (128 << 10, 2, 16, 1), (SLICE, 1, 64, 1), (3 * SLICE + 4096, 3, 64, 1),
        (20 * SLICE, 8, 64, 2),
    ],
)  # fmt: skip
def test_pages_are_as_large_as_there_is_room_for(
    num_bytes: int, layers: int, tokens: int, pages: int
) -> None:
    attended = AttendedPages(torch.full((num_bytes,), 0x3F, dtype=torch.uint8), "float16", 1)
    layout = attended._pool.layout
    assert (layout.num_layers, layout.page_tokens) == (layers, tokens)
    assert attended._pool.num_slots == pages
    assert attended.num_bytes == pages * layers * tokens * SLICE // 64
    assert bool(attended().isfinite().all())


def test_threads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="threads=0"):
        AttendedPages(torch.zeros(SLICE, dtype=torch.uint8), "float16", 0)
