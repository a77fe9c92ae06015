"""HostBackend: attention on the CPU, by the native core, over pages where they lie."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem._core import AttentionInstructions
from tiermem.attention.arguments import (
    check_attend,
    check_mass,
    check_merge,
    check_page_lse,
    check_store,
)
from tiermem.attention.in_place import InPlaceAttention
from tiermem.attention.page_lse import PageLse, PagePlaces
from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.layout import PageLayout


class HostBackend:
    """Attention on the CPU; see AttentionBackend. Everything is done on return.

    Parameters and errors: as InPlaceAttention.
    """

    def __init__(
        self,
        threads: int | None = None,
        instructions: AttentionInstructions = AttentionInstructions.AUTO,
    ) -> None:
        self._in_place = InPlaceAttention(threads, instructions)

    @property
    def threads(self) -> int:
        """Threads that attend over pages in place, the caller's included."""
        return self._in_place.threads

    def plan(self, layout: PageLayout, kv_lens: NDArray[np.int64]) -> None:
        """Nothing: there are no programs to divide work among."""

    def store(
        self,
        pool: PoolView,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        token_slots: torch.Tensor,
    ) -> None:
        """Write the K and V of n tokens to their places in the pool."""
        check_store(pool, k, v, token_slots)
        pages = pool.layer_pages(layer)
        kept = token_slots >= 0
        if not kept.all():
            k, v, token_slots = k[kept], v[kept], token_slots[kept]
        slots = token_slots // pool.layout.page_tokens
        offsets = token_slots % pool.layout.page_tokens
        pages[slots, 0, :, offsets] = k
        pages[slots, 1, :, offsets] = v

    def attend(
        self,
        pool: PoolView,
        layer: int,
        q: torch.Tensor,
        tables: PagedTables,
        *,
        scale: float,
        window: int | None,
        out_dtype: torch.dtype,
        page_lse: PageLse | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention of each query row over the stored tokens that it may see."""
        check_attend(pool, q, tables, window)
        found = None
        if page_lse is not None:
            check_page_lse(page_lse, q, tables, 1)
            found = torch.empty((*q.shape[:2], tables.max_pages), dtype=torch.float32)
        result = self._in_place.attend(
            pool, layer, q, tables,
            scale=scale, window=window, out_dtype=out_dtype, page_lse=found,
        )  # fmt: skip
        if page_lse is not None and found is not None:
            page_lse.place(found, PagePlaces.of_tables(tables, pool.layout.page_tokens))
        return result

    def new_page_lse(
        self, pool: PoolView, num_rows: int, num_heads: int, num_pages: int
    ) -> PageLse:
        """For calls to `attend` with this pool's layout."""
        return PageLse.empty(num_rows, num_heads, num_pages, pool.data.device)

    def page_mass(self, page_lse: PageLse, lse: torch.Tensor) -> torch.Tensor:
        """The share of each row's softmax that each page has."""
        check_mass(page_lse, lse)
        return page_lse.mass(lse)

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join results over disjoint sets of tokens into the result over all of them."""
        check_merge(outs, lses)
        lse = torch.stack(lses)
        peak = _finite(lse.amax(0))
        weights = torch.exp(lse - peak)
        total = weights.sum(0)
        out = torch.zeros(outs[0].shape, dtype=torch.float32)
        shares = (weights / _positive(total))[..., None]
        for part, share in zip(outs, shares, strict=True):
            out += torch.where(share > 0, part.float() * share, 0.0)
        return out.to(out_dtype), peak + torch.log(total)


def _finite(peak: torch.Tensor) -> torch.Tensor:
    """The peak, or 0 where nothing was seen: -inf - -inf would be NaN."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _positive(total: torch.Tensor) -> torch.Tensor:
    """The sum, or 1 where nothing was seen: 0 / 0 would be NaN."""
    return torch.where(total > 0, total, 1.0)
