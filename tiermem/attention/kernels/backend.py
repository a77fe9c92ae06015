"""TritonBackend: attention on a GPU through Triton kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import log

import torch
import triton

from tiermem.attention.arguments import check_attend, check_merge, check_store
from tiermem.attention.kernels import tiles
from tiermem.attention.kernels.attend import attend_pages
from tiermem.attention.kernels.merge import merge_parts
from tiermem.attention.kernels.store import store_tokens
from tiermem.attention.kernels.tiles import Capability
from tiermem.attention.pool_view import PagedTables, PoolView, ProductMath

LOG2_E = 1.0 / log(2.0)
STORE_TOKENS = 16
"""Tokens of one head that a program of the store kernel copies."""
WIDEST_WINDOW = 1 << 30
"""Wider windows show everything: positions stay below 2^31, and so must position - window in int32."""


class TritonBackend:
    """Attention through Triton kernels on the tensors' GPU; see AttentionBackend.

    Parameters
    ----------
    capability: the GPU's compute capability, which decides the tiles.
    num_sms: its multiprocessors, which decide the splits.
    math: what the products are made of.
    """

    def __init__(
        self, capability: Capability, num_sms: int, math: ProductMath = ProductMath.STORED
    ) -> None:
        self._capability = capability
        self._num_sms = num_sms
        self._math = math

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
        layout = pool.layout
        layer_offset = pool.layer_offset(layer)
        num_tokens = token_slots.numel()
        if num_tokens == 0:
            return
        with _on_device_of(pool.data):
            store_tokens[(triton.cdiv(num_tokens, STORE_TOKENS), layout.num_kv_heads)](
                k,
                v,
                token_slots.contiguous(),
                pool.data,
                k.stride(0),
                k.stride(1),
                v.stride(0),
                v.stride(1),
                pool.slot_items,
                layer_offset,
                num_tokens,
                KV_HEADS=layout.num_kv_heads,
                HEAD_DIM=layout.head_dim,
                HEAD_BLOCK=tiles.next_power_of_2(layout.head_dim),
                PAGE_TOKENS=layout.page_tokens,
                BLOCK_TOKENS=STORE_TOKENS,
                num_warps=4,
            )

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
        layout = pool.layout
        layer_offset = pool.layer_offset(layer)
        if tables.num_rows == 0:
            return q.new_empty(q.shape, dtype=out_dtype), q.new_empty(q.shape[:2]).float()
        head_block = tiles.next_power_of_2(layout.head_dim)
        items = tables.max_rows * group
        widen = self._math is ProductMath.FLOAT32 and layout.dtype != "float32"
        item_bytes = 4 if widen else layout.item_bytes
        tile = tiles.attend_tile(self._capability, head_block, item_bytes, items)
        num_tiles = triton.cdiv(items, tile.block_m)
        num_programs = tables.num_sequences * num_tiles * layout.num_kv_heads
        tokens = tables.max_pages * layout.page_tokens
        if window is not None:
            window = min(window, WIDEST_WINDOW)
            tokens = min(tokens, window + tables.max_rows)
        num_splits = tiles.split_count(num_programs, tokens, tile.block_n, self._num_sms)
        parts_dtype = out_dtype if num_splits == 1 else torch.float32
        out = q.new_empty((num_splits, *q.shape), dtype=parts_dtype)
        lse = q.new_empty((num_splits, *q.shape[:2]), dtype=torch.float32)
        starts = tables.block_table if tables.page_starts is None else tables.page_starts
        with _on_device_of(pool.data):
            attend_pages[(num_programs * num_splits,)](
                q,
                pool.data,
                tables.block_table,
                starts,
                tables.num_pages,
                tables.kv_end,
                tables.row_starts,
                tables.q_start,
                out,
                lse,
                q.stride(0),
                q.stride(1),
                tables.block_table.stride(0),
                starts.stride(0),
                pool.slot_items,
                layer_offset,
                scale * LOG2_E,
                0 if window is None else window,
                tables.num_rows,
                num_splits,
                num_tiles,
                KV_HEADS=layout.num_kv_heads,
                GROUP=group,
                HEAD_DIM=layout.head_dim,
                HEAD_BLOCK=head_block,
                PAGE_TOKENS=layout.page_tokens,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                NUM_STAGES=tile.num_stages,
                HAS_STARTS=tables.page_starts is not None,
                HAS_WINDOW=window is not None,
                WIDEN=widen,
                num_warps=tile.num_warps,
            )
        if num_splits == 1:
            return out[0], lse[0]
        return _merge(out, lse, out_dtype)

    def merge(
        self, outs: list[torch.Tensor], lses: list[torch.Tensor], out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join results over disjoint sets of tokens into the result over all of them."""
        check_merge(outs, lses)
        return _merge(torch.stack(outs), torch.stack(lses), out_dtype)


def _merge(
    parts: torch.Tensor, part_lses: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge (parts, rows, q_heads, head_dim) and (parts, rows, q_heads), both contiguous."""
    num_parts, num_rows, q_heads, head_dim = parts.shape
    out = parts.new_empty(parts.shape[1:], dtype=out_dtype)
    lse = torch.empty_like(part_lses[0])
    num_items = num_rows * q_heads
    if num_items == 0:
        return out, lse
    block_dim = min(64, tiles.next_power_of_2(head_dim))
    with _on_device_of(parts):
        merge_parts[(num_items, triton.cdiv(head_dim, block_dim))](
            parts,
            part_lses,
            out,
            lse,
            num_parts,
            num_items,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            BLOCK_PARTS=min(16, tiles.next_power_of_2(num_parts)),
            num_warps=1,
        )
    return out, lse


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device; in its interpreter tensors are on none."""
    return torch.cuda.device_of(tensor)
