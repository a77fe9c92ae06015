"""RamBalance: the CPU's share of what is in RAM, refined by what steps took.

The formula of ram_split has three unknowns. How fast the CPU attends is measured by every step, and how fast the
link is by each that the link limits. The third one, how long the CPU has no queries, cannot be measured: it holds
what a step does besides, and what neither of the two is to blame for. So it is what is turned, until the GPU waits
for the CPU in about every second layer. Layers are counted, not the time waited for: a thread that loses its core
for a few milliseconds makes one layer late, however long, and says nothing about the other ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiermem.pools import Slots
from tiermem.ram_attention import MOST_ROWS, RamWork, StepBytes, first_places
from tiermem.ram_split import SplitRates, SplitWork, best_split, split_time

NEWEST = 0.25
"""Weight of the newest step in what is remembered."""
ODD, MOST_ODD = 2.0, 3
"""A step that takes so many times what was foreseen tells nothing, unless as many before it did too."""
HALF = 0.5
"""Of the layers: where the CPU is last in fewer, the link is the limit."""
FIRST_TURN, LEAST_TURN, MOST_TURN = 0.02, 0.002, 0.1
"""Of a step's time, by which the time without queries is turned at once."""
ONWARD, BACK = 2.0, 0.5
"""Times the last turn, if it went the same way, or the other: large turns far away, small ones when it is near."""
FORGET = 0.5
"""Of the time without queries, a step in which the CPU had nothing to do."""
RETRY = 0.005
"""By which the CPU is taken to be faster after each such step, so that it is tried again."""
ROWS_SLOWER = 0.5
"""Of the CPU's rate, by which twice as many new tokens are guessed to cost, before it was seen."""


@dataclass(slots=True)
class _Pace:
    """Of steps with some number of new tokens: how fast the CPU attends, how long it has no queries, and by which
    part of a step's time that was turned last, above 0 for a longer one."""

    cpu: float
    idle_s: float = 0.0
    turn: float = 0.0

    def turn_idle(self, late: float, elapsed_s: float) -> None:
        """The CPU was last in a share of `late` of the layers: let it have less if in most, else more."""
        way = min(max(4 * (late - HALF), -1.0), 1.0)
        onward = ONWARD if way * self.turn > 0 else BACK
        size = abs(self.turn) * onward if self.turn else FIRST_TURN
        size = min(max(size, LEAST_TURN), MOST_TURN)
        self.turn = size if way > 0 else -size
        self.idle_s = max(self.idle_s + way * size * elapsed_s, 0.0)


class RamBalance:
    """Divides what is in RAM so that link and CPU end at once; `rates` are where it starts from."""

    def __init__(self, rates: SplitRates, most_rows: int = MOST_ROWS) -> None:
        self.most_rows = most_rows
        self._link = rates.link
        self._rates = rates
        self._odd = 0
        self._paces = {1: _Pace(rates.cpu)}

    def fraction(self, wanted: StepBytes) -> float:
        """Of pages that are in RAM alone, for a step that needs `wanted`."""
        if wanted.new_tokens > self.most_rows:
            return 0.0
        return best_split(*self._known(wanted)).fraction

    def choose(self, homes: Slots, new_tokens: int, fraction: float) -> Slots:
        """As RamPolicy does."""
        return first_places(homes, fraction if new_tokens <= self.most_rows else 0.0)

    def learn(self, wanted: StepBytes, work: RamWork, elapsed_s: float) -> None:
        """A step took `elapsed_s` from when the link began, and the CPU did `work` for it."""
        if wanted.ram == 0 or wanted.new_tokens > self.most_rows:
            return
        pace = self._pace(wanted.new_tokens)
        if work.num_bytes == 0:
            # Nothing can be learned without it: one slow step must not end it for good.
            pace.idle_s *= FORGET
            pace.cpu *= 1 + RETRY
            return
        streamed = wanted.ram - work.num_bytes + wanted.cold
        if work.seconds <= 0 or streamed <= 0 or work.late is None:
            return
        foreseen_s = split_time(*self._known(wanted), work.num_bytes / wanted.ram)
        if elapsed_s > ODD * foreseen_s and self._odd < MOST_ODD:
            self._odd += 1  # something was compiled in it, or it was stopped
            return
        self._odd = 0
        pace.cpu = _mixed(pace.cpu, work.num_bytes / work.seconds)
        link = streamed / elapsed_s
        self._link = _mixed(self._link, link) if work.late < HALF else max(self._link, link)
        pace.turn_idle(work.late, elapsed_s)
        if elapsed_s > (wanted.ram + wanted.cold) / self._link:
            # The link alone would have been faster: no small turns then.
            pace.idle_s = max(pace.idle_s, elapsed_s - work.seconds)

    def _known(self, wanted: StepBytes) -> tuple[SplitWork, SplitRates]:
        pace = self._pace(wanted.new_tokens)
        rates = replace(self._rates, link=self._link, cpu=pace.cpu, cpu_alone=None)
        return SplitWork(wanted.ram, wanted.cold, gpu_s=pace.idle_s), rates

    def _pace(self, new_tokens: int) -> _Pace:
        """Of steps with about as many new tokens."""
        key = 1 << (max(new_tokens, 1) - 1).bit_length()
        if key not in self._paces:
            fewer = max(known for known in self._paces if known < key)
            pace = self._paces[fewer]
            doublings = (key // fewer).bit_length() - 1
            self._paces[key] = _Pace(pace.cpu * ROWS_SLOWER**doublings, pace.idle_s)
        return self._paces[key]


def _mixed(old: float, new: float) -> float:
    return (1 - NEWEST) * old + NEWEST * new
