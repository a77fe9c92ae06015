"""Breaker: switches a tier off that fails or does not answer, and lets it be tried again later.

A tier whose writes fail is read-only: what it holds can still be read. One whose reads fail, or that misses a
deadline, is off. It is tried again by one probe after a while that doubles each time; as long as something is
late there, that is the probe.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from tiermem.backoff import Backoff
from tiermem.errors import TransferError

log = logging.getLogger("tiermem")

MOST_FAILURES = 3
"""In a row, of reads or of writes, before a tier is switched off."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0


class Use(Enum):
    """What a tier is wanted for."""

    READ = "read"
    WRITE = "write"


class TierState(Enum):
    """What a tier can be used for."""

    ON = "on"
    READ_ONLY = "read-only"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class BreakerReport:
    """A breaker at one moment: `num_trips` times switched off so far, for `reason` the last time; `retry_in_s`
    seconds until it is tried again, None while it is on."""

    state: TierState
    num_trips: int
    reason: str
    retry_in_s: float | None


class Breaker:
    """Of one tier, called `name` in messages; `clock` tells seconds that never run backwards."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_trips = 0
        self.num_late = 0
        """Of operations that missed their deadline and have not ended."""
        self._name = name
        self._clock = clock
        self._failures = dict.fromkeys(Use, 0)
        self._shut: frozenset[Use] = frozenset()
        self._reason = ""
        self._backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S, clock)
        self._good_until_s = 0.0
        self._is_probing = False
        self._has_probe = False

    @property
    def state(self) -> TierState:
        """What the tier can be used for now."""
        if Use.READ in self._shut:
            return TierState.OFF
        return TierState.READ_ONLY if self._shut else TierState.ON

    def allows(self, use: Use) -> bool:
        """Whether the tier may be used so."""
        return self._is_probing or use not in self._shut

    def check(self, use: Use) -> None:
        """Raise TransferError, saying why and until when, where the tier may not be used so."""
        if not self.allows(use):
            raise TransferError(errno.EIO, self.describe())

    def describe(self) -> str:
        """Why the tier is not on."""
        late = "when what is late there has ended"
        again = late if self.num_late else f"in {self._backoff.left_s:.1f} s"
        return f"the {self._name} tier is {self.state.value} ({self._reason}), it is tried again {again}"

    def report(self) -> BreakerReport:
        """What `stats` shows."""
        wait_s = None if self.state is TierState.ON else self._backoff.left_s
        return BreakerReport(self.state, self.num_trips, self._reason, wait_s)

    # ---- what happened -----------------------------------------------------------------------------

    def note_good(self, use: Use) -> None:
        """An operation ended well."""
        self._failures[use] = 0

    def note_failure(self, use: Use, reason: str) -> None:
        """One failed; after some in a row the tier is switched off for that use."""
        self._failures[use] += 1
        if self._failures[use] >= MOST_FAILURES or self._is_probing:
            shut = frozenset(Use) if use is Use.READ else frozenset((Use.WRITE,))
            self._trip(shut, f"{self._failures[use]} failures, the last: {reason}")

    def note_late(self, reason: str) -> None:
        """One missed its deadline and goes on: nothing else is given to the tier until `late_ended`."""
        self.num_late += 1
        self._trip(frozenset(Use), reason)

    def late_ended(self) -> None:
        """One that was late has ended, well or not."""
        self.num_late -= 1

    # ---- trying again ------------------------------------------------------------------------------

    def is_probe_due(self) -> bool:
        """Whether it is time for one probe."""
        is_shut = bool(self._shut) and not self._has_probe
        return is_shut and self.num_late == 0 and self._backoff.is_over

    def begin_probe(self) -> None:
        """One is on its way, until `probe_ended`; there is only one at a time."""
        self._has_probe = True

    @contextmanager
    def probing(self) -> Iterator[None]:
        """What is started within passes, though the tier is not on."""
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False

    def probe_ended(self, error: TransferError | None) -> None:
        """A probe ended: the tier is on again, or tried later."""
        self._has_probe = False
        if error is not None:
            self._trip(self._shut, str(error))
            return
        log.warning("the %s tier is on again", self._name)
        self._shut = frozenset()
        self._failures = dict.fromkeys(Use, 0)
        self._good_until_s = self._clock() + 2 * self._backoff.pause_s

    def _trip(self, shut: frozenset[Use], reason: str) -> None:
        if not self._shut >= shut or self._backoff.is_over:
            # one that fails again soon after it came back is left alone for longer
            if not self._shut and self._clock() >= self._good_until_s:
                self._backoff.note_good()
            self._backoff.note_failure()
        if not self._shut:
            self.num_trips += 1
        self._shut |= shut
        self._reason = reason
        log.error("%s", self.describe())
