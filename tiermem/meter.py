"""Meter: bytes and busy time of each direction between two tiers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tiermem.pools import Tier

Route = tuple[Tier, Tier]


@dataclass(frozen=True, slots=True)
class Flow:
    """What went one way so far. `busy_s` is the time with at least one transfer in flight, as the host saw it.

    `streamed_bytes` went through the ring, as slices for a step, not as transfers of pages.
    """

    num_bytes: int = 0
    num_transfers: int = 0
    in_flight: int = 0
    busy_s: float = 0.0
    streamed_bytes: int = 0

    @property
    def gb_per_s(self) -> float:
        """Mean rate while busy, 10^9 bytes a second: a lower bound, since ends are seen late."""
        return self.num_bytes / self.busy_s / 1e9 if self.busy_s > 0 else 0.0


class Meter:
    """Counts transfers by route; the clock of a route runs while something is in flight on it."""

    def __init__(self) -> None:
        self._flows: dict[Route, Flow] = {}
        self._since_s: dict[Route, float] = {}
        self.attended_bytes = 0
        """K and V that the CPU attended where they lie in RAM."""
        self.attended_s = 0.0
        """The time that took."""

    def begin(self, src: Tier, dst: Tier) -> None:
        """A transfer was submitted."""
        flow = self._flows.get((src, dst), Flow())
        if flow.in_flight == 0:
            self._since_s[src, dst] = time.perf_counter()
        self._flows[src, dst] = replace(flow, in_flight=flow.in_flight + 1)

    def end(self, src: Tier, dst: Tier, num_bytes: int) -> None:
        """A transfer was seen ended, after moving `num_bytes`."""
        flow = self._flows[src, dst]
        busy_s = flow.busy_s
        if flow.in_flight == 1:
            busy_s += time.perf_counter() - self._since_s[src, dst]
        self._flows[src, dst] = replace(
            flow,
            num_bytes=flow.num_bytes + num_bytes,
            num_transfers=flow.num_transfers + 1,
            in_flight=flow.in_flight - 1,
            busy_s=busy_s,
        )

    def stream(self, src: Tier, dst: Tier, num_bytes: int) -> None:
        """Slices of `num_bytes` together were sent through the ring."""
        flow = self._flows.get((src, dst), Flow())
        self._flows[src, dst] = replace(flow, streamed_bytes=flow.streamed_bytes + num_bytes)

    def attend(self, num_bytes: int, seconds: float) -> None:
        """The CPU attended over slices of `num_bytes` together."""
        self.attended_bytes += num_bytes
        self.attended_s += seconds

    def streamed_in(self, src: Tier) -> int:
        """Bytes of slices that came from `src` to the device so far."""
        return self._flows.get((src, Tier.GPU), Flow()).streamed_bytes

    def flows(self) -> dict[Route, Flow]:
        """The counts now, by (from, to)."""
        return dict(self._flows)
