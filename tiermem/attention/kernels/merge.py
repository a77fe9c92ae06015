# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that joins partial results by their log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_parts", "num_items"])
def merge_parts(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_items,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Average one row and head over its parts, weighted by exp(lse).

    Grid: (num_items, ceil(HEAD_DIM / BLOCK_DIM)); an item is a row and head. Parts are
    (num_parts, num_items, HEAD_DIM) and their lse (num_parts, num_items), both contiguous. A part whose
    lse is -inf is not read.
    """
    item = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    peak = -float("inf")
    total = 0.0
    weighted = tl.zeros([BLOCK_DIM], tl.float32)
    for first in tl.range(0, num_parts, BLOCK_PARTS, num_stages=1):
        parts = first + tl.arange(0, BLOCK_PARTS)
        at = parts.to(tl.int64) * num_items + item
        lse = tl.load(part_lse_ptr + at, mask=parts < num_parts, other=-float("inf"))
        lse *= _LOG2_E
        there = (lse > -float("inf"))[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(part_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        # -inf - -inf would be NaN where nothing was seen yet.
        anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(lse - anchor)
        decay = tl.exp2(peak - anchor)
        total = total * decay + tl.sum(weights, 0)
        weighted = weighted * decay + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        peak = new_peak
    out = weighted / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + item * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), dims < HEAD_DIM)
    tl.store(lse_ptr + item, (peak + tl.log2(total)) * _LN_2, mask=tl.program_id(1) == 0)
