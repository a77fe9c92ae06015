"""Variants: for what each kernel is compiled, as the backend launches it and the report lists it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tiermem.attention.kernels.attend import attend_pages
from tiermem.attention.kernels.compiled import ALIGNED, TYPE_NAMES, Argument, Variant, pointer
from tiermem.attention.kernels.decode import decode_chunks
from tiermem.attention.kernels.mass import mass_of_pages
from tiermem.attention.kernels.merge import merge_parts
from tiermem.attention.kernels.store import store_tokens
from tiermem.attention.kernels.tiles import (
    DecodeTile,
    MassTile,
    MergeTile,
    StoreTile,
    Tile,
    next_power_of_2,
)

KEPT = 256
"""Variants of each kernel that are remembered: naming all arguments takes longer than a launch."""
_TABLES = ("num_pages_ptr", "kv_end_ptr", "q_start_ptr")


@dataclass(frozen=True, slots=True)
class Operands:
    """What the kernels work on: sizes, dtypes and alignment."""

    kv_heads: int
    group: int
    """Query heads that share a head of K and V."""
    head_dim: int
    page_tokens: int
    dtype: torch.dtype
    """Of K, V and q."""
    aligned_rows: bool = True
    """Whether q (or k and v) and the strides of its rows and heads are multiples of 16."""
    aligned_pool: bool = True
    """Whether the pool and its slots are at multiples of 16."""

    @property
    def head_block(self) -> int:
        """head_dim rounded up to a power of two."""
        return next_power_of_2(self.head_dim)


@lru_cache(KEPT)
def attend_variant(
    operands: Operands,
    tile: Tile,
    out_dtype: torch.dtype,
    *,
    has_work: bool,
    has_starts: bool,
    has_window: bool,
    widen: bool,
    early: bool,
    part_tokens: int = 0,
) -> Variant:
    """The kernel for pages of any kind. Its descriptor is not an argument unless the tile uses one.

    `part_tokens`: of each part of a page whose log-sum-exp it leaves; 0: none, at no cost.
    """
    return Variant.of(
        attend_pages,
        {
            **_per_call(operands, out_dtype),
            **_page_lse(part_tokens),
            **_pool(operands, tile.block_n if tile.described else None),
            "work_ptr": "*i32",
            "block_table_ptr": "*i32",
            "page_starts_ptr": "*i32",
            "row_starts_ptr": "*i32",
            **dict.fromkeys(_TABLES, "*i32"),
            **_strides(operands, "q_row_stride", "q_head_stride"),
            "table_stride": "i32",
            "starts_stride": "i32",
            "scale_log2": "fp32",
            "q_sign": "fp32",
            **dict.fromkeys(("window", "num_rows", "num_splits", "num_tiles"), "i32"),
            **_sizes(operands),
            "GROUP": operands.group,
            "HEAD_BLOCK": operands.head_block,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "NUM_STAGES": tile.num_stages,
            "HAS_WORK": has_work,
            "HAS_STARTS": has_starts,
            "HAS_WINDOW": has_window,
            "WIDEN": widen,
            "DESCRIBED": tile.described,
            "EARLY": early,
        },
        tile.num_warps,
    )


@lru_cache(KEPT)
def decode_variant(
    operands: Operands,
    tile: DecodeTile,
    out_dtype: torch.dtype,
    *,
    early: bool,
    part_tokens: int = 0,
) -> Variant:
    """The kernel for one row a sequence through a descriptor; `part_tokens` as in `attend_variant`."""
    return Variant.of(
        decode_chunks,
        {
            **_per_call(operands, out_dtype),
            **_page_lse(part_tokens),
            **_pool(operands, tile.block_n),
            "work_ptr": "*i32",
            "block_table_ptr": "*i32",
            **dict.fromkeys(_TABLES, "*i32"),
            **_strides(operands, "q_row_stride", "q_head_stride"),
            "table_stride": "i32",
            "scale_log2": "fp32",
            **_sizes(operands),
            "GROUP": operands.group,
            "GROUP_BLOCK": tile.group_block,
            "BLOCK_N": tile.block_n,
            "NUM_STAGES": tile.num_stages,
            "EARLY": early,
        },
        tile.num_warps,
    )


@lru_cache(KEPT)
def merge_variant(
    num_heads: int,
    head_dim: int,
    tile: MergeTile,
    part_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    has_work: bool,
    early: bool,
) -> Variant:
    """The kernel that joins parts; with `early` its launch overlaps the end of the one that makes them."""
    return Variant.of(
        merge_parts,
        {
            "out_ptr": pointer(out_dtype, aligned=True),
            "lse_ptr": "*fp32",
            "part_ptr": pointer(part_dtype, aligned=True),
            "part_lse_ptr": "*fp32",
            "work_ptr": "*i32",
            "num_parts": "i32",
            "num_rows": "i32",
            "HEADS": num_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": tile.block_dim,
            "BLOCK_PARTS": tile.block_parts,
            "HAS_WORK": has_work,
            "EARLY": early,
        },
        tile.num_warps,
        early,
    )


@lru_cache(KEPT)
def mass_variant(num_heads: int, parts: int, tile: MassTile) -> Variant:
    """The kernel that turns the log-sum-exp of pages, each in `parts` parts, into their mass."""
    return Variant.of(
        mass_of_pages,
        {
            "mass_ptr": "*fp32",
            "page_lse_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "num_pages": "i32",
            "HEADS": num_heads,
            "PARTS": parts,
            "BLOCK_HEADS": tile.block_heads,
            "BLOCK_PAGES": tile.block_pages,
        },
        tile.num_warps,
    )


@lru_cache(KEPT)
def store_variant(operands: Operands, tile: StoreTile) -> Variant:
    """The kernel that writes new tokens to their places."""
    row = pointer(operands.dtype, operands.aligned_rows)
    pool = _pool(operands, None)
    del pool["kv_desc"]
    strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
    return Variant.of(
        store_tokens,
        {
            "k_ptr": row,
            "v_ptr": row,
            "token_slots_ptr": "*i64",
            "layer_offset": f"i64{ALIGNED}",
            **pool,
            **_strides(operands, *strides),
            "num_tokens": "i32",
            **_sizes(operands),
            "HEAD_BLOCK": operands.head_block,
            "BLOCK_TOKENS": tile.block_tokens,
        },
        tile.num_warps,
    )


def _per_call(operands: Operands, out_dtype: torch.dtype) -> dict[str, Argument]:
    """What differs from layer to layer. Outputs are fresh tensors, and torch aligns those."""
    return {
        "q_ptr": pointer(operands.dtype, operands.aligned_rows),
        "out_ptr": pointer(out_dtype, aligned=True),
        "lse_ptr": "*fp32",
        "part_ptr": f"*fp32{ALIGNED}",
        "part_lse_ptr": "*fp32",
        "layer_offset": f"i64{ALIGNED}",
    }


def _page_lse(part_tokens: int) -> dict[str, Argument]:
    """Where the log-sum-exp of pages goes: no arguments unless it is wanted."""
    wanted = part_tokens > 0
    return {
        "page_lse_ptr": "*fp32" if wanted else 0,
        "page_lse_stride": "i32" if wanted else 0,
        "PART_TOKENS": part_tokens,
    }


def _pool(operands: Operands, block_n: int | None) -> dict[str, Argument]:
    descriptor: Argument = 0
    if block_n is not None:
        name = TYPE_NAMES[operands.dtype]
        descriptor = f"tensordesc<{name}[{block_n}, {operands.head_dim}]>"
    return {
        "kv_ptr": pointer(operands.dtype, operands.aligned_pool),
        "kv_desc": descriptor,
        "slot_items": f"i64{ALIGNED if operands.aligned_pool else ''}",
    }


def _strides(operands: Operands, *names: str) -> dict[str, Argument]:
    return dict.fromkeys(names, f"i32{ALIGNED if operands.aligned_rows else ''}")


def _sizes(operands: Operands) -> dict[str, Argument]:
    return {
        "KV_HEADS": operands.kv_heads,
        "HEAD_DIM": operands.head_dim,
        "PAGE_TOKENS": operands.page_tokens,
    }
