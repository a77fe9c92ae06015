"""Arguments: what every backend checks before it stores, attends or merges."""

from __future__ import annotations

import torch

from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import PagedTables, PoolView


def check_store(
    pool: PoolView, k: torch.Tensor, v: torch.Tensor, token_slots: torch.Tensor
) -> None:
    """Raise TypeError or ValueError unless k and v fit the pool and each token has its place."""
    layout = pool.layout
    shape = (token_slots.numel(), layout.num_kv_heads, layout.head_dim)
    if token_slots.dtype != torch.int64 or token_slots.dim() != 1:
        raise TypeError(
            f"token_slots of {token_slots.dtype} and shape {tuple(token_slots.shape)}: "
            f"must be torch.int64 and flat"
        )
    for name, tensor in (("k", k), ("v", v)):
        _check_rows(name, tensor, pool)
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: must be {shape}")


def check_attend(pool: PoolView, q: torch.Tensor, tables: PagedTables, window: int | None) -> int:
    """Raise TypeError or ValueError unless q fits the pool and the tables.

    Returns
    -------
    Query heads that share one head of K and V.
    """
    layout = pool.layout
    _check_rows("q", q, pool)
    if q.dim() != 3 or q.shape[0] != tables.num_rows or q.shape[2] != layout.head_dim:
        raise ValueError(
            f"q of shape {tuple(q.shape)}: must be "
            f"({tables.num_rows}, a multiple of {layout.num_kv_heads}, {layout.head_dim})"
        )
    if q.shape[1] == 0 or q.shape[1] % layout.num_kv_heads:
        raise ValueError(f"q of {q.shape[1]} heads: must be a multiple of {layout.num_kv_heads}")
    if tables.block_table.device != pool.data.device:
        raise ValueError(
            f"tables on {tables.block_table.device}: the pool is on {pool.data.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, or None")
    return q.shape[1] // layout.num_kv_heads


def check_page_lse(
    page_lse: PageLse,
    q: torch.Tensor,
    tables: PagedTables,
    parts: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise TypeError or ValueError unless it is of the backend's kind and has room for rows, heads and pages."""
    values = page_lse.values
    if values.dtype != dtype:
        raise TypeError(f"page_lse of {values.dtype}: must be {dtype}")
    if page_lse.parts != parts:
        raise ValueError(f"page_lse of {page_lse.parts} parts a page: must be {parts} here")
    wanted = (q.shape[0], page_lse.num_pages * parts, q.shape[1])
    if values.shape != wanted or not values.is_contiguous():
        raise ValueError(
            f"page_lse of shape {tuple(values.shape)}: must be {wanted} and contiguous"
        )
    if page_lse.num_pages < tables.max_pages:
        raise ValueError(
            f"page_lse of {page_lse.num_pages} pages: must be at least {tables.max_pages}"
        )
    if values.device != q.device:
        raise ValueError(f"page_lse on {values.device}: must be on {q.device}, as q")


def check_mass(page_lse: PageLse, lse: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless both are of the same rows and heads, dtype and device."""
    values = page_lse.values
    if lse.dtype != values.dtype:
        raise TypeError(f"lse of {lse.dtype}: must be {values.dtype}, as page_lse")
    if lse.shape != (values.shape[0], values.shape[2]) or lse.device != values.device:
        raise ValueError(
            f"lse of shape {tuple(lse.shape)} on {lse.device}: page_lse is of {values.shape[0]} rows and "
            f"{values.shape[2]} heads on {values.device}"
        )


def check_merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    """Raise ValueError unless there is at least one partial result and all have one shape."""
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{len(outs)} outputs with {len(lses)} lse: must be as many, at least one")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"partial result of shapes {tuple(out.shape)}, {tuple(lse.shape)}: "
                f"must be {tuple(outs[0].shape)}, {tuple(outs[0].shape[:-1])}"
            )


def _check_rows(name: str, tensor: torch.Tensor, pool: PoolView) -> None:
    if tensor.dtype != pool.data.dtype:
        raise TypeError(f"{name}.dtype={tensor.dtype}: must be {pool.data.dtype}, as the pool's")
    if tensor.device != pool.data.device:
        raise ValueError(f"{name}.device={tensor.device}: must be {pool.data.device}, the pool's")
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} of strides {tensor.stride()}: the last must be 1")
