"""How much slower is a stream of fp16 matrix products while pages are copied at full rate?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch

from tiermem.bench.result import Better, Parameters, Result, Subject, measured, not_measured
from tiermem.bench.run import Run, Scale
from tiermem.device.protocol import Addresses, Direction, Memory, Stream
from tiermem.measure.timing import time_device, torch_stream

PIECES = (256 << 10, 16 << 10)
"""Bytes: pieces that the driver copies, and pieces so small that a kernel does."""
SIDE = 8192
BUDGET_PERCENT = 3.0
WARMUPS = 8
"""Runs until the clock has settled."""
NO_CEILING = "a slow-down has no ceiling; see the budget"
WAYS: dict[str, tuple[Direction, ...]] = {
    "h2d": (Direction.HOST_TO_DEVICE,),
    "d2h": (Direction.DEVICE_TO_HOST,),
    "both": (Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST),
}
SHARE_OF_COPY = 0.6
"""Products last this share of the copies beside them, so that all of them run beside copies."""


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
        yield measured(subject, _Beside(bench, hot, host, ways, piece).slow_downs(), NO_CEILING)


class _Beside:
    """Matrix products on torch's stream, alone and beside copies on streams of their own."""

    def __init__(
        self, bench: Run, hot: Memory, host: Memory, ways: Sequence[Direction], piece: int
    ) -> None:
        self._device = bench.device
        self._piece = piece
        self._repeats = bench.repeats
        on = bench.device.torch_device
        # Products of random numbers run at the GPU's power limit, where its clock changes by 10% from
        # one run to the next; those of equal ones do not.
        self._a, self._b, self._out = (
            torch.ones(SIDE, SIDE, dtype=torch.float16, device=on) for _ in range(3)
        )
        self._streams: list[Stream] = [bench.device.new_stream() for _ in ways]
        self._batches = [
            (way, *_ends(way, hot, host, piece, i, len(ways))) for i, way in enumerate(ways)
        ]
        copying = time_device(self._device, self._copy, 3, streams=self._streams)
        self._count = 1
        multiplying = time_device(self._device, self._multiply, 5, warmups=3)
        quick = bench.scale is Scale.QUICK
        share = SHARE_OF_COPY / (2 if quick else 1)
        self._count = max(1, int(share * copying.median_s / multiplying.median_s))

    def slow_downs(self) -> list[float]:
        """Percent by which the products took longer beside copies than in the runs alone before and after."""
        for _ in range(WARMUPS):
            self._alone()
        alone_s, slow_downs = self._alone(), []
        for _ in range(self._repeats):
            beside_s, after_s = self._beside(), self._alone()
            slow_downs.append(100 * (2 * beside_s / (alone_s + after_s) - 1))
            alone_s = after_s
        return slow_downs

    def _alone(self) -> float:
        return time_device(self._device, self._multiply, 1, warmups=0).median_s

    def _beside(self) -> float:
        """Seconds of the products; copies start with the first of them and outlast the last."""
        products = self._device.compute_stream()
        clock = torch_stream(self._device, products)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The products first: giving the device a large batch of copies may take the host a while.
        start.record(clock)
        self._multiply()
        end.record(clock)
        self._copy()
        for stream in (products, *self._streams):
            stream.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _copy(self) -> None:
        for (way, dst, src), stream in zip(self._batches, self._streams, strict=True):
            self._device.copy(way, dst, src, self._piece, stream)

    def _multiply(self) -> None:
        for _ in range(self._count):
            torch.matmul(self._a, self._b, out=self._out)


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
