"""Runner: cases of all kinds in rotation, a few at a time, until the time or the number of cases is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from torture.cases import Case, seed_of
from torture.soak import run_soak
from torture.tally import Tally

CASE_LIMIT_S = 300.0
"""Cases take seconds; one that has not ended by then hangs."""
NAP_S = 0.02
OFTEN = {"kill": 4}
"""Cases in a rotation, of kinds that have more than one: so that 20 minutes are thousands of kills."""


@dataclass(slots=True)
class Runner:
    """Runs cases of `kinds` from `seed`, `jobs` at a time; `total` is what they saw.

    minutes: starts no case after so long; num_cases: of each kind; kills: ends with
    so many; only: the one case of this kind and seed.
    """

    kinds: Sequence[str]
    seed: int
    jobs: int
    minutes: float | None = None
    num_cases: int | None = None
    directory: Path | None = None
    kills: int | None = None
    only: tuple[str, int] | None = None
    total: Tally = field(default_factory=Tally)

    def run(self, progress: Callable[[float, Tally], None]) -> None:
        """All cases; `progress` is told the seconds since the start now and then."""
        start_s = time.monotonic()
        waiting = self._cases()
        running: dict[Case, float] = {}
        try:
            self._start_soak(running)
            while True:
                now_s = time.monotonic() - start_s
                over = self._is_over(now_s)
                while not over and len(running) < self.jobs and (chosen := next(waiting, None)):
                    running[Case.start(*chosen, self.directory)] = time.monotonic()
                if not running:
                    return
                self._collect(running)
                progress(now_s, self.total)
                time.sleep(NAP_S)
        finally:
            for case in running:
                case.kill()

    def _is_over(self, now_s: float) -> bool:
        if self.kills is not None and self.total.kills.total() >= self.kills:
            return True
        return self.minutes is not None and now_s >= self.minutes * 60

    def _start_soak(self, running: dict[Case, float]) -> None:
        """Of a run of some minutes, one case goes on from its start to its end."""
        if self.minutes is None or "soak" not in self.kinds:
            return
        self.jobs += 1
        seed = self.only[1] if self.only else seed_of(self.seed, "soak", 0)
        soak = partial(run_soak, seconds=self.minutes * 60)
        # its limit counts from its end
        running[Case.start("soak", seed, self.directory, soak)] = (
            time.monotonic() + self.minutes * 60
        )

    def _cases(self) -> Iterator[tuple[str, int]]:
        soaks = self.minutes is not None  # in a case of its own already
        if self.only is not None:
            yield from () if soaks and self.only[0] == "soak" else (self.only,)
            return
        kinds = [kind for kind in self.kinds if not (soaks and kind == "soak")]
        numbers = count() if self.num_cases is None else range(self.num_cases)
        for number in numbers if kinds else ():
            for kind in kinds:
                times = OFTEN.get(kind, 1) if self.num_cases is None else 1
                for turn in range(times):
                    yield kind, seed_of(self.seed, kind, number * times + turn)

    def _collect(self, running: dict[Case, float]) -> None:
        for case, started_s in list(running.items()):
            tally = case.end(0.0)
            if tally is None and time.monotonic() - started_s > CASE_LIMIT_S:
                tally = case.hangs()
            if tally is not None:
                del running[case]
                self.total.add(tally)
