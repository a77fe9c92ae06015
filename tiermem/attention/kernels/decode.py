# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decode kernel for GPUs with a tensor memory accelerator: one query row a sequence, half precision.

A program is one warp: it reads one chunk of one head of K and V, 32 tokens a turn, through a descriptor of
the pool. The operands are swapped, scores are K times q: the tokens fill the tensor cores' rows, the query
heads of the group their columns, of which there may be as few as 8. With one warp a maximum over the tokens
is a few shuffles. What counts is how many bytes are in flight: two turns ahead, 32 KiB a program.

Descriptors cannot leave out single tokens, and 0 * NaN is NaN: a sequence's last tokens, where they do not
fill a turn, are read through pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from tiermem.attention.kernels.work_row import load_chunk

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _fold(scores, v, peak, total, weighted):
    """Add scores (tokens, heads) and V (tokens, dims) to the running softmax."""
    new_peak = tl.maximum(peak, tl.max(scores, 0))
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[None, :])
    tile_total = tl.sum(weights, 0)
    total = total * decay + tile_total
    weighted = tl.dot(tl.trans(v), weights.to(v.dtype), weighted * decay[None, :])
    return new_peak, total, weighted, tile_total


@triton.jit
def _fold_two(scores, scores_2, v, v_2, peak, total, weighted):
    """The same of two pages at once."""
    new_peak = tl.maximum(peak, tl.max(tl.maximum(scores, scores_2), 0))
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[None, :])
    weights_2 = tl.exp2(scores_2 - new_peak[None, :])
    total = total * decay + tl.sum(weights + weights_2, 0)
    weighted = tl.dot(tl.trans(v), weights.to(v.dtype), weighted * decay[None, :])
    weighted = tl.dot(tl.trans(v_2), weights_2.to(v.dtype), weighted)
    return new_peak, total, weighted, tl.sum(weights, 0), tl.sum(weights_2, 0)


@triton.jit
def _store_page_lse(
    page_lse_ptrs, mine, part, peak, total, HEADS: tl.constexpr, PART_TOKENS: tl.constexpr
):
    """Leave the log-sum-exp of a tile, whose weights relative to `peak` sum up to `total`, in its place."""
    if PART_TOKENS > 0:
        tl.store(page_lse_ptrs + part * HEADS, (peak + tl.log2(total)) * _LN_2, mask=mine)


@triton.jit
def decode_chunks(  # noqa: PLR0915 - a kernel keeps its state in local variables
    q_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    layer_offset,
    page_lse_ptr,
    kv_ptr,
    kv_desc,
    work_ptr,
    block_table_ptr,
    num_pages_ptr,
    kv_end_ptr,
    q_start_ptr,
    q_row_stride,
    q_head_stride,
    table_stride,
    slot_items,
    scale_log2,
    page_lse_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend the query heads of one head of K and V over one chunk of its sequence.

    Grid: chunks * KV_HEADS, the head fastest: neighbours then read neighbouring parts of the same page.
    Results are as those of attend_pages with HAS_WORK. A turn takes 32 tokens: one tile of BLOCK_N = 32 of
    a page, or two pages of BLOCK_N = PAGE_TOKENS = 16. The descriptor's tiles are (BLOCK_N, HEAD_DIM) of the
    pool as rows of one token and head. PART_TOKENS is BLOCK_N, or 0; page_lse is as in attend_pages.
    """
    if EARLY:
        # First of all: the merge's programs are then there when the last of these ends.
        gdc_launch_dependents()
    TURN: tl.constexpr = 32
    TWO_PAGES: tl.constexpr = BLOCK_N < TURN
    V_ROWS: tl.constexpr = KV_HEADS * PAGE_TOKENS
    HEADS: tl.constexpr = KV_HEADS * GROUP
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    sequence, start, end, splits, part = load_chunk(work_ptr, program // KV_HEADS)
    if sequence < 0:
        return

    table_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    num_pages = tl.load(num_pages_ptr + sequence)
    seen_end = tl.minimum(tl.load(kv_end_ptr + sequence), tl.load(q_start_ptr + sequence) + 1)
    seen_end = tl.minimum(tl.minimum(seen_end, end), num_pages * PAGE_TOKENS)
    whole_start = start // TURN
    whole_end = seen_end // TURN
    last_page = tl.maximum(num_pages - 1, 0)

    offsets = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    members = tl.arange(0, GROUP_BLOCK)
    heads = kv_head * GROUP + members
    mine = members < GROUP
    q_ptrs = (
        q_ptr
        + sequence.to(tl.int64) * q_row_stride
        + (heads * q_head_stride)[None, :]
        + dims[:, None]
    )
    queries = tl.load(q_ptrs, mask=mine[None, :], other=0.0)

    slot_rows = (slot_items // HEAD_DIM).to(tl.int32)
    head_row = (layer_offset // HEAD_DIM).to(tl.int32) + kv_head * PAGE_TOKENS
    page_lse_ptrs = page_lse_ptr + sequence.to(tl.int64) * page_lse_stride + heads
    peak = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    weighted = tl.zeros([HEAD_DIM, GROUP_BLOCK], tl.float32)

    # The slots of the next turn are asked for a turn ahead, so that no load waits for its address. An entry
    # at or past num_pages may be anything, and is not looked at.
    slot = tl.load(table_ptr + start // PAGE_TOKENS, mask=start < seen_end, other=0)
    if TWO_PAGES:
        slot_2 = tl.load(
            table_ptr + start // PAGE_TOKENS + 1, mask=start + BLOCK_N < seen_end, other=0
        )
    for turn in tl.range(whole_start, whole_end, num_stages=NUM_STAGES):
        if TWO_PAGES:
            row = head_row + slot * slot_rows
            row_2 = head_row + slot_2 * slot_rows
            k = kv_desc.load([row, 0])
            k_2 = kv_desc.load([row_2, 0])
            v = kv_desc.load([row + V_ROWS, 0])
            v_2 = kv_desc.load([row_2 + V_ROWS, 0])
            page = (turn + 1) * 2
            slot = tl.load(table_ptr + tl.minimum(page, last_page))
            slot_2 = tl.load(table_ptr + tl.minimum(page + 1, last_page))
            scores = tl.dot(k, queries) * scale_log2
            scores_2 = tl.dot(k_2, queries) * scale_log2
            peak, total, weighted, total_1, total_2 = _fold_two(
                scores, scores_2, v, v_2, peak, total, weighted
            )
            page_1 = turn * 2
            _store_page_lse(page_lse_ptrs, mine, page_1, peak, total_1, HEADS, PART_TOKENS)
            _store_page_lse(page_lse_ptrs, mine, page_1 + 1, peak, total_2, HEADS, PART_TOKENS)
        else:
            row = head_row + slot * slot_rows + turn * TURN % PAGE_TOKENS
            k = kv_desc.load([row, 0])
            v = kv_desc.load([row + V_ROWS, 0])
            slot = tl.load(table_ptr + tl.minimum((turn + 1) * TURN // PAGE_TOKENS, last_page))
            peak, total, weighted, tile_total = _fold(
                tl.dot(k, queries) * scale_log2, v, peak, total, weighted
            )
            _store_page_lse(page_lse_ptrs, mine, turn, peak, tile_total, HEADS, PART_TOKENS)

    head_ptr = kv_ptr + layer_offset + kv_head * (PAGE_TOKENS * HEAD_DIM)
    rest_start = tl.maximum(whole_end * TURN, start)
    for token in tl.range(rest_start, seen_end, BLOCK_N, num_stages=1):
        tokens = token + offsets
        there = tokens < seen_end
        slots = tl.load(table_ptr + tokens // PAGE_TOKENS, mask=there, other=0).to(tl.int64)
        items = slots * slot_items + tokens % PAGE_TOKENS * HEAD_DIM
        k_ptrs = head_ptr + items[:, None] + dims[None, :]
        k = tl.load(k_ptrs, mask=there[:, None], other=0.0)
        v = tl.load(k_ptrs + V_ROWS * HEAD_DIM, mask=there[:, None], other=0.0)
        scores = tl.where(there[:, None], tl.dot(k, queries) * scale_log2, -float("inf"))
        peak, total, weighted, tile_total = _fold(scores, v, peak, total, weighted)
        tile = token // BLOCK_N
        _store_page_lse(page_lse_ptrs, mine, tile, peak, tile_total, HEADS, PART_TOKENS)

    out = weighted / tl.where(total > 0.0, total, 1.0)[None, :]
    lse = (peak + tl.log2(total)) * _LN_2
    if splits == 1:
        items_out = sequence.to(tl.int64) * (KV_HEADS * GROUP) + heads
        out_ptrs = out_ptr + items_out[None, :] * HEAD_DIM + dims[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mine[None, :])
        tl.store(lse_ptr + items_out, lse, mask=mine)
    else:
        items_out = part.to(tl.int64) * (KV_HEADS * GROUP) + heads
        part_ptrs = part_ptr + items_out[None, :] * HEAD_DIM + dims[:, None]
        tl.store(part_ptrs, out, mask=mine[None, :])
        tl.store(part_lse_ptr + items_out, lse, mask=mine)
