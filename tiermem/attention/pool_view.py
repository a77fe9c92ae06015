"""PoolView and PagedTables: the stored K and V of a pool, and which of them each query row may see."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch

from tiermem.attention.work_list import WorkList
from tiermem.layout import PageLayout

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""The torch dtype of each dtype that a layout may name."""


class SlotHolds(enum.Enum):
    """What one slot of a pool holds."""

    WHOLE_PAGE = "whole page"
    """Every layer of a page, as in the hot and the warm pool: layer l starts l slices into the slot."""
    ONE_LAYER = "one layer"
    """One layer's slice of a page, as in a staging ring: whichever layer is asked for starts the slot."""


class ProductMath(enum.Enum):
    """What attention multiplies; sums and softmax are float32 always."""

    STORED = "stored"
    """Operands as they are stored: half precision runs on tensor cores where there are any."""
    FLOAT32 = "float32"
    """Operands widened to float32 first: slower, without the rounding of the softmax's weights to half."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """K and V pages in slots of one size, as a kernel sees them.

    Parameters
    ----------
    data: flat, contiguous, of the layout's dtype, on the device that attends.
    layout: shape and dtype of a page.
    slot_items: elements from the start of one slot to the start of the next.
    num_slots: slots in `data`.
    holds: whether a slot holds a whole page or one layer's slice of it.

    Raises
    ------
    TypeError, ValueError: `data` is not flat, of another dtype, or too short for the slots.
    """

    data: torch.Tensor
    layout: PageLayout
    slot_items: int
    num_slots: int
    holds: SlotHolds = SlotHolds.WHOLE_PAGE
    layer_stride: int = field(init=False, repr=False, compare=False)
    """Elements from a layer's slice to that of the next layer; 0 where a slot holds one."""
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """For backends alone: what they worked out for this view once."""

    def __post_init__(self) -> None:
        dtype = TORCH_DTYPES[self.layout.dtype]
        if self.data.dtype != dtype:
            raise TypeError(f"data.dtype={self.data.dtype}: the layout stores {dtype}")
        if self.data.dim() != 1 or not self.data.is_contiguous():
            raise ValueError(f"data of shape {tuple(self.data.shape)}: must be flat and contiguous")
        if self.slot_items < self.used_items:
            raise ValueError(
                f"slot_items={self.slot_items}: must be at least {self.used_items}, what a slot holds"
            )
        last_item = (self.num_slots - 1) * self.slot_items + self.used_items
        if self.num_slots < 0 or (self.num_slots > 0 and self.data.numel() < last_item):
            raise ValueError(
                f"num_slots={self.num_slots}: {self.data.numel()} elements do not hold them"
            )
        stride = 0 if self.holds is SlotHolds.ONE_LAYER else self.layout.layer_items
        object.__setattr__(self, "layer_stride", stride)

    @property
    def used_items(self) -> int:
        """Elements of a slot that hold K and V; the rest is padding."""
        if self.holds is SlotHolds.ONE_LAYER:
            return self.layout.layer_items
        return self.layout.num_layers * self.layout.layer_items

    def layer_offset(self, layer: int) -> int:
        """Elements from the start of a slot to `layer`'s slice.

        Raises
        ------
        ValueError: the layout has no such layer.
        """
        if not 0 <= layer < self.layout.num_layers:
            raise ValueError(f"layer={layer}: must be 0 to {self.layout.num_layers - 1}")
        return layer * self.layer_stride

    def layer_pages(self, layer: int) -> torch.Tensor:
        """One layer of every slot: a view (num_slots, 2, kv_heads, page_tokens, head_dim), K then V."""
        layout = self.layout
        size = (self.num_slots, 2, layout.num_kv_heads, layout.page_tokens, layout.head_dim)
        stride = (self.slot_items, layout.kv_items, layout.head_items, layout.head_dim, 1)
        offset = self.data.storage_offset() + self.layer_offset(layer)
        return self.data.as_strided(size, stride, offset)


@dataclass(frozen=True, slots=True)
class PagedTables:
    """Which stored tokens each query row may see. All tensors are int32 and on the pool's device.

    The token at offset t of the page in entry j of sequence b has position p = page_starts[b, j] + t, or
    j * page_tokens + t without `page_starts`. Query row r of sequence b has position
    q_start[b] + r - row_starts[b]. The row sees the token if p < kv_end[b] and p <= position(r) and, with
    a window, p > position(r) - window. What no row may see is never read, so it may hold anything.

    Parameters
    ----------
    block_table: (B, at least max_pages) slots; entries at or past num_pages are not looked at.
    page_starts: (B, at least max_pages) position of each page's first token, pages in any order; or None.
    num_pages: (B,) entries of each sequence, each from 0 to max_pages.
    kv_end: (B,) positions at or past this are not there yet.
    row_starts: (B + 1,) first query row of each sequence; the last is num_rows.
    q_start: (B,) position of each sequence's first query row.
    max_rows, max_pages: no sequence has more query rows or pages. They size the launch, so that nothing
        is read back from the device.
    num_rows: query rows of all sequences.
    work: how decoding is divided among programs, from the backend's `plan`; None: evenly. Only where each
        sequence has one row and pages are in order.

    Raises
    ------
    TypeError, ValueError: a tensor of another dtype or shape, or not all on one device.
    """

    block_table: torch.Tensor
    page_starts: torch.Tensor | None
    num_pages: torch.Tensor
    kv_end: torch.Tensor
    row_starts: torch.Tensor
    q_start: torch.Tensor
    max_rows: int
    max_pages: int
    num_rows: int
    work: WorkList | None = None
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """For backends alone: what they worked out for these tables once."""

    def __post_init__(self) -> None:
        batch = self.num_sequences
        _check_table("block_table", self.block_table, batch, self.max_pages)
        if self.page_starts is not None:
            _check_table("page_starts", self.page_starts, batch, self.max_pages)
        _check_vector("num_pages", self.num_pages, batch)
        _check_vector("kv_end", self.kv_end, batch)
        _check_vector("row_starts", self.row_starts, batch + 1)
        _check_vector("q_start", self.q_start, batch)
        starts = () if self.page_starts is None else (self.page_starts,)
        others = (*starts, self.num_pages, self.kv_end, self.row_starts, self.q_start)
        devices = {tensor.device for tensor in (self.block_table, *others)}
        if len(devices) > 1:
            raise ValueError(f"tables on {', '.join(sorted(map(str, devices)))}: must be on one")
        if self.work is not None:
            self._check_work(self.work)

    @property
    def num_sequences(self) -> int:
        """B, the sequences in the batch."""
        return self.num_pages.numel()

    def _check_work(self, work: WorkList) -> None:
        batch = self.num_sequences
        if self.page_starts is not None or self.max_rows != 1 or self.num_rows != batch:
            raise ValueError(
                f"a work list for {self.num_rows} rows of {batch} sequences, at most {self.max_rows} each: "
                f"must be one row each and pages in order"
            )
        if work.rows.shape[0] < batch:
            raise ValueError(f"a work list of {work.rows.shape[0]} rows: must be at least {batch}")
        if work.rows.device != self.num_pages.device:
            raise ValueError(
                f"a work list on {work.rows.device}: tables are on {self.num_pages.device}"
            )


def _check_table(name: str, table: torch.Tensor, batch: int, max_pages: int) -> None:
    if table.dtype != torch.int32:
        raise TypeError(f"{name}.dtype={table.dtype}: must be torch.int32")
    if table.dim() != 2 or table.shape[0] != batch or table.shape[1] < max_pages:
        raise ValueError(
            f"{name} of shape {tuple(table.shape)}: must be ({batch}, at least {max_pages})"
        )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(f"{name} of strides {table.stride()}: rows must be contiguous")


def _check_vector(name: str, vector: torch.Tensor, length: int) -> None:
    if vector.dtype != torch.int32:
        raise TypeError(f"{name}.dtype={vector.dtype}: must be torch.int32")
    if vector.shape != (length,) or not vector.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(vector.shape)}: must be ({length},), contiguous")
