"""Turns: the same work with checksums compared and without, one after the other, again and again.

Clocks, links and disks are faster and slower by the minute: a cost of one percent shows only between runs that
lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median

from tiermem.bench.result import (
    GIGA,
    MICRO,
    Better,
    Ceiling,
    Parameters,
    Result,
    Subject,
    measured,
    not_measured,
)
from tiermem.bench.run import Run

NAME = "checksums"
WITHOUT = "without comparing"

Timed = Callable[[], float]
"""Does the work once; returns the seconds that count."""


class Unit(Enum):
    """What a row is given in."""

    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    RATE = "GB/s"


SECONDS = {Unit.MILLISECONDS: 1e-3, Unit.MICROSECONDS: MICRO}


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of the work with checksums and of what it is held against, turn by turn."""

    with_s: tuple[float, ...]
    without_s: tuple[float, ...]


def take_turns(with_sums: Timed, without: Timed, pairs: int) -> Turns:
    """Times of `pairs` runs of each, after one of each that does not count."""
    with_sums()
    without()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        # Who is first changes by the sequence of Thue and Morse: nothing that returns with a period of some
        # runs falls on one side alone.
        for side in (0, 1) if i.bit_count() % 2 == 0 else (1, 0):
            times[side].append((with_sums, without)[side]())
    return Turns(tuple(times[0]), tuple(times[1]))


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of this benchmark.

    num_bytes: what one run moves, where the unit is a rate.
    most_percent: of the time or the rate, what checksums may take; None where there is no aim.
    without: what the work is held against.
    """

    name: str
    parameters: Parameters
    unit: Unit
    most_percent: float | None
    num_bytes: int = 0
    without: str = WITHOUT

    def measured(self, bench: Run, turns: Turns, note: str = "") -> Result:
        """The figure with checksums; its ceiling is the one without, and the note tells what they cost."""
        values, others = self._values(turns.with_s), self._values(turns.without_s)
        ceiling = Ceiling(self.without, median(others))
        found = measured(self._subject(bench, note), values, ceiling)
        share = found.percent_of_ceiling
        if self.most_percent is None or share is None:
            return found
        notes = [*filter(None, [note]), f"checksums cost {100 - share:.2f} %"]
        return replace(found, subject=replace(found.subject, note="; ".join(notes)))

    def skipped(self, bench: Run, reason: str) -> Result:
        """The figure cannot be had here."""
        return not_measured(self._subject(bench, ""), reason)

    def _values(self, times_s: tuple[float, ...]) -> list[float]:
        if self.unit is Unit.RATE:
            return [self.num_bytes / seconds / GIGA for seconds in times_s]
        return [seconds / SECONDS[self.unit] for seconds in times_s]

    def _subject(self, bench: Run, note: str) -> Subject:
        better = Better.HIGHER if self.unit is Unit.RATE else Better.LOWER
        aim = None if self.most_percent is None else bench.aim(100 - self.most_percent)
        return Subject(
            NAME, self.name, self.parameters, self.unit.value, better, target_percent=aim, note=note
        )
