# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that joins partial results by their log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tiermem.attention.kernels.work_row import load_parts

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_parts(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    work_ptr,
    num_parts,
    num_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_WORK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Average one row and head over its parts, weighted by exp(lse).

    Grid: (num_rows * HEADS, ceil(HEAD_DIM / BLOCK_DIM)). Parts are (num_parts, num_rows, HEADS, HEAD_DIM)
    and their lse (num_parts, num_rows, HEADS), both contiguous; with HAS_WORK each row has parts of its own
    and the work list says which; one that has a single part is left alone. A part whose lse is -inf is not
    read. With EARLY this starts while the kernel that makes the parts runs, and waits for it.
    """
    item = tl.program_id(0)
    row = item // HEADS
    head = item % HEADS
    if HAS_WORK:
        first_part, num_parts = load_parts(work_ptr, row)
        stride = 1
    else:
        first_part = row
        stride = num_rows
    if EARLY:
        # By every program: what follows this kernel must not start before the parts' kernel has ended.
        gdc_wait()
    if HAS_WORK and num_parts < 2:
        return
    dims = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    peak = -float("inf")
    total = 0.0
    weighted = tl.zeros([BLOCK_DIM], tl.float32)
    for first in tl.range(0, num_parts, BLOCK_PARTS, num_stages=1):
        parts = first + tl.arange(0, BLOCK_PARTS)
        at = (first_part + parts.to(tl.int64) * stride) * HEADS + head
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
    item_out = item.to(tl.int64)
    tl.store(
        out_ptr + item_out * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), dims < HEAD_DIM
    )
    tl.store(lse_ptr + item_out, (peak + tl.log2(total)) * _LN_2, mask=tl.program_id(1) == 0)
