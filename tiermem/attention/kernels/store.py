# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel that writes new K and V to their places in a pool."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_tokens(
    k_ptr,
    v_ptr,
    token_slots_ptr,
    layer_offset,
    kv_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    slot_items,
    num_tokens,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Copy one head's K and V of BLOCK_TOKENS tokens. Grid: (token blocks, kv_heads).

    A token's place is slot * PAGE_TOKENS + offset (int64); tokens whose place is negative are left out.
    """
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1)
    dims = tl.arange(0, HEAD_BLOCK)
    places = tl.load(token_slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
    kept = (places >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    places = tl.maximum(places, 0)
    in_head = (places % PAGE_TOKENS) * HEAD_DIM
    target = (places // PAGE_TOKENS) * slot_items + layer_offset + head * (PAGE_TOKENS * HEAD_DIM)
    target = kv_ptr + (target + in_head)[:, None] + dims[None, :]
    rows = tokens.to(tl.int64)
    k = tl.load(
        k_ptr + (rows * k_token_stride + head * k_head_stride)[:, None] + dims[None, :], mask=kept
    )
    v = tl.load(
        v_ptr + (rows * v_token_stride + head * v_head_stride)[:, None] + dims[None, :], mask=kept
    )
    tl.store(target, k, mask=kept)
    tl.store(target + KV_HEADS * PAGE_TOKENS * HEAD_DIM, v, mask=kept)
