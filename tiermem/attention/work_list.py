"""WorkList: which program of a decode kernel reads which tokens, planned on the host.

One row of ROW_INTS int32 for each chunk of a sequence, its columns named below. Columns MERGE_FIRST and
MERGE_SPLITS say where the partial results of a sequence are, of the sequence whose number is the row's:
there are never fewer rows than sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.attention.split_rule import TILE_TOKENS, chunk_counts, chunk_tiles

ROW_INTS = 8
SEQUENCE, START, END, SPLITS, PARTIAL, MERGE_FIRST, MERGE_SPLITS = range(7)
"""Columns: the sequence, its first token and one past its last, chunks that the sequence has in all, the
place of the chunk's partial result, and for the sequence of the row's number its first such place and how
many there are."""
NO_SEQUENCE = -1
"""In column SEQUENCE: the row is padding, nothing is read or written for it."""
OPEN_END = 2**31 - 1
"""In column END: the sequence's last chunk, which ends where the tables say that the sequence ends."""


@dataclass(frozen=True, slots=True)
class PlannedWork:
    """A work list on the host.

    Parameters
    ----------
    rows: (num_chunks, ROW_INTS) int32; read only.
    max_splits: chunks of the sequence that has most.
    num_partials: partial results that are written, one for each chunk of the sequences that have several.
    """

    rows: NDArray[np.int32]
    max_splits: int
    num_partials: int


@dataclass(frozen=True, slots=True)
class WorkList:
    """A work list on the pool's device.

    A launch takes its size from `rows` and its memory from the two numbers, so that in a captured graph the
    rows may be replaced by those of any plan with as many rows or fewer, no more splits and no more
    partials; unused rows are padded with NO_SEQUENCE (and zeros). A plan stays valid while sequences grow,
    since their last chunks grow with them.

    Parameters
    ----------
    rows: (num_chunks, ROW_INTS) int32, contiguous, at least one row a sequence.
    max_splits, num_partials: as in PlannedWork, or more.

    Raises
    ------
    TypeError, ValueError: `rows` of another dtype or shape, or a number out of range.
    """

    rows: torch.Tensor
    max_splits: int
    num_partials: int

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.dtype != torch.int32:
            raise TypeError(f"rows.dtype={rows.dtype}: must be torch.int32")
        if rows.dim() != 2 or rows.shape[1] != ROW_INTS or not rows.is_contiguous():
            raise ValueError(
                f"rows of shape {tuple(rows.shape)}: must be (chunks, {ROW_INTS}), contiguous"
            )
        if self.max_splits < 1:
            raise ValueError(f"max_splits={self.max_splits}: must be at least 1")
        if self.num_partials < 0:
            raise ValueError(f"num_partials={self.num_partials}: must be at least 0")


def tile_counts(kv_lens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tiles of each sequence, at least one: all of the lengths that a plan depends on."""
    return np.maximum((kv_lens + (TILE_TOKENS - 1)) // TILE_TOKENS, 1)


def plan_work(kv_lens: NDArray[np.int64], num_kv_heads: int, num_sms: int) -> PlannedWork:
    """Cut sequences into chunks that keep every multiprocessor busy, the longest chunks first.

    Parameters
    ----------
    kv_lens: (B,) tokens that each sequence's only query row sees, each at least 0.
    num_kv_heads: heads of K and V: each chunk is read by so many programs.
    num_sms: the GPU's multiprocessors.
    """
    batch = len(kv_lens)
    tiles = tile_counts(kv_lens)
    counts = chunk_counts(tiles, chunk_tiles(tiles, num_kv_heads, num_sms))
    partials = np.where(counts > 1, counts, 0)
    firsts = partials.cumsum() - partials

    # A sequence's chunks are equally long, so that the longest come first if their sequences do.
    order = np.argsort(-(tiles / counts), kind="stable")
    ends = counts[order].cumsum()
    num_chunks = int(ends[-1]) if batch else 0
    one = np.stack(
        (order, tiles[order], counts[order], firsts[order], ends - counts[order]), axis=1
    )
    sequence, its_tiles, splits, first, row_start = one.repeat(counts[order], axis=0).T
    number = np.arange(num_chunks) - row_start

    rows = np.zeros((num_chunks, ROW_INTS), dtype=np.int32)
    rows[:, SEQUENCE] = sequence
    rows[:, START] = its_tiles * number // splits * TILE_TOKENS
    rows[:-1, END] = rows[1:, START]
    rows[ends - 1, END] = OPEN_END
    rows[:, SPLITS] = splits
    rows[:, PARTIAL] = np.where(splits > 1, first + number, 0)
    rows[:batch, MERGE_FIRST] = firsts
    rows[:batch, MERGE_SPLITS] = counts
    rows.flags.writeable = False
    return PlannedWork(rows, int(counts.max(initial=1)), int(partials.sum()))
