"""The loop that measures reading of host memory reads all of it."""

from __future__ import annotations

import numpy as np
import pytest

from tiermem import _core


def test_the_sum_is_that_of_all_words() -> None:
    memory = np.random.default_rng().integers(0, 2**64, 8 * 40_000 + 8, dtype=np.uint64)
    start = -memory.ctypes.data % 64 // 8
    words = memory[start : start + 8 * 40_000]
    reader = _core.MemoryReader(2)
    for count in (0, 8, 8 * 40_000):
        wanted = int(words[:count].sum(dtype=np.uint64))
        assert reader.sum(words.ctypes.data, 8 * count) == wanted


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="num_threads=0: must be in"):
        _core.MemoryReader(0)
    reader = _core.MemoryReader(1)
    for address, num_bytes in ((8, 64), (64, 8)):
        with pytest.raises(ValueError, match="multiples of 64"):
            reader.sum(address, num_bytes)
    with pytest.raises(ValueError, match="num_bytes=-64: must be in"):
        reader.sum(64, -64)
