"""Measuring copies: what each way of copying reaches on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from time import perf_counter
from typing import Protocol, runtime_checkable

import numpy as np

from tiermem.device.copy_rates import CopyCase, CopyMethod, CopyRate, CopyRates
from tiermem.device.protocol import Addresses, Device, Direction, Memory, Stream
from tiermem.errors import ConfigError

UP, DOWN = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST
OPPOSITE = {UP: DOWN, DOWN: UP}
SCATTERED = (CopyMethod.BATCH, CopyMethod.KERNEL)
IN_RUNS = (CopyMethod.BATCH, CopyMethod.RUNS, CopyMethod.KERNEL)
KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What is measured: for each case `batches` batches of `total_bytes` in each direction, repeated.

    The batches of one repeat follow each other without a wait, as those of a step do: one alone
    would show how soon a method starts more than how fast it is.
    """

    sizes: tuple[int, ...]
    run_lengths: tuple[int, ...]
    total_bytes: int
    batches: int
    repeats: int

    def cases(self) -> Iterator[tuple[int, int]]:
        """Piece bytes and run lengths of which at least one run fits."""
        for size, run in product(self.sizes, self.run_lengths):
            if size * run <= self.total_bytes:
                yield size, run


COARSE = CopyPlan((16 * KIB, 64 * KIB, 256 * KIB), (1, 16), 16 << 20, 2, 2)
FINE = CopyPlan(
    (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 1024 * KIB),
    (1, 4, 16, 64),
    32 << 20,
    4,
    3,
)
FINE_SECONDS = 5.0
"""What FINE takes with a PCIe gen 5 x16 link."""
MIN_TOTAL_BYTES = 4 << 20

_measured: dict[str, CopyRates] = {}


@runtime_checkable
class MeasurableDevice(Device, Protocol):
    """A device with several ways of copying."""

    copy_rates: CopyRates | None
    copy_method: CopyMethod | None


def measure_copies(device: Device, *, seconds: float = FINE_SECONDS) -> CopyRates:
    """What every way of copying reaches on `device`, in about so many seconds.

    Waits for the copies; nothing else should run on the device. The device keeps its own rates.

    Returns
    -------
    The rates; none for a device that has one way of copying only, or no room for two buffers.

    Raises
    ------
    ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0")
    share = min(1.0, seconds / FINE_SECONDS)
    total_bytes = max(MIN_TOTAL_BYTES, int(FINE.total_bytes * share))
    return _measure(device, replace(FINE, total_bytes=total_bytes))


def measure_once(device: MeasurableDevice) -> None:
    """Give `device` coarse rates: those measured before for such a device, or new ones."""
    # Set before measuring, which makes streams itself.
    device.copy_rates = _measured.get(device.name, CopyRates())
    if device.name not in _measured:
        device.copy_rates = _measured[device.name] = _measure(device, COARSE)


def _measure(device: Device, plan: CopyPlan) -> CopyRates:
    if not isinstance(device, MeasurableDevice):
        return CopyRates()
    try:
        with _Field.on(device, plan.total_bytes) as field, _free_choice(device):
            return CopyRates(tuple(_rows(field, plan)))
    except ConfigError:
        return CopyRates()


def _rows(field: _Field, plan: CopyPlan) -> Iterator[CopyRate]:
    for size, run in plan.cases():
        for direction, busy in product((UP, DOWN), (False, True)):
            case = CopyCase(direction, busy, size, run)
            for method in IN_RUNS if run > 1 else SCATTERED:
                yield CopyRate(case, method, field.rate(case, method, plan))
    for size in plan.sizes:
        case = CopyCase(Direction.DEVICE_TO_DEVICE, False, size, 1)
        for method in SCATTERED:
            yield CopyRate(case, method, field.rate(case, method, plan))


@contextmanager
def _free_choice(device: MeasurableDevice) -> Iterator[None]:
    """Put the device's own method back at the end."""
    before = device.copy_method
    try:
        yield
    finally:
        device.copy_method = before


@dataclass(frozen=True, slots=True)
class _Field:
    """Two buffers on each side, and a stream for each direction."""

    device: MeasurableDevice
    hot: Memory
    host: Memory
    streams: dict[Direction, Stream]

    @classmethod
    @contextmanager
    def on(cls, device: MeasurableDevice, total_bytes: int) -> Iterator[_Field]:
        hot = device.allocate(2 * total_bytes)
        try:
            host = device.allocate_host(2 * total_bytes)
            try:
                up, down = device.new_stream(), device.new_stream()
                streams = {UP: up, DOWN: down, Direction.DEVICE_TO_DEVICE: up}
                yield cls(device, hot, host, streams)
            finally:
                host.free()
        finally:
            hot.free()

    def rate(self, case: CopyCase, method: CopyMethod, plan: CopyPlan) -> float:
        """GB/s of one direction; with both at work the mean of them."""
        self.device.copy_method = method
        ways = [case.direction, OPPOSITE[case.direction]] if case.busy else [case.direction]
        batches = [(way, *self._addresses(way, case)) for way in ways]
        self._run(batches, case.piece_bytes)  # warms up
        times = [self._run(batches * plan.batches, case.piece_bytes) for _ in range(plan.repeats)]
        num_bytes = plan.batches * len(batches[0][1]) * case.piece_bytes
        return num_bytes / median(times) / 1e9

    def _run(
        self, batches: list[tuple[Direction, Addresses, Addresses]], piece_bytes: int
    ) -> float:
        start = perf_counter()
        for way, dst, src in batches:
            self.device.copy(way, dst, src, piece_bytes, self.streams[way])
        for stream in {way: self.streams[way] for way, _, _ in batches}.values():
            stream.synchronize()
        return perf_counter() - start

    def _addresses(self, way: Direction, case: CopyCase) -> tuple[Addresses, Addresses]:
        """Destinations and sources, each in a half of the buffers of its own for each direction."""
        half = self.hot.num_bytes // 2
        offset = half if way is DOWN else 0
        random = np.random.default_rng(0)
        count = half // case.piece_bytes // case.run_length * case.run_length
        runs = random.permutation(count // case.run_length)[:, None] * case.run_length
        host_slots = (runs + np.arange(case.run_length)).ravel()
        hot_slots = random.permutation(count)
        hot = self.hot.address + offset + hot_slots.astype(np.int64) * case.piece_bytes
        if way is Direction.DEVICE_TO_DEVICE:
            return hot, self.hot.address + half + random.permutation(count) * case.piece_bytes
        host = self.host.address + offset + host_slots.astype(np.int64) * case.piece_bytes
        return (hot, host) if way is UP else (host, hot)
