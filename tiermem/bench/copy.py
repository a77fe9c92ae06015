"""How near does a batch of page copies between pinned RAM and the GPU come to one large copy?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

import numpy as np
import torch

from tiermem.bench.copy_slowdown import measure_slow_down
from tiermem.bench.result import GIGA, Ceiling, Parameters, Result, Subject, measured, rates
from tiermem.bench.run import Run, Scale
from tiermem.device.copy_measure import MeasurableDevice, measure_copies
from tiermem.device.protocol import Addresses, Device, Direction, Memory, Stream
from tiermem.errors import CorruptPageError
from tiermem.measure.timing import time_device

NAME = "copy"
KIB = 1 << 10
RUN_SLOTS = 16
"""Neighbouring host slots in a run: what slot allocation should make common."""
TURNS = 16
"""Both directions are given their pages in turns, as steps do: to give 2 GiB in pieces of 64 KiB takes one
thread 11 ms, and the other direction would idle so long."""
CHECK_BYTES = 256 << 20
"""Bytes that are checked at a time."""

Slots = torch.Tensor
"""int64 indices of slots, on the CPU."""


class Pattern(Enum):
    """Which host slots a batch takes; device slots are random always."""

    SCATTERED = "scattered"
    RUNS = f"runs of {RUN_SLOTS}"


# Piece -> the share of the ceiling that is aimed at, percent.
TARGETS: dict[Pattern, dict[int, float]] = {
    Pattern.SCATTERED: {
        16 * KIB: 90, 64 * KIB: 91, 256 * KIB: 97, 1024 * KIB: 98, 4096 * KIB: 98, 16384 * KIB: 98,
    },
    Pattern.RUNS: {16 * KIB: 97, 64 * KIB: 97, 256 * KIB: 97},
}  # fmt: skip
TWO_WAY_TARGETS: dict[int, float] = {64 * KIB: 89, 256 * KIB: 96, 1024 * KIB: 96}
QUICK_PIECES = (16 * KIB, 64 * KIB, 1024 * KIB)
WAYS = (Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST)

_seeds = count(1)


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    Raises
    ------
    ConfigError: no room for the buffers. CorruptPageError: bytes arrived wrong.
    """
    _calibrate(bench)
    with CopyField(bench) as place:
        for pattern, targets in TARGETS.items():
            for piece, target in _pieces(bench, targets):
                for way in WAYS:
                    yield place.one_way(pattern, piece, way, target)
        for piece, target in _pieces(bench, TWO_WAY_TARGETS):
            yield place.two_ways(piece, target)
        yield from measure_slow_down(bench, place.hot, place.host)


@dataclass(slots=True)
class Batch:
    """Pieces of one size from slots `src` of one buffer to slots `dst` of the other."""

    way: Direction
    piece: int
    src: Slots
    dst: Slots
    seed: int = field(default_factory=lambda: next(_seeds))


class CopyField:
    """A buffer of hot and one of pinned memory, between which batches run; a context.

    Every 8 bytes of a source hold their own index plus the batch's seed, so that any mix-up shows.
    """

    def __init__(self, bench: Run) -> None:
        self._bench = bench
        self._device: Device = bench.device
        total = bench.pick(gpu=4 << 30, cpu=256 << 20, quick_gpu=256 << 20, quick_cpu=16 << 20)
        self.hot: Memory = self._device.allocate(total)
        try:
            self.host: Memory = self._device.allocate_host(total)
        except BaseException:
            self.hot.free()
            raise
        self._num_bytes = total
        self._streams: list[Stream] = [self._device.new_stream(), self._device.new_stream()]
        self._random = torch.Generator().manual_seed(0)

    def __enter__(self) -> CopyField:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.synchronize()
        self.hot.free()
        self.host.free()

    def one_way(self, pattern: Pattern, piece: int, way: Direction, target: float) -> Result:
        """The rate of one direction, everything in one batch."""
        self._bench.progress(f"copy: {way.value}, {pattern.value}, {piece // KIB} KiB")
        batch = self._batch(pattern, piece, way, self._num_bytes)
        values = self._time([batch])
        parameters: Parameters = {
            "direction": way.value, "pieces": pattern.value, "piece_bytes": piece,
            "total_bytes": self._num_bytes,
        }  # fmt: skip
        ceiling = Ceiling(
            f"one large copy, {way.value}", self._bench.ceilings.link_rate(way) / GIGA
        )
        subject = Subject(
            NAME, "one way", parameters, "GB/s", target_percent=self._bench.aim(target),
            note=self._method(piece, [way], 1 if pattern is Pattern.SCATTERED else RUN_SLOTS),
        )  # fmt: skip
        return measured(subject, values, ceiling)

    def two_ways(self, piece: int, target: float) -> Result:
        """The rate of both directions together, each with half of the bytes on a stream of its own."""
        self._bench.progress(f"copy: both directions at once, {piece // KIB} KiB")
        half = self._num_bytes // 2
        down = self._batch(Pattern.SCATTERED, piece, WAYS[0], half)
        up = self._batch(Pattern.SCATTERED, piece, WAYS[1], half)
        # the second batch has the other half of both buffers
        up.src, up.dst = up.src + half // piece, up.dst + half // piece
        values = self._time([down, up])
        parameters: Parameters = {
            "pieces": "scattered",
            "piece_bytes": piece,
            "total_bytes": 2 * half,
        }
        ceiling = Ceiling(
            "one large copy each way at once", self._bench.ceilings.two_way_link_rate() / GIGA
        )
        subject = Subject(
            NAME, "two ways", parameters, "GB/s", target_percent=self._bench.aim(target),
            note=self._method(piece, WAYS, 1),
        )  # fmt: skip
        return measured(subject, values, ceiling)

    # ---- inside ------------------------------------------------------------------------------------

    def _method(self, piece: int, ways: Sequence[Direction], run_length: int) -> str:
        """The way of copying that the device chooses; nothing where it has but one."""
        device = self._device
        if not isinstance(device, MeasurableDevice) or device.copy_rates is None:
            return ""
        rates = device.copy_rates
        names = [rates.best(way, piece, run_length, busy=len(ways) > 1).value for way in ways]
        return ", ".join(dict.fromkeys(names))

    def _batch(self, pattern: Pattern, piece: int, way: Direction, num_bytes: int) -> Batch:
        slots = num_bytes // piece
        hot = torch.randperm(slots, generator=self._random)
        if pattern is Pattern.SCATTERED:
            host = torch.randperm(slots, generator=self._random)
        else:
            starts = torch.randperm(slots // RUN_SLOTS, generator=self._random) * RUN_SLOTS
            host = (starts[:, None] + torch.arange(RUN_SLOTS)).flatten()
        src, dst = (host, hot) if way is Direction.HOST_TO_DEVICE else (hot, host)
        return Batch(way, piece, src, dst[: len(src)])

    def _time(self, batches: list[Batch]) -> list[float]:
        streams = self._streams[: len(batches)]
        turns = 1 if len(batches) == 1 else TURNS
        calls = [self._calls(*pair, turns) for pair in zip(batches, streams, strict=True)]
        for batch in batches:
            self._fill(batch)

        def run_all() -> None:
            for turn in zip(*calls, strict=True):
                for call in turn:
                    call()

        samples = time_device(self._device, run_all, self._bench.repeats, streams=streams)
        for batch in batches:
            self._check(batch)
        return rates(samples, sum(batch.piece * len(batch.src) for batch in batches))

    def _calls(self, batch: Batch, stream: Stream, turns: int) -> list[Callable[[], None]]:
        """The batch in so many parts, each to be given to `stream` by a call."""
        src, dst = self._ends(batch)
        src_at = np.array_split(_addresses(src, batch.src, batch.piece), turns)
        dst_at = np.array_split(_addresses(dst, batch.dst, batch.piece), turns)

        def part(to: Addresses, at: Addresses) -> Callable[[], None]:
            return lambda: self._device.copy(batch.way, to, at, batch.piece, stream)

        return [part(to, at) for to, at in zip(dst_at, src_at, strict=True)]

    def _ends(self, batch: Batch) -> tuple[Memory, Memory]:
        """Source and destination."""
        down = batch.way is Direction.HOST_TO_DEVICE
        return (self.host, self.hot) if down else (self.hot, self.host)

    def _fill(self, batch: Batch) -> None:
        """Write the source slots; what other slots hold is of no matter."""
        words = self._ends(batch)[0].tensor.view(torch.int64)
        first, end = _range(batch.src, batch.piece)
        torch.arange(first + batch.seed, end + batch.seed, out=words[first:end])
        self._device.compute_stream().synchronize()

    def _check(self, batch: Batch) -> None:
        """Compare every word that arrived with the one that was to arrive, on the device."""
        words = batch.piece // 8
        target = self._device.torch_device
        got = self._ends(batch)[1].tensor.view(torch.int64).view(-1, words)
        order = torch.argsort(batch.dst)
        dst, src = batch.dst[order], batch.src[order]
        step = max(1, CHECK_BYTES // batch.piece)
        within = torch.arange(words, device=target) + batch.seed
        for start in range(0, len(dst), step):
            wanted = src[start : start + step].to(target)[:, None] * words + within
            # whole ranges of slots where there are no gaps, so that they are uploaded in one piece
            first, last = int(dst[start]), int(dst[start : start + step][-1])
            part = got[first : last + 1].to(target)[dst[start : start + step] - first]
            wrong = int((part != wanted).any(1).sum())
            if wrong:
                raise CorruptPageError(
                    f"copy {batch.way.value} of {len(dst)} pieces of {batch.piece} bytes: {wrong} of "
                    f"{len(wanted)} looked at did not arrive as they were"
                )


def _calibrate(bench: Run) -> None:
    """Let ways of copying be chosen by rates of this run, as managers choose by those of `tiermem calibrate`."""
    device = bench.device
    if bench.scale is Scale.FULL and isinstance(device, MeasurableDevice):
        bench.progress("copy: calibrating the ways of copying")
        device.copy_rates = measure_copies(device)


def _addresses(memory: Memory, slots: Slots, piece: int) -> Addresses:
    return memory.address + slots.numpy().astype(np.int64) * piece


def _range(slots: Slots, piece: int) -> tuple[int, int]:
    """First word and end of the words that `slots` span."""
    words = piece // 8
    return int(slots.min()) * words, (int(slots.max()) + 1) * words


def _pieces(bench: Run, targets: dict[int, float]) -> list[tuple[int, float]]:
    if bench.scale is Scale.FULL:
        return list(targets.items())
    return [(piece, target) for piece, target in targets.items() if piece in QUICK_PIECES]
