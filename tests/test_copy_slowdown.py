"""How much longer products take beside copies, from times that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from tiermem.bench.copy_slowdown import PAUSE_PRODUCTS, slow_down_percent
from tiermem.errors import InvariantError


@pytest.mark.parametrize("percent", [-1.0, 0.0, 2.5, 30.0])
def test_the_percentage_comes_back(percent: float) -> None:
    rng = np.random.default_rng(int(100 + percent))
    begin, end, took = 40, 100, 1.5
    each = np.full(150, took)
    each[begin:end] *= 1 + percent / 100
    each[begin : begin + PAUSE_PRODUCTS] *= 3  # where copies begin and end nothing counts
    each[end : end + PAUSE_PRODUCTS] *= 5
    times = np.concatenate([[0.0], np.cumsum(each)])
    # Copies of two directions that begin and end apart from each other, and from the products.
    first, last = times[begin] - rng.uniform(0, 0.5) * took, times[end] + rng.uniform(0, 0.5) * took
    got = slow_down_percent(times, (first, first + 0.2 * took), (last - 0.2 * took, last))
    assert got == pytest.approx(percent, abs=1e-6)


@pytest.mark.parametrize(("begin", "done"), [((500, 500), (600, 600)), ((-1, -1), (400, 400))])
def test_no_product_beside_or_alone_is_an_error(
    begin: tuple[float, float], done: tuple[float, float]
) -> None:
    with pytest.raises(InvariantError, match="ran beside the copies"):
        slow_down_percent(np.arange(100.0), begin, done)
