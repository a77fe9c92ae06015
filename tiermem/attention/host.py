"""HostBackend: attention on the CPU.

Decoding and short chunks are the native core's, over pages where they lie. Long chunks go through torch,
whose matrix products are faster then: a sequence's pages are gathered a chunk of keys at a time, so that
memory stays bounded whatever the context length, and each chunk is folded into a running softmax (Milakov
and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem._core import AttentionInstructions
from tiermem.attention.arguments import check_attend, check_merge, check_store
from tiermem.attention.in_place import InPlaceAttention
from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.layout import PageLayout

LONG_ROWS = 64
"""Query rows of a sequence from which on torch attends."""
TILE_ROWS = 256
"""Query rows that go through a chunk of keys together."""
SCORE_ITEMS = 1 << 20
"""Scores of a tile of rows and a chunk of keys, about: 4 MiB, near what the second-level caches hold.
On two cores, 512 rows over 8,192 tokens took 83 ms so, 117 to 133 with four or sixteen times as many."""
CHUNK_TOKENS = range(256, 4097)
"""Keys of a chunk: fewer cost more calls than work, more only memory."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """One sequence's query rows, and the positions that at least one of them may see."""

    sequence: int
    start: int
    """First row in q."""
    end: int
    position: int
    """Position of the first row."""
    seen_start: int
    """First position that any row sees."""
    seen_end: int
    """One past the last position that any row sees."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some of the keys and values that a sequence's rows may see."""

    keys: torch.Tensor
    """(kv_heads, tokens, head_dim) float32"""
    values: torch.Tensor
    """As keys; 0 where no row of the sequence sees the token, since 0 * NaN would be NaN."""
    positions: torch.Tensor
    """(tokens,) int64"""
    first: int
    """The lowest of the positions."""
    last: int
    """The highest of the positions."""


@dataclass(frozen=True, slots=True)
class _Softmax:
    """A running softmax of one tile of rows, all float32 and updated in place."""

    queries: torch.Tensor
    """(kv_heads, rows * group, head_dim), scaled"""
    peak: torch.Tensor
    """(kv_heads, rows * group, 1): the highest score so far"""
    total: torch.Tensor
    """As peak: the sum of exp(score - peak)"""
    weighted: torch.Tensor
    """As queries: the sum of exp(score - peak) * value"""
    row_start: int
    """First row in the sequence."""
    num_rows: int


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention of each query row over the stored tokens that it may see."""
        group = check_attend(pool, q, tables, window)
        if tables.max_rows < LONG_ROWS:
            return self._in_place.attend(
                pool, layer, q, tables, scale=scale, window=window, out_dtype=out_dtype
            )
        out = torch.zeros(q.shape, dtype=out_dtype)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32)
        pages = pool.layer_pages(layer)
        for rows in _rows_of(tables, window):
            tiles = [
                _start_softmax(
                    q[start : min(start + TILE_ROWS, rows.end)], group, scale, start - rows.start
                )
                for start in range(rows.start, rows.end, TILE_ROWS)
            ]
            chunk_tokens = _chunk_tokens(tiles[0])
            for chunk in _chunks(pages, tables, rows, chunk_tokens):
                for tile in tiles:
                    _fold(tile, chunk, rows, window)
            for tile in tiles:
                start = rows.start + tile.row_start
                _finish(
                    tile, out[start : start + tile.num_rows], lse[start : start + tile.num_rows]
                )
        return out, lse

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


def _rows_of(tables: PagedTables, window: int | None) -> Iterator[_Rows]:
    """Each sequence that has query rows and may see something."""
    row_starts = tables.row_starts.tolist()
    kv_ends = tables.kv_end.tolist()
    for sequence, position in enumerate(tables.q_start.tolist()):
        start, end = row_starts[sequence : sequence + 2]
        seen_start = 0 if window is None else max(0, position - window + 1)
        seen_end = min(kv_ends[sequence], position + end - start)
        if start < end and seen_start < seen_end:
            yield _Rows(sequence, start, end, position, seen_start, seen_end)


def _chunk_tokens(tile: _Softmax) -> int:
    """Keys that a chunk should have, so that a tile's scores stay within SCORE_ITEMS."""
    wanted = SCORE_ITEMS // tile.total.numel()
    return min(max(wanted, CHUNK_TOKENS.start), CHUNK_TOKENS.stop - 1)


def _seen_pages(
    tables: PagedTables, rows: _Rows, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and first positions, both int64, of the pages in which some row may see a token."""
    num_pages = int(tables.num_pages[rows.sequence])
    slots = tables.block_table[rows.sequence, :num_pages].long()
    if tables.page_starts is None:
        first = rows.seen_start // page_tokens
        end = min(num_pages, -(-rows.seen_end // page_tokens))
        return slots[first:end], torch.arange(first, end) * page_tokens
    starts = tables.page_starts[rows.sequence, :num_pages].long()
    seen = (starts < rows.seen_end) & (starts + page_tokens > rows.seen_start)
    return slots[seen], starts[seen]


def _chunks(
    pages: torch.Tensor, tables: PagedTables, rows: _Rows, chunk_tokens: int
) -> Iterator[_Chunk]:
    """What a sequence's rows may see, about `chunk_tokens` at a time."""
    page_tokens = pages.shape[3]
    slots, starts = _seen_pages(tables, rows, page_tokens)
    chunk_pages = max(1, chunk_tokens // page_tokens)
    offsets = torch.arange(page_tokens)
    for begin in range(0, slots.numel(), chunk_pages):
        some = slice(begin, begin + chunk_pages)
        first, last = int(starts[some].min()), int(starts[some].max()) + page_tokens - 1
        positions = (starts[some, None] + offsets).flatten()
        keys = _gather(pages[:, 0], slots[some])
        values = _gather(pages[:, 1], slots[some])
        if first < rows.seen_start or last >= rows.seen_end:
            unseen = (positions < rows.seen_start) | (positions >= rows.seen_end)
            values.masked_fill_(unseen[:, None], 0.0)
        yield _Chunk(keys, values, positions, first, last)


def _gather(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(slots, kv_heads, page_tokens, head_dim) to (kv_heads, tokens, head_dim) float32, a copy."""
    _, heads, page_tokens, head_dim = pages.shape
    gathered = pages.index_select(0, slots).transpose(0, 1)
    tokens = torch.empty(gathered.shape, dtype=torch.float32).copy_(gathered)
    return tokens.view(heads, slots.numel() * page_tokens, head_dim)


def _start_softmax(q: torch.Tensor, group: int, scale: float, row_start: int) -> _Softmax:
    """A running softmax that has seen nothing; q is (rows, q_heads, head_dim)."""
    num_rows, q_heads, head_dim = q.shape
    heads = q_heads // group
    grouped = q.reshape(num_rows, heads, group, head_dim).transpose(0, 1)
    queries = grouped.reshape(heads, num_rows * group, head_dim).float() * scale
    peak = torch.full((*queries.shape[:2], 1), -math.inf)
    return _Softmax(
        queries, peak, torch.zeros_like(peak), torch.zeros_like(queries), row_start, num_rows
    )


def _fold(tile: _Softmax, chunk: _Chunk, rows: _Rows, window: int | None) -> None:
    """Add a chunk of keys to a tile's softmax."""
    first_row = rows.position + tile.row_start
    last_row = first_row + tile.num_rows - 1
    if chunk.first > last_row or (window is not None and chunk.last <= first_row - window):
        return
    scores = torch.bmm(tile.queries, chunk.keys.transpose(1, 2))
    all_seen = chunk.last <= first_row and chunk.last < rows.seen_end
    if not all_seen or (window is not None and chunk.first <= last_row - window):
        unseen = ~_seen(tile, chunk, rows, window)
        by_row = scores.view(scores.shape[0], tile.num_rows, -1, scores.shape[2])
        by_row.masked_fill_(unseen[None, :, None, :], -math.inf)
    peak = torch.maximum(tile.peak, scores.amax(-1, keepdim=True))
    weights = scores.sub_(_finite(peak)).exp_()
    decay = torch.exp(tile.peak - _finite(peak))
    tile.total.mul_(decay).add_(weights.sum(-1, keepdim=True))
    tile.weighted.mul_(decay).baddbmm_(weights, chunk.values)
    tile.peak.copy_(peak)


def _seen(tile: _Softmax, chunk: _Chunk, rows: _Rows, window: int | None) -> torch.Tensor:
    """(rows, tokens) bool: which row of the tile sees which token of the chunk."""
    first_row = rows.position + tile.row_start
    row_positions = torch.arange(first_row, first_row + tile.num_rows)[:, None]
    seen = (chunk.positions <= row_positions) & (chunk.positions < rows.seen_end)
    if window is not None:
        seen &= chunk.positions > row_positions - window
    return seen


def _finish(tile: _Softmax, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write a tile's output and lse, (rows, q_heads, head_dim) and (rows, q_heads)."""
    heads, _, head_dim = tile.queries.shape
    by_row = (tile.weighted / _positive(tile.total)).view(heads, tile.num_rows, -1, head_dim)
    out.view(tile.num_rows, heads, -1, head_dim).copy_(by_row.transpose(0, 1))
    lse_by_row = (tile.peak + torch.log(tile.total)).view(heads, tile.num_rows, -1)
    lse.view(tile.num_rows, heads, -1).copy_(lse_by_row.transpose(0, 1))


def _finite(peak: torch.Tensor) -> torch.Tensor:
    """The peak, or 0 where nothing was seen: -inf - -inf would be NaN."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _positive(total: torch.Tensor) -> torch.Tensor:
    """The sum, or 1 where nothing was seen: 0 / 0 would be NaN."""
    return torch.where(total > 0, total, 1.0)
