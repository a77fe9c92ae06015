# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that attends over pages of any kind: decode and chunked prefill, with split K and V.

Query rows and the query heads that share a head of K and V are packed into one tile of BLOCK_M items, so
that each tile of K and V is read once for all of them. Decode and prefill differ in the size of the tiles
and in the number of splits alone. Sums and softmax are float32 with a running maximum (Dao et al. 2022,
arXiv:2205.14135); splits are merged afterwards (Flash-Decoding, Dao et al. 2023).

K and V are loaded through pointers, which works on every GPU, or, whole tiles of a page on those with a
tensor memory accelerator, through a descriptor of the pool.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from tiermem.attention.kernels.work_row import load_chunk

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _table_entries(tile, offsets, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile's tokens are in the block table: a scalar if they share a page, else one each."""
    if BLOCK_N <= PAGE_TOKENS:
        entries = tile * BLOCK_N // PAGE_TOKENS
    else:
        entries = (tile * BLOCK_N + offsets) // PAGE_TOKENS
    return entries


@triton.jit
def _token_pointers(
    head_ptr, slots, slot_items, in_page, dims, HEAD_DIM: tl.constexpr, ONE_PAGE: tl.constexpr
):
    """Addresses (tokens, dims) of K; `slots` is a scalar if ONE_PAGE, else one for each token."""
    if ONE_PAGE:
        page_ptr = head_ptr + slots.to(tl.int64) * slot_items
        pointers = page_ptr + in_page[:, None] * HEAD_DIM + dims[None, :]
    else:
        token_items = slots.to(tl.int64) * slot_items + in_page * HEAD_DIM
        pointers = head_ptr + token_items[:, None] + dims[None, :]
    return pointers


@triton.jit
def _load_tokens(
    pointers, there, dims, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of K or V; if MASKED, 0 for the tokens that are not there, which are not read."""
    if MASKED:
        values = tl.load(pointers, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < HEAD_BLOCK:
        values = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _fold(queries, k, v, peak, total, weighted, seen, scale_log2, MASKED: tl.constexpr):
    """Add a tile of K and V to the running softmax; rows see all of it, or what `seen` says if MASKED."""
    # The scale comes after the dot product, in float32: half precision would overflow. It is positive, so
    # that it may come after the maximum too, and then costs nothing: exp2's argument is one multiply-add.
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    anchor = new_peak
    if MASKED:
        # -inf - -inf would be NaN in a row that has seen nothing yet.
        anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale_log2 - anchor[:, None])
    decay = tl.exp2(peak - anchor)
    tile_total = tl.sum(weights, 1)
    total = total * decay + tile_total
    weighted = tl.dot(weights.to(v.dtype), v, weighted * decay[:, None], input_precision="ieee")
    return new_peak, total, weighted, anchor, weights, tile_total


@triton.jit
def _store_page_lse(
    page_lse_ptrs,
    mine,
    anchor,
    weights,
    tile_total,
    tile,
    starts_ptr,
    num_pages,
    HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
):
    """Leave the log-sum-exp of a tile's part of a page, or of each of its pages, in the page's place.

    Weights are relative to `anchor`, to base 2, and sum up to `tile_total`; `mine` is which items there are.
    """
    PAGES: tl.constexpr = BLOCK_N // PAGE_TOKENS if BLOCK_N > PAGE_TOKENS else 1
    for page in tl.static_range(PAGES):
        if BLOCK_N > PAGE_TOKENS:
            entry = tile * PAGES + page
            in_page = 0
            in_tile = tl.arange(0, BLOCK_N) // PAGE_TOKENS == page
            page_total = tl.sum(tl.where(in_tile[None, :], weights, 0.0), 1)
        else:
            entry = tile * BLOCK_N // PAGE_TOKENS
            in_page = tile * BLOCK_N % PAGE_TOKENS
            page_total = tile_total
        start = entry * PAGE_TOKENS
        if HAS_STARTS:
            start = tl.load(starts_ptr + entry, mask=entry < num_pages, other=0)
        part = (start + in_page) // PART_TOKENS
        page_lse = (anchor + tl.log2(page_total)) * _LN_2
        tl.store(page_lse_ptrs + part * HEADS, page_lse, mask=mine & (entry < num_pages))


@triton.jit
def _sweep(
    queries,
    peak,
    total,
    weighted,
    tile_start,
    tile_end,
    head_ptr,
    kv_desc,
    head_row,
    table_ptr,
    starts_ptr,
    slot_items,
    num_pages,
    positions,
    seen_start,
    seen_end,
    window,
    scale_log2,
    page_lse_ptrs,
    mine,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Fold the tiles of BLOCK_N tokens from tile_start to tile_end into the running softmax.

    Without MASKED every row must see every token of them. With it, tokens that no row sees are not read:
    they may be NaN, and 0 * NaN is NaN. With DESCRIBED, K and V come through the descriptor.
    """
    ONE_PAGE: tl.constexpr = BLOCK_N <= PAGE_TOKENS
    offsets = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_BLOCK)
    entries = _table_entries(tile_start, offsets, PAGE_TOKENS, BLOCK_N)
    slots = tl.load(table_ptr + entries, mask=entries < num_pages, other=0)
    for tile in tl.range(tile_start, tile_end, num_stages=NUM_STAGES):
        in_page = (tile * BLOCK_N % PAGE_TOKENS) + offsets % PAGE_TOKENS
        slot_row = head_row + slots * (slot_items // HEAD_DIM).to(tl.int32)
        k_ptr = _token_pointers(head_ptr, slots, slot_items, in_page, dims, HEAD_DIM, ONE_PAGE)
        # The next tile's slots are asked for one tile ahead, so that no load waits for its address.
        following = tl.minimum(tile + 1, tile_end - 1)
        next_entries = _table_entries(following, offsets, PAGE_TOKENS, BLOCK_N)
        slots = tl.load(table_ptr + next_entries, mask=next_entries < num_pages, other=0)

        entries = _table_entries(tile, offsets, PAGE_TOKENS, BLOCK_N)
        page_starts = entries * PAGE_TOKENS
        if HAS_STARTS:
            page_starts = tl.load(starts_ptr + entries, mask=entries < num_pages, other=0)
        tokens = page_starts + in_page
        there = (tokens >= seen_start) & (tokens < seen_end) & (entries < num_pages)
        if DESCRIBED:
            row = slot_row + tile * BLOCK_N % PAGE_TOKENS
            k = kv_desc.load([row, 0])
            v = kv_desc.load([row + KV_HEADS * PAGE_TOKENS, 0])
        else:
            k = _load_tokens(k_ptr, there, dims, HEAD_DIM, HEAD_BLOCK, MASKED)
            v_ptr = k_ptr + KV_HEADS * PAGE_TOKENS * HEAD_DIM
            v = _load_tokens(v_ptr, there, dims, HEAD_DIM, HEAD_BLOCK, MASKED)
        if WIDEN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        seen = there[None, :] & (tokens[None, :] <= positions[:, None])
        if HAS_WINDOW:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        peak, total, weighted, anchor, weights, tile_total = _fold(
            queries, k, v, peak, total, weighted, seen, scale_log2, MASKED
        )
        if PART_TOKENS > 0:
            _store_page_lse(
                page_lse_ptrs, mine, anchor, weights, tile_total, tile, starts_ptr, num_pages,
                HEADS, PAGE_TOKENS, BLOCK_N, HAS_STARTS, PART_TOKENS,
            )  # fmt: skip
    return peak, total, weighted


@triton.jit
def _tile_bounds(
    first_position,
    last_position,
    kv_end,
    num_pages,
    window,
    split,
    num_splits,
    chunk_start,
    chunk_end,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_WORK: tl.constexpr,
):
    """Which tokens the rows from first_position to last_position see, in tiles in the table's order.

    A split is an even share of what they see, or with HAS_WORK what lies between chunk_start and chunk_end.

    Returns
    -------
    The first position that any row sees and one past the last; then four tile numbers: this split's
    tiles go from the first to the last of them, and every row sees all of those between the middle two.
    """
    seen_start = 0
    all_seen_start = 0
    if HAS_WINDOW:
        seen_start = tl.maximum(first_position - window + 1, 0)
        all_seen_start = tl.maximum(last_position - window + 1, 0)
    seen_end = tl.maximum(tl.minimum(kv_end, last_position + 1), 0)
    all_seen_end = tl.maximum(tl.minimum(kv_end, first_position + 1), 0)
    stored = num_pages * PAGE_TOKENS

    tile_first = seen_start // BLOCK_N
    tile_last = tl.cdiv(tl.minimum(seen_end, stored), BLOCK_N)
    whole_start = tl.cdiv(all_seen_start, BLOCK_N)
    whole_end = tl.minimum(all_seen_end, stored) // BLOCK_N
    if HAS_STARTS:
        # Pages are anywhere: all tiles are looked at, and none is known to be seen whole.
        tile_first = 0
        tile_last = tl.cdiv(stored, BLOCK_N)
        whole_start = tile_last
        whole_end = tile_last
    tile_count = tl.maximum(tile_last - tile_first, 0)
    if HAS_WORK:
        tile_start = tl.minimum(chunk_start // BLOCK_N, tile_last)
        tile_end = tl.maximum(
            tl.cdiv(tl.minimum(chunk_end, tl.minimum(seen_end, stored)), BLOCK_N), tile_start
        )
    else:
        tile_start = tile_first + tile_count * split // num_splits
        tile_end = tile_first + tile_count * (split + 1) // num_splits
    whole_start = tl.minimum(tl.maximum(whole_start, tile_start), tile_end)
    whole_end = tl.minimum(tl.maximum(whole_end, whole_start), tile_end)
    return seen_start, seen_end, tile_start, whole_start, whole_end, tile_end


@triton.jit
def attend_pages(  # noqa: PLR0915 - a kernel keeps its state in local variables
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
    page_starts_ptr,
    num_pages_ptr,
    kv_end_ptr,
    row_starts_ptr,
    q_start_ptr,
    q_row_stride,
    q_head_stride,
    table_stride,
    starts_stride,
    slot_items,
    scale_log2,
    q_sign,
    window,
    num_rows,
    num_splits,
    num_tiles,
    page_lse_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_WORK: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend one tile of BLOCK_M items (row, query head of the group) over one split of what they see.

    Grid: sequences * num_tiles * num_splits * KV_HEADS, or with HAS_WORK chunks * KV_HEADS, the head
    fastest: neighbours then read neighbouring parts of the same page. A sequence that is not split has its
    result in out (num_rows, KV_HEADS * GROUP, HEAD_DIM) and lse (num_rows, KV_HEADS * GROUP), natural
    logarithm; 0 and -inf where nothing is seen. Splits have theirs in parts of the same shape, float32:
    (num_splits, num_rows, ...), or with HAS_WORK (num_partials, ...). See PagedTables for what a row sees
    and work_list for HAS_WORK, which needs one row for each sequence, page order and no window.

    The score is q . k * q_sign * scale_log2 * ln(2); q_sign is 1, 0 or -1, scale_log2 positive. With WIDEN
    products are of float32 operands, whatever is stored. With EARLY the merge may start before this ends.

    Unless PART_TOKENS is 0, page_lse (num_rows, parts of PART_TOKENS tokens, heads) gets the log-sum-exp of
    each page, in its first part or in as many as there are tiles to a page. Rows are page_lse_stride apart.
    """
    if EARLY:
        gdc_launch_dependents()
    HEADS: tl.constexpr = KV_HEADS * GROUP
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    chunk_start = 0
    chunk_end = 0
    if HAS_WORK:
        sequence, chunk_start, chunk_end, splits, part = load_chunk(work_ptr, program // KV_HEADS)
        if sequence < 0:
            return
        split = 0
        tile_m = 0
    else:
        splits = num_splits
        split = program // KV_HEADS % num_splits
        part = split * num_rows
        # Under the causal mask the last rows see most: they start first.
        tile_m = num_tiles - 1 - program // KV_HEADS // num_splits % num_tiles
        sequence = program // KV_HEADS // num_splits // num_tiles

    row_start = tl.load(row_starts_ptr + sequence)
    rows_here = tl.load(row_starts_ptr + sequence + 1) - row_start
    q_start = tl.load(q_start_ptr + sequence)
    kv_end = tl.load(kv_end_ptr + sequence)
    num_pages = tl.load(num_pages_ptr + sequence)
    first_item = tile_m * BLOCK_M
    if first_item >= rows_here * GROUP:
        return

    items = first_item + tl.arange(0, BLOCK_M)
    rows = items // GROUP
    heads = kv_head * GROUP + items % GROUP
    dims = tl.arange(0, HEAD_BLOCK)
    mine = (rows < rows_here)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (row_start + rows).to(tl.int64)
    queries = tl.load(
        q_ptr + (q_rows * q_row_stride + heads * q_head_stride)[:, None] + dims[None, :],
        mask=mine,
        other=0.0,
    )
    queries = queries.to(tl.float32) * q_sign
    if not WIDEN:
        queries = queries.to(q_ptr.dtype.element_ty)

    positions = q_start + rows
    first_position = q_start + first_item // GROUP
    last_position = q_start + tl.minimum((first_item + BLOCK_M - 1) // GROUP, rows_here - 1)
    seen_start, seen_end, tile_start, whole_start, whole_end, tile_end = _tile_bounds(
        first_position, last_position, kv_end, num_pages, window, split, num_splits, chunk_start, chunk_end,
        PAGE_TOKENS, BLOCK_N, HAS_STARTS, HAS_WINDOW, HAS_WORK,
    )  # fmt: skip

    head_ptr = kv_ptr + layer_offset + kv_head * (PAGE_TOKENS * HEAD_DIM)
    head_row = (layer_offset // HEAD_DIM).to(tl.int32) + kv_head * PAGE_TOKENS
    table_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    starts_ptr = page_starts_ptr + sequence.to(tl.int64) * starts_stride
    page_lse_ptrs = page_lse_ptr + q_rows * page_lse_stride + heads
    there = rows < rows_here
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    # Masked tiles at the window's edge (all of them where pages start anywhere), whole tiles, masked
    # tiles at the causal edge. Loops of a few tiles are not worth pipelining.
    if HAS_STARTS or HAS_WINDOW:
        peak, total, weighted = _sweep(
            queries, peak, total, weighted, tile_start, whole_start, head_ptr, kv_desc, head_row,
            table_ptr, starts_ptr, slot_items, num_pages, positions, seen_start, seen_end, window,
            scale_log2, page_lse_ptrs, there, KV_HEADS, HEADS, HEAD_DIM, HEAD_BLOCK, PAGE_TOKENS, BLOCK_N,
            NUM_STAGES if HAS_STARTS else 1, HAS_STARTS, HAS_WINDOW, WIDEN, PART_TOKENS, True, False,
        )  # fmt: skip
    if not HAS_STARTS:
        peak, total, weighted = _sweep(
            queries, peak, total, weighted, whole_start, whole_end, head_ptr, kv_desc, head_row,
            table_ptr, starts_ptr, slot_items, num_pages, positions, seen_start, seen_end, window,
            scale_log2, page_lse_ptrs, there, KV_HEADS, HEADS, HEAD_DIM, HEAD_BLOCK, PAGE_TOKENS, BLOCK_N,
            NUM_STAGES, HAS_STARTS, HAS_WINDOW, WIDEN, PART_TOKENS, False, DESCRIBED,
        )  # fmt: skip
        peak, total, weighted = _sweep(
            queries, peak, total, weighted, whole_end, tile_end, head_ptr, kv_desc, head_row,
            table_ptr, starts_ptr, slot_items, num_pages, positions, seen_start, seen_end, window,
            scale_log2, page_lse_ptrs, there, KV_HEADS, HEADS, HEAD_DIM, HEAD_BLOCK, PAGE_TOKENS, BLOCK_N,
            1, HAS_STARTS, HAS_WINDOW, WIDEN, PART_TOKENS, True, False,
        )  # fmt: skip

    out = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
    lse = (peak + tl.log2(total)) * _LN_2
    if splits == 1:
        items_out = q_rows * (KV_HEADS * GROUP) + heads
        out_ptrs = out_ptr + items_out[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mine)
        tl.store(lse_ptr + items_out, lse, mask=rows < rows_here)
    else:
        part_rows = part.to(tl.int64) + (rows if HAS_WORK else q_rows)
        items_out = part_rows * (KV_HEADS * GROUP) + heads
        tl.store(part_ptr + items_out[:, None] * HEAD_DIM + dims[None, :], out, mask=mine)
        tl.store(part_lse_ptr + items_out, lse, mask=rows < rows_here)
