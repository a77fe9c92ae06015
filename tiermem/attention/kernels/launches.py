"""Launches: calls of the backend that were worked out once, repeated for every layer at little cost.

They refer neither to the pool's nor to the tables' object, which remember them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tiermem.attention.kernels import tiles, variants
from tiermem.attention.kernels.compiled import CompiledKernels
from tiermem.attention.kernels.driver import BoundLaunch
from tiermem.attention.kernels.variants import Operands
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import PoolView

if TYPE_CHECKING:
    from tiermem.attention.kernels.backend import TritonBackend

STORE_CHANGING, ATTEND_CHANGING, MERGE_CHANGING, MASS_CHANGING = 4, 6, 4, 3
"""Parameters of the kernels, the first ones, that differ from layer to layer. Attention has one more where the
log-sum-exp of pages is wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class StoreLaunch:
    """Store K and V of one shape to one pool.

    It is repeated for k, v and token_slots of the same shapes, strides, dtypes, device and alignment.
    """

    backend: TritonBackend
    kernels: CompiledKernels
    launch: BoundLaunch | None
    """None: there are no tokens."""

    def __call__(
        self, layer_offset: int, k: torch.Tensor, v: torch.Tensor, token_slots: torch.Tensor
    ) -> None:
        if self.launch is None:
            return
        kernels = self.kernels
        passed = kernels.passed
        self.launch(
            kernels.current_stream(), passed(k), passed(v), passed(token_slots.contiguous()),
            layer_offset,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class AttendLaunch:
    """Attend queries of one shape over the pages of one pool that one object of tables names.

    It is repeated on the same stream for q of the same shape, strides, dtype, device and alignment, and for
    page_lse of the same shape, or for none.
    """

    backend: TritonBackend
    kernels: CompiledKernels
    pool: PoolView
    new_out: Callable[[], torch.Tensor]
    new_lse: Callable[[], torch.Tensor]
    launch: BoundLaunch | None
    """None: there are no rows."""
    merge: BoundLaunch | None
    """None: there are no splits."""
    parts: torch.Tensor
    """Where splits leave their results. It stays: everything on a stream comes in order."""
    part_arguments: tuple[Any, Any]

    def __call__(
        self, stream: int, layer_offset: int, q: torch.Tensor, page_lse: PageLse | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.new_out(), self.new_lse()
        if self.launch is None:
            return out, lse
        passed = self.kernels.passed
        results = (passed(out), passed(lse), *self.part_arguments)
        if page_lse is None:
            self.launch(stream, passed(q), *results, layer_offset)
        else:
            self.launch(stream, passed(q), *results, layer_offset, passed(page_lse.values))
        if self.merge is not None:
            self.merge(stream, *results)
        return out, lse


def prepare_store(
    backend: TritonBackend,
    kernels: CompiledKernels,
    pool: PoolView,
    k: torch.Tensor,
    v: torch.Tensor,
    num_tokens: int,
) -> StoreLaunch:
    """The launch for arguments like these."""
    if num_tokens == 0:
        return StoreLaunch(backend, kernels, None)
    tile = tiles.store_tile(num_tokens)
    variant = variants.store_variant(operands_of(pool, 1, k, v), tile)
    values = {
        "kv_ptr": kernels.passed(pool.data),
        "k_token_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_token_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "slot_items": pool.slot_items,
        "num_tokens": num_tokens,
    }
    grid = (-(-num_tokens // tile.block_tokens), pool.layout.num_kv_heads)
    return StoreLaunch(backend, kernels, kernels.kernel(variant).bind(grid, STORE_CHANGING, values))


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
    grid = (num_rows * heads, -(-head_dim // tile.block_dim))
    launch = kernels.kernel(variant).bind(grid, MERGE_CHANGING, values)
    launch(kernels.current_stream(), passed(out), passed(lse), passed(parts), passed(part_lses))
    return out, lse


def bind_mass(kernels: CompiledKernels, page_lse: PageLse) -> BoundLaunch:
    """What makes the mass of page_lse of this shape: it takes a stream, mass, page_lse's values and lse."""
    num_rows, _, heads = page_lse.values.shape
    tile = tiles.mass_tile(heads)
    variant = variants.mass_variant(heads, page_lse.parts, tile)
    grid = (num_rows, -(-page_lse.num_pages // tile.block_pages))
    return kernels.kernel(variant).bind(grid, MASS_CHANGING, {"num_pages": page_lse.num_pages})


def maker_of_empty(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """What makes contiguous tensors, in half of the 4.3 microseconds that torch.empty takes each time."""
    like = torch.empty(0, dtype=dtype, device=device)
    stride = torch.empty(shape, device="meta").stride()
    return partial(like.new_empty_strided, shape, stride)


def operands_of(pool: PoolView, group: int, *rows: torch.Tensor) -> Operands:
    """What kernels work on: `group` query heads to a head of K and V, q (or k and v) in `rows`."""
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
