"""Backoff: how long something that failed is left alone; longer with every failure in a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Backoff:
    """A pause that begins at `first_s` seconds and doubles up to `longest_s`.

    `clock` tells seconds that never run backwards.
    """

    def __init__(
        self, first_s: float, longest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pause_s = 0.0
        """The last pause; 0 after a success."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._until_s = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether it may be tried again."""
        return self._clock() >= self._until_s

    @property
    def left_s(self) -> float:
        """Seconds until then."""
        return max(0.0, self._until_s - self._clock())

    def note_failure(self) -> None:
        """It failed: a pause begins."""
        self.pause_s = min(max(self._first_s, 2 * self.pause_s), self._longest_s)
        self._until_s = self._clock() + self.pause_s

    def note_good(self) -> None:
        """It went well: the next pause is a short one again."""
        self.pause_s = 0.0
        self._until_s = -math.inf
