# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that turns the log-sum-exp of pages into their mass."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mass_of_pages(
    mass_ptr,
    page_lse_ptr,
    lse_ptr,
    num_pages,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    """The share of its softmax that each page has, of one query row and BLOCK_PAGES pages.

    Grid: (num_rows, ceil(num_pages / BLOCK_PAGES)). mass (num_rows, HEADS, num_pages), page_lse (num_rows,
    num_pages * PARTS, HEADS) and lse (num_rows, HEADS) are contiguous; see PageLse.
    """
    row = tl.program_id(0).to(tl.int64)
    pages = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    for first in tl.range(0, HEADS, BLOCK_HEADS, num_stages=1):
        heads = first + tl.arange(0, BLOCK_HEADS)
        lse = tl.load(lse_ptr + row * HEADS + heads, mask=heads < HEADS, other=0.0)
        # -inf - -inf would be NaN in a row that sees nothing.
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        there = (pages < num_pages)[:, None] & (heads < HEADS)[None, :]
        places = (row * num_pages + pages)[:, None] * (PARTS * HEADS) + heads[None, :]
        mass = tl.zeros([BLOCK_PAGES, BLOCK_HEADS], tl.float32)
        for part in tl.static_range(PARTS):
            part_ptrs = page_lse_ptr + places + part * HEADS
            part_lse = tl.load(part_ptrs, mask=there, other=-float("inf"))
            mass += tl.exp2((part_lse - lse[None, :]) * _LOG2_E)
        mass_ptrs = mass_ptr + (row * HEADS + heads)[None, :] * num_pages + pages[:, None]
        tl.store(mass_ptrs, mass, mask=there)
