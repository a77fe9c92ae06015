"""Sums: checksums of slices in host memory, for the devices whose hot memory that is."""

from __future__ import annotations

import ctypes
import errno

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem import _core
from tiermem.device.protocol import Addresses, Slices
from tiermem.errors import TransferError

SLICE_ALIGN_BYTES = 16
WORD_BYTES = 8


def make_slices(
    pages: Addresses, rows: Addresses, slice_bytes: int, *, pinned: bool = False
) -> Slices:
    """Slices whose arrays lie in host memory, pinned so that a GPU sees them.

    Raises
    ------
    ValueError: lengths that differ, or slices that do not all start at multiples of 16 bytes.
    TransferError: there is no memory for them.
    """
    if pages.shape != rows.shape:
        raise ValueError(f"rows of shape {rows.shape}: must be {pages.shape}, one for each page")
    if slice_bytes < SLICE_ALIGN_BYTES or slice_bytes % SLICE_ALIGN_BYTES:
        raise ValueError(f"slice_bytes={slice_bytes}: must be a multiple of {SLICE_ALIGN_BYTES}")
    words = new_zeros((2, len(pages)), torch.int64, pinned=pinned)
    words[0] = torch.from_numpy(pages)
    words[1] = torch.from_numpy(rows)
    marks = new_zeros((len(pages),), torch.int32, pinned=pinned)
    return Slices(words[0], words[1], marks, slice_bytes)


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A tensor of zeros in host memory; TransferError where it, or so much that is pinned, cannot be had."""
    try:
        return torch.zeros(shape, dtype=dtype, pin_memory=pinned)
    except RuntimeError as error:  # as torch tells of both
        raise TransferError(errno.ENOMEM, f"no memory for checksums: {error}") from error


def sum_now(slices: Slices, layers: range) -> None:
    """Store the sums, by the CPU."""
    sums = _sums_of(slices, layers)
    for row, address in zip(sums, slices.rows.tolist(), strict=True):
        words_at(address, layers.stop)[layers.start :] = row


def verify_now(slices: Slices, layers: range) -> None:
    """Mark pages with other sums than are stored, by the CPU."""
    sums, marks = _sums_of(slices, layers), slices.marked()
    for i, (row, address) in enumerate(zip(sums, slices.rows.tolist(), strict=True)):
        wrong = np.flatnonzero(words_at(address, layers.stop)[layers.start :] != row)
        if len(wrong):
            marks[i] = layers.start + int(wrong[0]) + 1


def words_at(address: int, count: int) -> NDArray[np.uint64]:
    """`count` numbers of 64 bits in host memory, as they lie there."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))


def _sums_of(slices: Slices, layers: range) -> NDArray[np.uint64]:
    return _core.checksum_pages(slices.pages.numpy(), slices.slice_bytes, len(layers))
