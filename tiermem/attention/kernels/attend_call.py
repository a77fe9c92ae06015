"""AttendCall: the arguments of one call to attend, and the launch that is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tiermem.attention.kernels import tiles, variants
from tiermem.attention.kernels.compiled import CompiledKernels
from tiermem.attention.kernels.driver import BoundLaunch
from tiermem.attention.kernels.launches import (
    ATTEND_CHANGING,
    MERGE_CHANGING,
    AttendLaunch,
    maker_of_empty,
    operands_of,
)
from tiermem.attention.kernels.tiles import DecodeTile, Tile
from tiermem.attention.kernels.variants import Operands
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import PagedTables, PoolView, ProductMath
from tiermem.attention.work_list import WorkList

if TYPE_CHECKING:
    from tiermem.attention.kernels.backend import TritonBackend

LOG2_E = 1.0 / log(2.0)
WIDEST_WINDOW = 1 << 30
"""Wider windows show everything: positions stay below 2^31, and so must position - window in int32."""
MOST_ROWS = 2**31 - 1
"""Rows of a descriptor are counted in int32."""


@dataclass(frozen=True, slots=True, eq=False)
class AttendCall:
    """Checked arguments of `attend`, with at least one row."""

    backend: TritonBackend
    kernels: CompiledKernels
    pool: PoolView
    q: torch.Tensor
    tables: PagedTables
    scale: float
    window: int | None
    out_dtype: torch.dtype
    page_lse: PageLse | None

    def prepare(self) -> AttendLaunch:
        """Choose kernels and tiles, compile what is new, and bind everything that stays."""
        tile = self._decode_tile()
        if tile is None:
            launch, num_parts, max_splits = self._bind_pages()
        else:
            launch, num_parts, max_splits = self._bind_decode(tile)
        heads, head_dim = self.q.shape[1:]
        sizes = [num_parts * heads * head_dim, num_parts * heads]
        memory = torch.empty(sum(sizes), dtype=torch.float32, device=self.q.device)
        parts, part_lses = memory.split(sizes)
        return AttendLaunch(
            self.backend, self.kernels, self.pool, *_results(self.q, self.out_dtype),
            launch, self._bind_merge(max_splits) if num_parts else None, memory,
            (self.kernels.passed(parts), self.kernels.passed(part_lses)),
        )  # fmt: skip

    # ---- what is chosen ----------------------------------------------------------------------------

    @property
    def _work(self) -> WorkList | None:
        return self.tables.work if self.window is None else None

    @property
    def _seen(self) -> int | None:
        """The window, narrow enough for the kernel's int32."""
        return None if self.window is None else min(self.window, WIDEST_WINDOW)

    @property
    def _widen(self) -> bool:
        layout = self.pool.layout
        return self.backend.math is ProductMath.FLOAT32 and layout.dtype != "float32"

    @property
    def _early(self) -> bool:
        return self.backend.launches_early and not self.kernels.interpreted

    @property
    def _part_tokens(self) -> int:
        """Tokens of each part of a page whose log-sum-exp is wanted; 0: none is."""
        if self.page_lse is None:
            return 0
        return self.pool.layout.page_tokens // self.page_lse.parts

    @property
    def _num_changing(self) -> int:
        return ATTEND_CHANGING + (self.page_lse is not None)

    @property
    def _operands(self) -> Operands:
        return operands_of(self.pool, self.q.shape[1] // self.pool.layout.num_kv_heads, self.q)

    def _decode_tile(self) -> DecodeTile | None:
        """The tile of the decode kernel that reads through a descriptor, if it can be used here."""
        if self._work is None or self._widen or not _describable(self.pool):
            return None
        layout = self.pool.layout
        return tiles.decode_tile(
            self.backend.capability, layout.head_dim, layout.item_bytes, self._operands.group,
            layout.page_tokens,
        )  # fmt: skip

    def _page_tile(self) -> tuple[Tile, int, int]:
        """The tile of the kernel for pages of any kind, tiles to a sequence, and even splits."""
        tables, layout, backend = self.tables, self.pool.layout, self.backend
        items = tables.max_rows * self._operands.group
        tile = tiles.attend_tile(
            backend.capability, self._operands.head_block,
            4 if self._widen else layout.item_bytes, items, layout.page_tokens,
            describable=_describable(self.pool) and tables.page_starts is None and not self._widen,
        )  # fmt: skip
        num_tiles = -(-items // tile.block_m)
        tokens = tables.max_pages * layout.page_tokens
        if self._seen is not None:
            tokens = min(tokens, self._seen + tables.max_rows)
        num_programs = tables.num_sequences * num_tiles * layout.num_kv_heads
        num_splits = tiles.split_count(num_programs, tokens, tile.block_n, backend.num_sms)
        return tile, num_tiles, num_splits

    # ---- what is bound -----------------------------------------------------------------------------

    def _bind_decode(self, tile: DecodeTile) -> tuple[BoundLaunch, int, int]:
        """The launch, partial results in all, and of the sequence that has most."""
        work = self._work
        assert work is not None
        variant = variants.decode_variant(
            self._operands, tile, self.out_dtype, early=self._early, part_tokens=self._part_tokens
        )
        values = {
            **self._common(tile.block_n),
            "work_ptr": self.kernels.passed(work.rows),
            "scale_log2": self.scale * LOG2_E,
        }
        grid = (work.rows.shape[0] * self.pool.layout.num_kv_heads, 1)
        launch = self.kernels.kernel(variant).bind(grid, self._num_changing, values)
        return launch, work.num_partials, work.max_splits

    def _bind_pages(self) -> tuple[BoundLaunch, int, int]:
        """As `_bind_decode`, for pages of any kind."""
        tables, work, passed = self.tables, self._work, self.kernels.passed
        tile, num_tiles, num_splits = self._page_tile()
        starts = tables.block_table if tables.page_starts is None else tables.page_starts
        variant = variants.attend_variant(
            self._operands, tile, self.out_dtype,
            has_work=work is not None, has_starts=tables.page_starts is not None,
            has_window=self._seen is not None, widen=self._widen, early=self._early,
            part_tokens=self._part_tokens,
        )  # fmt: skip
        values = {
            **self._common(tile.block_n if tile.described else None),
            "work_ptr": passed(tables.num_pages if work is None else work.rows),
            "page_starts_ptr": passed(starts),
            "row_starts_ptr": passed(tables.row_starts),
            "starts_stride": starts.stride(0),
            # The sign goes to q, so that the kernel's scale is positive.
            "scale_log2": abs(self.scale) * LOG2_E if self.scale else 1.0,
            "q_sign": 1.0 if self.scale > 0 else -1.0 if self.scale < 0 else 0.0,
            "window": self._seen or 0,
            "num_rows": tables.num_rows,
            "num_splits": num_splits,
            "num_tiles": num_tiles,
        }
        heads = self.pool.layout.num_kv_heads
        if work is None:
            num_programs = tables.num_sequences * num_tiles * num_splits * heads
            num_parts = num_splits * tables.num_rows if num_splits > 1 else 0
            max_splits = num_splits
        else:
            num_programs = work.rows.shape[0] * heads
            num_parts, max_splits = work.num_partials, work.max_splits
        kernel = self.kernels.kernel(variant)
        launch = kernel.bind((num_programs, 1), self._num_changing, values)
        return launch, num_parts, max_splits

    def _bind_merge(self, max_splits: int) -> BoundLaunch:
        tables, work, passed = self.tables, self._work, self.kernels.passed
        heads, head_dim = self.q.shape[1:]
        tile = tiles.merge_tile(head_dim, max_splits)
        variant = variants.merge_variant(
            heads, head_dim, tile, torch.float32, self.out_dtype,
            has_work=work is not None, early=self._early,
        )  # fmt: skip
        values = {
            "work_ptr": passed(tables.num_pages if work is None else work.rows),
            "num_parts": max_splits,
            "num_rows": tables.num_rows,
        }
        grid = (tables.num_rows * heads, -(-head_dim // tile.block_dim))
        return self.kernels.kernel(variant).bind(grid, MERGE_CHANGING, values)

    def _common(self, described: int | None) -> dict[str, Any]:
        """Arguments of both attention kernels; `described` is the tokens of a descriptor's tile."""
        tables, pool, passed = self.tables, self.pool, self.kernels.passed
        return {
            "kv_ptr": passed(pool.data),
            "kv_desc": None if described is None else _descriptor(pool, described),
            "block_table_ptr": passed(tables.block_table),
            "num_pages_ptr": passed(tables.num_pages),
            "kv_end_ptr": passed(tables.kv_end),
            "q_start_ptr": passed(tables.q_start),
            "q_row_stride": self.q.stride(0),
            "q_head_stride": self.q.stride(1),
            "table_stride": tables.block_table.stride(0),
            "slot_items": pool.slot_items,
            "page_lse_stride": None if self.page_lse is None else self.page_lse.values.stride(0),
        }


def without_rows(
    backend: TritonBackend,
    kernels: CompiledKernels,
    pool: PoolView,
    q: torch.Tensor,
    out_dtype: torch.dtype,
) -> AttendLaunch:
    """What is repeated where there are no rows: it returns results without any."""
    nothing = torch.empty(0, device=q.device)
    return AttendLaunch(
        backend, kernels, pool, *_results(q, out_dtype), None, None, nothing, (None, None),
    )  # fmt: skip


def _results(
    q: torch.Tensor, out_dtype: torch.dtype
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """What makes tensors for the output and for its lse."""
    return (
        maker_of_empty(q.shape, out_dtype, q.device),
        maker_of_empty(q.shape[:2], torch.float32, q.device),
    )


def _describable(pool: PoolView) -> bool:
    """Whether the pool is a matrix of rows of one token and head, as a descriptor needs it."""
    head_dim, data = pool.layout.head_dim, pool.data
    return (
        pool.slot_items % head_dim == 0
        and data.data_ptr() % 16 == 0
        and head_dim == tiles.next_power_of_2(head_dim)
        and 0 < data.numel() // head_dim <= MOST_ROWS
    )


def _descriptor(pool: PoolView, block_n: int) -> TensorDescriptor:
    head_dim = pool.layout.head_dim
    num_rows = pool.data.numel() // head_dim
    return TensorDescriptor(pool.data, [num_rows, head_dim], [head_dim, 1], [block_n, head_dim])
