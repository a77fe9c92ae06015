"""Launches: a call of the backend worked out once, to be repeated for every layer at little cost."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING, Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tiermem.attention.kernels import tiles, variants
from tiermem.attention.kernels.compiled import CompiledKernels, Variant
from tiermem.attention.kernels.tiles import DecodeTile, Tile
from tiermem.attention.kernels.variants import Operands
from tiermem.attention.pool_view import PagedTables, PoolView, ProductMath

if TYPE_CHECKING:
    from tiermem.attention.kernels.backend import TritonBackend

LOG2_E = 1.0 / log(2.0)
WIDEST_WINDOW = 1 << 30
"""Wider windows show everything: positions stay below 2^31, and so must position - window in int32."""
MOST_ROWS = 2**31 - 1
"""Rows of a descriptor are counted in int32."""
STORE_PER_CALL = 4
ATTEND_PER_CALL = 6
"""Parameters of the kernels, the first ones, that differ from layer to layer."""


class StoreLaunch:
    """Store K and V of one shape to one pool.

    It is repeated for k, v and token_slots of the same shapes, strides, dtypes, device and alignment.
    """

    def __init__(
        self,
        backend: TritonBackend,
        kernels: CompiledKernels,
        pool: PoolView,
        k: torch.Tensor,
        v: torch.Tensor,
        token_slots: torch.Tensor,
    ) -> None:
        self.backend = backend
        self._pass = kernels.passed
        self._layer_offset = pool.layer_offset
        self._num_tokens = token_slots.numel()
        self._contiguous = token_slots.is_contiguous()
        tile = tiles.store_tile(self._num_tokens)
        self._grid = (-(-self._num_tokens // tile.block_tokens), pool.layout.num_kv_heads)
        variant = variants.store_variant(_operands(pool, 1, k, v), tile)
        self._static = _static(
            variant,
            STORE_PER_CALL,
            {
                "kv_ptr": kernels.passed(pool.data),
                "k_token_stride": k.stride(0),
                "k_head_stride": k.stride(1),
                "v_token_stride": v.stride(0),
                "v_head_stride": v.stride(1),
                "slot_items": pool.slot_items,
                "num_tokens": self._num_tokens,
            },
        )
        self._launch = kernels.launch(variant)

    def __call__(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, token_slots: torch.Tensor
    ) -> None:
        layer_offset = self._layer_offset(layer)
        if self._num_tokens == 0:
            return
        if not self._contiguous:
            token_slots = token_slots.contiguous()
        passed = self._pass
        self._launch(
            *self._grid, passed(k), passed(v), passed(token_slots), layer_offset, *self._static
        )


class AttendLaunch:
    """Attend queries of one shape over the pages of one pool that one object of tables names.

    It is repeated for q of the same shape, strides, dtype, device and alignment. The tables' and the pool's
    memory is that of the tensors that they held when this was made.
    """

    def __init__(
        self,
        backend: TritonBackend,
        kernels: CompiledKernels,
        pool: PoolView,
        q: torch.Tensor,
        tables: PagedTables,
        scale: float,
        window: int | None,
        out_dtype: torch.dtype,
    ) -> None:
        self.backend = backend
        self.pool = pool
        self._tables = tables
        self._kernels = kernels
        self._pass = kernels.passed
        self._device = q.device
        self._out_shape = q.shape
        self._out_dtype = out_dtype
        self._num_parts = 0
        self._grid = 0
        if tables.num_rows == 0:
            return
        self._operands = _operands(pool, q.shape[1] // pool.layout.num_kv_heads, q)
        self._widen = backend.math is ProductMath.FLOAT32 and pool.layout.dtype != "float32"
        self._early = backend.launches_early and not kernels.interpreted
        self._window = None if window is None else min(window, WIDEST_WINDOW)
        self._has_work = tables.work is not None and window is None
        tile = self._decode_tile()
        if tile is None:
            self._prepare_pages(q, scale)
        else:
            self._prepare_decode(q, scale, tile)
        self._prepare_merge()

    def __call__(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer_offset = self.pool.layer_offset(layer)
        device = self._device
        out = torch.empty(self._out_shape, dtype=self._out_dtype, device=device)
        lse = torch.empty(self._out_shape[:2], dtype=torch.float32, device=device)
        if self._grid == 0:
            return out, lse
        passed = self._pass
        if self._num_parts == 0:
            self._launch(
                self._grid, 1, passed(q), passed(out), passed(lse), passed(out), passed(lse),
                layer_offset, *self._static,
            )  # fmt: skip
            return out, lse
        parts = torch.empty(self._part_items, dtype=torch.float32, device=device)
        part_lses = torch.empty(self._part_lse_items, dtype=torch.float32, device=device)
        results = (passed(out), passed(lse), passed(parts), passed(part_lses))
        self._launch(self._grid, 1, passed(q), *results, layer_offset, *self._static)
        self._merge(*self._merge_grid, *results, *self._merge_static)
        return out, lse

    # ---- preparing ---------------------------------------------------------------------------------

    def _decode_tile(self) -> DecodeTile | None:
        """The tile of the decode kernel that reads through a descriptor, if it can be used here."""
        operands = self._operands
        if not self._has_work or self._widen or not _describable(self.pool):
            return None
        return tiles.decode_tile(
            self.backend.capability, operands.head_dim, operands.dtype.itemsize, operands.group,
            operands.page_tokens,
        )  # fmt: skip

    def _prepare_decode(self, q: torch.Tensor, scale: float, tile: DecodeTile) -> None:
        work = self._tables.work
        assert work is not None
        self._grid = work.rows.shape[0] * self.pool.layout.num_kv_heads
        self._num_parts = work.num_partials
        variant = variants.decode_variant(self._operands, tile, self._out_dtype, early=self._early)
        values = {
            **self._common(q, tile.block_n),
            "work_ptr": self._pass(work.rows),
            "scale_log2": scale * LOG2_E,
        }
        self._launch = self._kernels.launch(variant)
        self._static = _static(variant, ATTEND_PER_CALL, values)

    def _prepare_pages(self, q: torch.Tensor, scale: float) -> None:
        tables = self._tables
        tile, num_tiles, num_splits = self._page_tile()
        starts = tables.block_table if tables.page_starts is None else tables.page_starts
        work = tables.work if self._has_work else None
        heads = self.pool.layout.num_kv_heads
        if work is None:
            self._grid = tables.num_sequences * num_tiles * num_splits * heads
            self._num_parts = num_splits * tables.num_rows if num_splits > 1 else 0
        else:
            self._grid = work.rows.shape[0] * heads
            self._num_parts = work.num_partials
        variant = variants.attend_variant(
            self._operands, tile, self._out_dtype,
            has_work=work is not None, has_starts=tables.page_starts is not None,
            has_window=self._window is not None, widen=self._widen, early=self._early,
        )  # fmt: skip
        values = {
            **self._common(q, tile.block_n if tile.described else None),
            "work_ptr": self._pass(tables.num_pages if work is None else work.rows),
            "page_starts_ptr": self._pass(starts),
            "row_starts_ptr": self._pass(tables.row_starts),
            "starts_stride": starts.stride(0),
            # The sign goes to q, so that the kernel's scale is positive.
            "scale_log2": abs(scale) * LOG2_E if scale else 1.0,
            "q_sign": 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0,
            "window": self._window or 0,
            "num_rows": tables.num_rows,
            "num_splits": num_splits,
            "num_tiles": num_tiles,
        }
        self._launch = self._kernels.launch(variant)
        self._static = _static(variant, ATTEND_PER_CALL, values)

    def _page_tile(self) -> tuple[Tile, int, int]:
        """The tile of the kernel for pages of any kind, tiles to a sequence, and even splits."""
        tables, layout, backend = self._tables, self.pool.layout, self.backend
        items = tables.max_rows * self._operands.group
        item_bytes = 4 if self._widen else layout.item_bytes
        tile = tiles.attend_tile(
            backend.capability, self._operands.head_block, item_bytes, items, layout.page_tokens,
            describable=_describable(self.pool) and tables.page_starts is None and not self._widen,
        )  # fmt: skip
        num_tiles = -(-items // tile.block_m)
        tokens = tables.max_pages * layout.page_tokens
        if self._window is not None:
            tokens = min(tokens, self._window + tables.max_rows)
        num_programs = tables.num_sequences * num_tiles * layout.num_kv_heads
        num_splits = tiles.split_count(num_programs, tokens, tile.block_n, backend.num_sms)
        return tile, num_tiles, num_splits

    def _prepare_merge(self) -> None:
        if self._num_parts == 0:
            return
        tables = self._tables
        work = tables.work if self._has_work else None
        heads, head_dim = self._out_shape[1:]
        self._part_items = self._num_parts * heads * head_dim
        self._part_lse_items = self._num_parts * heads
        splits = self._num_parts // tables.num_rows if work is None else work.max_splits
        tile = tiles.merge_tile(head_dim, splits)
        variant = variants.merge_variant(
            heads, head_dim, tile, torch.float32, self._out_dtype,
            has_work=work is not None, early=self._early,
        )  # fmt: skip
        self._merge_grid = (tables.num_rows * heads, -(-head_dim // tile.block_dim))
        self._merge = self._kernels.launch(variant)
        self._merge_static = _static(
            variant,
            4,
            {
                "work_ptr": self._pass(tables.num_pages if work is None else work.rows),
                "num_parts": splits,
                "num_rows": tables.num_rows,
            },
        )

    def _common(self, q: torch.Tensor, described: int | None) -> dict[str, Any]:
        """Arguments of both attention kernels; `described` is the tokens of a descriptor's tile."""
        tables, pool, passed = self._tables, self.pool, self._pass
        return {
            "kv_ptr": passed(pool.data),
            "kv_desc": None if described is None else _descriptor(pool, described),
            "block_table_ptr": passed(tables.block_table),
            "num_pages_ptr": passed(tables.num_pages),
            "kv_end_ptr": passed(tables.kv_end),
            "q_start_ptr": passed(tables.q_start),
            "q_row_stride": q.stride(0),
            "q_head_stride": q.stride(1),
            "table_stride": tables.block_table.stride(0),
            "slot_items": pool.slot_items,
        }


def launch_merge(
    kernels: CompiledKernels, parts: torch.Tensor, part_lses: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge (parts, rows, q_heads, head_dim) and (parts, rows, q_heads), both contiguous."""
    num_parts, num_rows, heads, head_dim = parts.shape
    out = parts.new_empty(parts.shape[1:], dtype=out_dtype)
    lse = torch.empty_like(part_lses[0])
    if out.numel() == 0:
        return out, lse
    tile = tiles.merge_tile(head_dim, num_parts)
    variant = variants.merge_variant(
        heads, head_dim, tile, parts.dtype, out_dtype, has_work=False, early=False
    )
    passed = kernels.passed
    values = {"work_ptr": passed(lse), "num_parts": num_parts, "num_rows": num_rows}
    kernels.launch(variant)(
        num_rows * heads, -(-head_dim // tile.block_dim),
        passed(out), passed(lse), passed(parts), passed(part_lses), *_static(variant, 4, values),
    )  # fmt: skip
    return out, lse


def _static(variant: Variant, first: int, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is passed for the parameters from number `first` on, the constants included."""
    names = variant.kernel.arg_names[first:]
    arguments = variant.arguments[first:]
    return tuple(
        values[name] if isinstance(argument, str) else argument
        for name, argument in zip(names, arguments, strict=True)
    )


def _operands(pool: PoolView, group: int, *rows: torch.Tensor) -> Operands:
    layout = pool.layout
    strides = [stride for tensor in rows for stride in (tensor.stride(0), tensor.stride(1))]
    return Operands(
        layout.num_kv_heads,
        group,
        layout.head_dim,
        layout.page_tokens,
        pool.data.dtype,
        aligned_rows=all(tensor.data_ptr() % 16 == 0 for tensor in rows)
        and all(stride % 16 == 0 for stride in strides),
        aligned_pool=pool.data.data_ptr() % 16 == 0 and pool.slot_items % 16 == 0,
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
