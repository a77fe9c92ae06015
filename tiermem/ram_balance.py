"""RamBalance: the CPU's share of what is in RAM, refined by what steps took.

The formula of ram_split has three unknowns: how fast the link is, how fast the CPU attends, and how long the CPU
has no queries. Whichever of the two was last in a step tells its own part; the other one is only bounded, and a
little more is tried of it in the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiermem.pools import Slots
from tiermem.ram_attention import MOST_ROWS, RamWork, StepBytes, first_places
from tiermem.ram_split import SplitRates, SplitWork, best_split, split_time
from tiermem.step_record import WAITED

NEWEST = 0.25
"""Weight of the newest step in what is remembered."""
ODD, MOST_ODD = 2.0, 3
"""A step that takes so many times what was foreseen tells nothing, unless as many before it did too."""
HOPE = 0.005
"""By which what was only bounded is taken to be better than that: without it, any share would confirm itself."""
MOST_HOPE, PATIENCE = 0.08, 2
"""How far it grows, twice as much each time, after the same one was last so many times in a row."""
FORGET = 0.5
"""Of the time without queries, a step in which the CPU had nothing to do."""
ROWS_SLOWER = 0.5
"""Of the CPU's rate, by which twice as many new tokens are guessed to cost, before it was seen."""


@dataclass(slots=True)
class _Pace:
    """Of steps with some number of new tokens: how fast the CPU attends, how long it has no queries, and who was
    last in the newest ones, with how many before them the same."""

    cpu: float
    idle_s: float = 0.0
    is_cpu_last: bool = False
    streak: int = 0

    def hope(self, *, is_cpu_last: bool) -> float:
        """Who was last now; by how much more is tried: the more, the longer it has been the same one."""
        self.streak = self.streak + 1 if is_cpu_last == self.is_cpu_last else 0
        self.is_cpu_last = is_cpu_last
        return min(HOPE * float(2 ** max(self.streak - PATIENCE, 0)), MOST_HOPE)


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
            pace.cpu *= 1 + HOPE
            return
        streamed = wanted.ram - work.num_bytes + wanted.cold
        if work.seconds <= 0 or streamed <= 0 or work.awaited_s is None:
            return
        foreseen_s = split_time(*self._known(wanted), work.num_bytes / wanted.ram)
        if elapsed_s > ODD * foreseen_s and self._odd < MOST_ODD:
            self._odd += 1  # something was compiled in it, or it was stopped
            return
        self._odd = 0
        pace.cpu = _mixed(pace.cpu, work.num_bytes / work.seconds)
        link, idle_s = streamed / elapsed_s, max(elapsed_s - work.seconds, 0.0)
        hope = pace.hope(is_cpu_last=work.awaited_s > WAITED * elapsed_s)
        if pace.is_cpu_last:
            pace.idle_s = _mixed(pace.idle_s or idle_s, idle_s)
            self._link = max(self._link, link) * (1 + hope)
        else:
            self._link = _mixed(self._link, link)
            pace.idle_s = max(min(pace.idle_s, idle_s) - hope * elapsed_s, 0.0)

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
