"""ReferenceBackend: the plain, slow definition of what every other backend computes.

It looks at one sequence, head and query row at a time, in float64, and takes no short cut. Tests compare
with it; nothing else should call it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.attention.arguments import (
    check_attend,
    check_mass,
    check_merge,
    check_page_lse,
    check_store,
)
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.layout import PageLayout


class ReferenceBackend:
    """Attention by definition, on the CPU, in float64; see AttentionBackend.

    `out_dtype` may be float64 too: then the lse is float64 as well.
    """

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
        """Write each token's K and V to its place, one after the other."""
        check_store(pool, k, v, token_slots)
        pages = pool.layer_pages(layer)
        for row, place in enumerate(token_slots.tolist()):
            if place >= 0:
                slot, offset = divmod(place, pool.layout.page_tokens)
                pages[slot, 0, :, offset] = k[row]
                pages[slot, 1, :, offset] = v[row]

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
        """Attend each row over the tokens that it sees."""
        group = check_attend(pool, q, tables, window)
        if page_lse is not None:
            check_page_lse(page_lse, q, tables, 1, torch.float64)
        out = torch.zeros(q.shape, dtype=torch.float64)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
        for sequence in range(tables.num_sequences):
            first, end = tables.row_starts[sequence : sequence + 2].tolist()
            for row in range(first, end):
                position = int(tables.q_start[sequence]) + row - first
                keys, values, pages = _seen_tokens(pool, layer, tables, sequence, position, window)
                if keys.shape[1] == 0:
                    continue
                for head in range(q.shape[1]):
                    scores = keys[head // group] @ q[row, head].double() * scale
                    lse[row, head] = torch.logsumexp(scores, 0)
                    weights = torch.softmax(scores, 0)
                    out[row, head] = weights @ values[head // group]
                    if page_lse is not None:
                        _leave(page_lse.values[row, :, head], scores, pages)
        return out.to(out_dtype), lse.to(_lse_dtype(out_dtype))

    def new_page_lse(
        self, pool: PoolView, num_rows: int, num_heads: int, num_pages: int
    ) -> PageLse:
        """In float64."""
        return PageLse.empty(num_rows, num_heads, num_pages, pool.data.device, dtype=torch.float64)

    def page_mass(self, page_lse: PageLse, lse: torch.Tensor) -> torch.Tensor:
        """By definition; float64."""
        check_mass(page_lse, lse)
        return page_lse.mass(lse)

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Average the partial outputs, each weighted by exp(lse)."""
        check_merge(outs, lses)
        lse = torch.stack(lses).double()
        total = torch.logsumexp(lse, 0)
        weights = torch.where(lse == -math.inf, 0.0, torch.exp(lse - total))
        parts = torch.stack(outs).double().masked_fill((lse == -math.inf)[..., None], 0.0)
        out = (weights[..., None] * parts).sum(0)
        return out.to(out_dtype), total.to(_lse_dtype(out_dtype))


def _seen_tokens(
    pool: PoolView,
    layer: int,
    tables: PagedTables,
    sequence: int,
    position: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V, each (kv_heads, tokens, head_dim) float64, that the row at `position` sees, and the number of
    each token's page, (tokens,)."""
    pages = pool.layer_pages(layer)
    page_tokens = pool.layout.page_tokens
    seen, numbers = [pages[:0, :, :, 0]], []
    for entry in range(int(tables.num_pages[sequence])):
        slot = int(tables.block_table[sequence, entry])
        starts = tables.page_starts
        start = entry * page_tokens if starts is None else int(starts[sequence, entry])
        for offset in range(page_tokens):
            token = start + offset
            there = token < int(tables.kv_end[sequence]) and token <= position
            if there and (window is None or token > position - window):
                seen.append(pages[slot : slot + 1, :, :, offset])
                numbers.append(start // page_tokens)
    both = torch.cat(seen).double()
    return both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1), torch.tensor(numbers)


def _leave(page_lse: torch.Tensor, scores: torch.Tensor, pages: torch.Tensor) -> None:
    """Put the log-sum-exp of each page's scores in its place."""
    for page in pages.unique():
        page_lse[page] = torch.logsumexp(scores[pages == page], 0)


def _lse_dtype(out_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if out_dtype == torch.float64 else torch.float32
