"""InPlaceAttention: attention over pages in host memory, where they lie, by the native core."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem._core import AttentionInstructions, CpuAttention, FloatType
from tiermem.attention.cpus import usable_cpus
from tiermem.attention.pool_view import PagedTables, PoolView

FLOAT_TYPES = {
    torch.float16: FloatType.FLOAT16,
    torch.bfloat16: FloatType.BFLOAT16,
    torch.float32: FloatType.FLOAT32,
}


class InPlaceAttention:
    """Threads that attend over pages in host memory.

    Parameters
    ----------
    threads: that compute, the caller's included; None: one for each CPU that this process may use.
    instructions: that compute; AUTO: the widest of this processor.

    Raises
    ------
    ValueError: no thread, more threads than CPUs, or instructions that this processor lacks.
    """

    def __init__(
        self,
        threads: int | None = None,
        instructions: AttentionInstructions = AttentionInstructions.AUTO,
    ) -> None:
        cpus = usable_cpus()
        if threads is not None and not 1 <= threads <= cpus:
            raise ValueError(f"threads={threads}: must be 1 to {cpus}, the CPUs of this process")
        self._native = CpuAttention(threads or cpus, instructions=instructions)
        if instructions is AttentionInstructions.AUTO:
            _warn_of(self._native.instructions)

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's included."""
        return self._native.num_threads

    @property
    def instructions(self) -> AttentionInstructions:
        """Those in use."""
        return self._native.instructions

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
        page_lse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See AttentionBackend.attend, whose arguments were checked.

        `page_lse`, if any, receives each row's log-sum-exp over each page alone: (rows, heads, max_pages)
        float32, contiguous; -inf for a page of which the row sees nothing, and past the last one.
        exp(page_lse - lse) is the page's share of a row's attention.

        Raises
        ------
        TypeError: an output dtype other than float16, bfloat16 and float32, or another one of page_lse.
        ValueError: a row sees a page whose slot the pool does not have; page_lse of another shape.
        """
        if out_dtype not in FLOAT_TYPES:
            raise TypeError(
                f"out_dtype={out_dtype}: must be one of {', '.join(map(str, FLOAT_TYPES))}"
            )
        if page_lse is not None:
            check_page_lse(page_lse, (*q.shape[:2], tables.max_pages))
        out = torch.empty(q.shape, dtype=out_dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        layout, max_pages = pool.layout, tables.max_pages
        starts = tables.page_starts
        self._native.attend(
            kv_type=FLOAT_TYPES[pool.data.dtype],
            num_kv_heads=layout.num_kv_heads,
            page_tokens=layout.page_tokens,
            head_dim=layout.head_dim,
            slices=slice_addresses(pool, layer, tables),
            starts=None if starts is None else np.ascontiguousarray(starts[:, :max_pages].numpy()),
            num_pages=tables.num_pages.numpy(),
            kv_end=tables.kv_end.numpy(),
            row_starts=tables.row_starts.numpy(),
            q_start=tables.q_start.numpy(),
            q=q.data_ptr(),
            row_stride=q.stride(0),
            head_stride=q.stride(1),
            num_heads=q.shape[1],
            scale=scale,
            window=window,
            out=out.data_ptr(),
            out_type=FLOAT_TYPES[out_dtype],
            lse=lse.data_ptr(),
            page_lse=None if page_lse is None else page_lse.data_ptr(),
        )
        return out, lse


def check_page_lse(page_lse: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless it is what the core writes to."""
    if page_lse.dtype != torch.float32:
        raise TypeError(f"page_lse of {page_lse.dtype}: must be torch.float32")
    if page_lse.shape != shape or not page_lse.is_contiguous():
        raise ValueError(
            f"page_lse of shape {tuple(page_lse.shape)}: must be {shape} and contiguous"
        )
    if page_lse.device.type != "cpu":
        raise ValueError(f"page_lse on {page_lse.device}: must be in host memory")


def slice_addresses(pool: PoolView, layer: int, tables: PagedTables) -> NDArray[np.int64]:
    """(B, max_pages): the address of each page's layer slice; 0 for slots that the pool does not have."""
    slots = tables.block_table[:, : tables.max_pages].numpy().astype(np.int64)
    item_bytes = pool.data.element_size()
    base = pool.data.data_ptr() + pool.layer_offset(layer) * item_bytes
    there = (slots >= 0) & (slots < pool.num_slots)
    return np.where(there, base + slots * (pool.slot_items * item_bytes), 0)


@functools.cache
def _warn_of(instructions: AttentionInstructions) -> None:
    """Warn, once, where attention must do without vector instructions."""
    if instructions is AttentionInstructions.PORTABLE:
        warnings.warn(
            "no AVX2: attention on the CPU is several times slower than with it",
            RuntimeWarning,
            stacklevel=4,
        )
