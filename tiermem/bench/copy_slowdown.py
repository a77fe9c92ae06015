"""How much slower is a stream of fp16 matrix products while pages are copied at full rate?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.bench.result import Better, Parameters, Result, Subject, measured, not_measured
from tiermem.bench.run import Run, Scale
from tiermem.device.protocol import Addresses, Direction, Memory, Stream
from tiermem.errors import InvariantError
from tiermem.measure.timing import time_device, torch_stream

PIECES = (256 << 10, 16 << 10)
"""Bytes: pieces that the driver copies, and pieces so small that a kernel does."""
SIDE = 8192
BUDGET_PERCENT = 3.0
NO_CEILING = "a slow-down has no ceiling; see the budget"
WAYS: dict[str, tuple[Direction, ...]] = {
    "h2d": (Direction.HOST_TO_DEVICE,),
    "d2h": (Direction.DEVICE_TO_HOST,),
    "both": (Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST),
}
WARMUP_PRODUCTS = 300
"""Half a second: until the GPU's clock has settled at its power limit."""
PAUSE_PRODUCTS = 8
"""Not counted before and after copies begin and end: the clock takes a while to follow."""
LEAST_PRODUCTS = 2 * PAUSE_PRODUCTS
"""Copies are repeated for so many times what a product takes."""


def measure_slow_down(bench: Run, hot: Memory, host: Memory) -> Iterator[Result]:
    """One row a direction and one for both; bytes of both buffers are overwritten."""
    for piece, (name, ways) in product(PIECES, WAYS.items()):
        parameters: Parameters = {
            "direction": name,
            "piece_bytes": piece,
            "side": SIDE,
            "dtype": "float16",
        }
        subject = Subject(
            "copy", "slow-down of matrix products", parameters, "%", Better.LOWER,
            budget=bench.aim(BUDGET_PERCENT),
        )  # fmt: skip
        if not bench.on_gpu:
            yield not_measured(subject, "needs a GPU, which copies beside its kernels")
            continue
        bench.progress(f"copy: matrix products beside copies of {piece >> 10} KiB, {name}")
        beside = _Beside(bench, hot, host, ways, piece)
        try:
            found = beside.slow_downs()
        except InvariantError as error:  # others use the GPU, and times were not as foreseen
            yield not_measured(subject, str(error))
            continue
        yield measured(subject, found, NO_CEILING)


class _Beside:
    """A stream of matrix products without a gap, and copies on streams of their own beside a part of it.

    Products of random numbers run at the GPU's power limit, where the clock depends on what ran before: only
    in one stream without a gap are those beside copies and those before and after them alike.
    """

    def __init__(
        self, bench: Run, hot: Memory, host: Memory, ways: Sequence[Direction], piece: int
    ) -> None:
        self._device = bench.device
        self._piece = piece
        self._repeats = bench.repeats
        on = bench.device.torch_device
        self._a, self._b, self._out = (
            torch.randn(SIDE, SIDE, dtype=torch.float16, device=on) for _ in range(3)
        )
        self._streams: list[Stream] = [bench.device.new_stream() for _ in ways]
        self._batches = [
            (way, *_ends(way, hot, host, piece, i, len(ways))) for i, way in enumerate(ways)
        ]
        copying = time_device(self._device, self._copy, 3, streams=self._streams)
        multiplying = time_device(self._device, self._multiply, 5, warmups=3)
        self._rounds = ceil(LEAST_PRODUCTS * multiplying.median_s / copying.median_s)
        copies_s = self._rounds * copying.median_s
        self._count = PAUSE_PRODUCTS + int(copies_s / multiplying.median_s)
        self._warmups = 0 if bench.scale is Scale.QUICK else WARMUP_PRODUCTS

    def slow_downs(self) -> list[float]:
        """Percent by which products beside copies took longer than those before and after them."""
        for _ in range(self._warmups):
            self._multiply()
        return [self._slow_down() for _ in range(self._repeats)]

    def _slow_down(self) -> float:
        products = torch_stream(self._device, self._device.compute_stream())
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(4 * self._count + 1)]
        ends[0].record(products)
        for end in ends[1:]:
            self._multiply()
            end.record(products)
        ends[self._count].synchronize()
        copies = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in self._streams
        ]
        clocks = [torch_stream(self._device, stream) for stream in self._streams]
        for (start, _), clock in zip(copies, clocks, strict=True):
            start.record(clock)
        for _ in range(self._rounds):
            self._copy()
        for (_, end), clock in zip(copies, clocks, strict=True):
            end.record(clock)
        for stream in (self._device.compute_stream(), *self._streams):
            stream.synchronize()
        times = np.array([ends[0].elapsed_time(end) for end in ends])
        begin = [ends[0].elapsed_time(start) for start, _ in copies]
        done = [ends[0].elapsed_time(end) for _, end in copies]
        return slow_down_percent(times, (min(begin), max(begin)), (min(done), max(done)))

    def _copy(self) -> None:
        for (way, dst, src), stream in zip(self._batches, self._streams, strict=True):
            self._device.copy(way, dst, src, self._piece, stream)

    def _multiply(self) -> None:
        torch.matmul(self._a, self._b, out=self._out)


def slow_down_percent(
    times: NDArray[np.float64], begin: tuple[float, float], done: tuple[float, float]
) -> float:
    """Percent by which products while all copies run took longer than those while none does.

    Parameters
    ----------
    times: when the first product began, and when each ended.
    begin, done: when the first and the last of the copies began, and ended.

    Raises
    ------
    InvariantError: no product ran beside the copies, or none without.
    """
    starts, ends = times[:-1], times[1:]
    beside = np.flatnonzero((starts >= begin[1]) & (ends <= done[0]))[PAUSE_PRODUCTS:]
    before = np.flatnonzero(ends <= begin[0])
    after = np.flatnonzero(starts >= done[1])[PAUSE_PRODUCTS:]
    alone = np.concatenate([before, after])
    if len(beside) == 0 or len(alone) == 0:
        raise InvariantError(
            f"copy: of {len(starts)} matrix products {len(beside)} ran beside the copies, {len(alone)} alone"
        )
    took = ends - starts
    return float(100 * (took[beside].mean() / took[alone].mean() - 1))


def _ends(
    way: Direction, hot: Memory, host: Memory, piece: int, part: int, parts: int
) -> tuple[Addresses, Addresses]:
    """Destination and source addresses of scattered pieces in one of `parts` equal parts of both buffers."""
    random = np.random.default_rng(part)
    slots = hot.num_bytes // piece // parts
    at_hot, at_host = (
        memory.address + (random.permutation(slots) + part * slots).astype(np.int64) * piece
        for memory in (hot, host)
    )
    return (at_hot, at_host) if way is Direction.HOST_TO_DEVICE else (at_host, at_hot)
