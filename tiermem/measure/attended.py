"""AttendedPages: host memory as pages of K and V, over which the CPU attends one new token, layer by layer."""

from __future__ import annotations

import torch

from tiermem.attention.host import HostBackend
from tiermem.attention.pool_view import TORCH_DTYPES, PagedTables, PoolView
from tiermem.layout import PageLayout

KV_HEADS, GROUP, HEAD_DIM = 8, 8, 128
"""Of large models with grouped queries: a group is the query heads of one KV head."""
LAYERS = 8
"""At most: an eighth of the memory is what one call attends, about as much as in a layer of a long context."""
PAGE_TOKENS, FEW_TOKENS = 64, 16
"""A page's tokens, and where there is no room for a slice of so many."""


class AttendedPages:
    """Attends over all pages once when it is called; pages lie in slots of random order.

    Parameters
    ----------
    data: flat, uint8, on the host, of finite numbers in `dtype`; at least 64 KiB.
    dtype: "float16" or "bfloat16". threads: that attend.

    Raises
    ------
    ValueError: no thread, or more threads than CPUs.
    """

    def __init__(self, data: torch.Tensor, dtype: str, threads: int) -> None:
        layout = _layout(data.numel(), dtype)
        self._pool = PoolView(
            data.view(TORCH_DTYPES[dtype]),
            layout,
            layout.slot_bytes // layout.item_bytes,
            data.numel() // layout.slot_bytes,
        )
        self._tables = _tables(self._pool)
        make = torch.Generator().manual_seed(0)
        heads = (1, KV_HEADS * GROUP, HEAD_DIM)
        self._q = torch.randn(heads, generator=make).to(TORCH_DTYPES[dtype])
        self._backend = HostBackend(threads)

    @property
    def num_bytes(self) -> int:
        """K and V that one call reads."""
        layout = self._pool.layout
        return self._pool.num_slots * layout.num_layers * layout.layer_bytes

    def __call__(self) -> torch.Tensor:
        """Attend; the output (1, heads, head_dim) of the last layer, in float32."""
        for layer in range(self._pool.layout.num_layers):
            out, _ = self._backend.attend(
                self._pool, layer, self._q, self._tables,
                scale=HEAD_DIM**-0.5, window=None, out_dtype=torch.float32,
            )  # fmt: skip
        return out


def _layout(num_bytes: int, dtype: str) -> PageLayout:
    """Pages of as many layers as `num_bytes` hold one of."""
    one = PageLayout(1, KV_HEADS, HEAD_DIM, dtype, PAGE_TOKENS)
    tokens = PAGE_TOKENS if num_bytes >= one.layer_bytes else FEW_TOKENS
    slice_bytes = one.layer_bytes * tokens // PAGE_TOKENS
    layers = min(LAYERS, max(1, num_bytes // slice_bytes))
    return PageLayout(layers, KV_HEADS, HEAD_DIM, dtype, tokens)


def _tables(pool: PoolView) -> PagedTables:
    """One sequence of all pages, and a row behind its last token but one."""
    make = torch.Generator().manual_seed(0)
    slots = torch.randperm(pool.num_slots, generator=make, dtype=torch.int32)
    tokens = pool.num_slots * pool.layout.page_tokens
    one = torch.ones(1, dtype=torch.int32)
    return PagedTables(
        block_table=slots[None],
        page_starts=None,
        num_pages=one * pool.num_slots,
        kv_end=one * tokens,
        row_starts=torch.tensor([0, 1], dtype=torch.int32),
        q_start=one * (tokens - 1),
        max_rows=1,
        max_pages=pool.num_slots,
        num_rows=1,
    )
