"""RamBalance: the CPU's share of what is in RAM, refined by what steps took.

The formula of ram_split has three unknowns: how fast the link is, how fast the CPU attends, and how long the CPU
has no queries. Whichever of the two was last in a step tells its own part; the other one is only bounded, and a
little more is tried of it in the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiermem.pools import Slots
from tiermem.ram_attention import MOST_ROWS, RamWork, StepBytes, first_places
from tiermem.ram_split import SplitRates, SplitWork, best_split

NEWEST = 0.5
"""Weight of the newest step in what is remembered."""
LATE = 0.05
"""Of a step: with a GPU that waits longer than this for the CPU, the CPU was last."""
HOPE = 0.01
"""By which what was only bounded is taken to be better than that: without it, any share would confirm itself."""
FORGET = 0.5
"""Of the time without queries, a step in which the CPU had nothing to do."""
ROWS_SLOWER = 0.5
"""Of the CPU's rate, by which twice as many new tokens are guessed to cost, before it was seen."""


@dataclass(slots=True)
class _Pace:
    """Of steps with some number of new tokens: how fast the CPU attends, and how long it has no queries."""

    cpu: float
    idle_s: float = 0.0


class RamBalance:
    """Divides what is in RAM so that link and CPU end at once; `rates` are where it starts from."""

    def __init__(self, rates: SplitRates, most_rows: int = MOST_ROWS) -> None:
        self.most_rows = most_rows
        self._link = rates.link
        self._rates = rates
        self._paces = {1: _Pace(rates.cpu)}

    def fraction(self, wanted: StepBytes) -> float:
        """Of pages that are in RAM alone, for a step that needs `wanted`."""
        if wanted.new_tokens > self.most_rows:
            return 0.0
        pace = self._pace(wanted.new_tokens)
        work = SplitWork(wanted.ram, wanted.cold, gpu_s=pace.idle_s)
        rates = replace(self._rates, link=self._link, cpu=pace.cpu, cpu_alone=None)
        return best_split(work, rates).fraction

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
            pace.cpu *= 1 + HOPE
            return
        streamed = wanted.ram - work.num_bytes + wanted.cold
        if work.seconds <= 0 or streamed <= 0 or work.awaited_s is None:
            return
        pace.cpu = _mixed(pace.cpu, work.num_bytes / work.seconds)
        link, idle_s = streamed / elapsed_s, max(elapsed_s - work.seconds, 0.0)
        if work.awaited_s > LATE * elapsed_s:
            pace.idle_s = _mixed(pace.idle_s or idle_s, idle_s)
            self._link = max(self._link, link) * (1 + HOPE)
        else:
            self._link = _mixed(self._link, link)
            pace.idle_s = max(min(pace.idle_s, idle_s) - HOPE * elapsed_s, 0.0)

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
