"""The split rule: how long the chunks are into which a batch's sequences are cut for decoding.

A program reads one chunk of one head of K and V. Bandwidth is shared by the multiprocessors, not by the
programs, so what counts is that every multiprocessor has as much to read as the others: in one wave of at
most two programs each, or in so many waves that the last one does not matter. Constants were measured on
an H200 (132 multiprocessors) over 40 uniform and mixed batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE_TOKENS = 32
"""Chunks start at multiples of this many tokens: what a program takes in one turn of its loop."""
ONE_WAVE = 2
"""Programs an SM in a single wave. 256 programs on 132 SMs read 93 to 94 % of what the memory gives; 320,
where some SMs have three, 88.7 %; 272 to 288, 82 to 88 %."""
MANY_WAVES = 12
"""Programs an SM where the work is long: the unequal end is then short in comparison."""
MANY_WAVES_TILES = 64
"""Tiles that each of MANY_WAVES programs should have at least (2,048 tokens)."""
CLEARLY_BETTER = 0.3
"""How much more even the load must become before a skewed batch is cut into more than one wave."""


def chunk_tiles(tiles: NDArray[np.int64], num_heads: int, num_sms: int) -> int:
    """The length of a chunk, in tiles; a sequence of n tiles is cut evenly into ceil(n / length) chunks.

    Parameters
    ----------
    tiles: (B,) tiles of each sequence, each at least 1.
    num_heads: heads of K and V, each a program of its own.
    num_sms: multiprocessors.
    """
    total = int(tiles.sum())
    many = MANY_WAVES * num_sms
    if total * num_heads >= many * MANY_WAVES_TILES:
        return -(-total * num_heads // many)
    programs = ONE_WAVE * num_sms
    wave = _one_wave_length(tiles, total, programs // num_heads)
    even = -(-total * num_heads // programs)
    if wave <= even * (1 + CLEARLY_BETTER):
        return wave
    gain = _balance(tiles, even, num_heads, num_sms) - _balance(tiles, wave, num_heads, num_sms)
    return even if gain > CLEARLY_BETTER else wave


def chunk_counts(tiles: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Chunks of each sequence, if none is longer than `length` tiles."""
    return -(-tiles // length)


def _one_wave_length(tiles: NDArray[np.int64], total: int, most_chunks: int) -> int:
    """The smallest length that gives at most `most_chunks` chunks; the longest sequence's if none does."""
    longest = int(tiles.max())
    batch = len(tiles)
    if batch >= most_chunks:
        return longest
    if longest * batch == total:  # all of one length
        return -(-longest // (most_chunks // batch))
    # Cutting evenly wastes less than one chunk a sequence, which bounds the answer from above.
    low, high = -(-total // most_chunks), min(longest, -(-total // (most_chunks - batch)))
    lengths = tiles.tolist()
    while low < high:
        middle = (low + high) // 2
        if sum([-(-tiles // middle) for tiles in lengths]) <= most_chunks:
            high = middle
        else:
            low = middle + 1
    return low


def _balance(tiles: NDArray[np.int64], length: int, num_heads: int, num_sms: int) -> float:
    """Mean over greatest load of the SMs, when programs go longest first to the least loaded one, about."""
    counts = chunk_counts(tiles, length)
    work = np.repeat(tiles / counts, counts * num_heads)
    work[::-1].sort()
    # Rows of one program for each SM, every other one turned round: the longest meet the shortest.
    rows = np.zeros((-(-len(work) // num_sms), num_sms))
    rows.reshape(-1)[: len(work)] = work
    rows[1::2] = rows[1::2, ::-1].copy()
    loads = rows.sum(axis=0)
    return float(loads.mean() / loads.max())
