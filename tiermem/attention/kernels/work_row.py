# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows of a work list, as kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl

from tiermem.attention import work_list

_ROW_INTS = tl.constexpr(work_list.ROW_INTS)
_SEQUENCE = tl.constexpr(work_list.SEQUENCE)
_START = tl.constexpr(work_list.START)
_END = tl.constexpr(work_list.END)
_SPLITS = tl.constexpr(work_list.SPLITS)
_PARTIAL = tl.constexpr(work_list.PARTIAL)
_MERGE_FIRST = tl.constexpr(work_list.MERGE_FIRST)
_MERGE_SPLITS = tl.constexpr(work_list.MERGE_SPLITS)


@triton.jit
def load_chunk(work_ptr, chunk):
    """Sequence (negative: none), first token, one past the last, chunks of the sequence, place of the result."""
    row_ptr = work_ptr + chunk * _ROW_INTS
    sequence = tl.load(row_ptr + _SEQUENCE)
    start = tl.load(row_ptr + _START)
    end = tl.load(row_ptr + _END)
    splits = tl.load(row_ptr + _SPLITS)
    part = tl.load(row_ptr + _PARTIAL)
    return sequence, start, end, splits, part


@triton.jit
def load_parts(work_ptr, sequence):
    """The place of a sequence's first partial result, and how many it has."""
    row_ptr = work_ptr + sequence * _ROW_INTS
    return tl.load(row_ptr + _MERGE_FIRST), tl.load(row_ptr + _MERGE_SPLITS)
