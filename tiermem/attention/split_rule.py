"""The split rule: how long the chunks are into which a batch's sequences are cut for decoding.

A program reads one chunk of one head of K and V. Bandwidth is shared by the multiprocessors, not by the
programs, so equal sequences are cut so that each multiprocessor has as much to read as the others: two
programs, or three, or so many waves that the last one does not matter. Unequal sequences are cut finer:
at the end the memory is as busy as there are programs left, and one that has much left to read is slow alone.
The constants were measured on an H200 (132 multiprocessors) over 40 batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE_TOKENS = 32
"""Chunks start at multiples of this many tokens: what a program takes in one turn of its loop."""
MANY_WAVES = 12
"""Programs an SM where the work is long: the unequal end is then short in comparison."""
MANY_WAVES_TILES = 64
"""Tiles that each of MANY_WAVES programs should have at least (2,048 tokens)."""
ONE_WAVE = 2
"""Programs an SM in a single wave. 256 programs on 132 SMs read 93 to 94 % of what the memory gives; 320,
where some SMs have three, 92 %; 272 to 288, 82 to 90 %."""
FULL_WAVE = 0.85
"""A wave of at least this share of ONE_WAVE is full enough: 240 of 264 programs are as good as any number."""
MOST_PROGRAMS = 3
"""Programs an SM where a wave cannot be filled: 20 sequences of 5,000 tokens and 8 heads read 82 % as 160
programs, 90 % as 320; 12 of 8,192 tokens 88 % as 192, 91 % as 384."""
UNEQUAL = 1.25
"""A batch is unequal where the longest sequence has more than this many times the mean."""
FINE = 0.4
"""Share of an even cut into ONE_WAVE that a chunk of an unequal batch is: 64 sequences of 100 to 4,000 tokens
read 88 to 90 % so, uncut 81 to 87 %."""
COARSE = 0.85
"""The same where one sequence has half of the work or more: it is cut as if it were alone."""
FEWEST_TILES = 16
"""Chunks are not cut finer than this for evenness alone."""


def chunk_tiles(tiles: NDArray[np.int64], num_heads: int, num_sms: int) -> int:
    """The length of a chunk, in tiles; a sequence of n tiles is cut evenly into ceil(n / length) chunks.

    Parameters
    ----------
    tiles: (B,) tiles of each sequence, each at least 1.
    num_heads: heads of K and V, each a program of its own.
    num_sms: multiprocessors.
    """
    total, longest = int(tiles.sum()), int(tiles.max())
    many = MANY_WAVES * num_sms
    if total * num_heads >= many * MANY_WAVES_TILES:
        return -(-total * num_heads // many)
    if longest * len(tiles) > UNEQUAL * total:
        even = -(-total * num_heads // (ONE_WAVE * num_sms))
        share = COARSE if 2 * longest >= total else FINE
        return max(int(share * even), min(even, FEWEST_TILES))
    return -(-longest // equal_splits(len(tiles) * num_heads, num_sms))


def chunk_counts(tiles: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Chunks of each sequence, if none is longer than `length` tiles."""
    return -(-tiles // length)


def equal_splits(num_pairs: int, num_sms: int) -> int:
    """Into how many chunks equal sequences are cut, for so many pairs of a sequence and a head."""
    wave = ONE_WAVE * num_sms
    splits = max(1, wave // num_pairs)
    if num_pairs * splits >= FULL_WAVE * wave:
        return splits
    choices = range(splits, max(splits, MOST_PROGRAMS * num_sms // num_pairs) + 1)
    return max(choices, key=lambda count: _evenness(num_pairs * count, num_sms))


def _evenness(num_programs: int, num_sms: int) -> float:
    """Mean over greatest number of programs an SM has."""
    return num_programs / (-(-num_programs // num_sms) * num_sms)
