"""StepRecord: what one step read from where, how long that took, and what limited it."""

from __future__ import annotations

from dataclasses import dataclass

WAITED = 0.05
"""Of a step: where the device waited longer than this for the CPU, the CPU was last, and the limit."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. Bytes of K and V of old tokens; seconds.

    Parameters
    ----------
    new_tokens: of all its sequences.
    resident_bytes: read in the hot tier. streamed_bytes, cold_bytes: brought through the ring, layer by layer,
        from RAM and from the SSD.
    attended_bytes: read by the CPU where they lie in RAM, in `attended_s`. awaited_s: how long the device waited
        for that; None where it has no clock that tells.
    elapsed_s: from the start of the first load until the host left the step, which waits for the CPU's share and
        for nothing else.
    """

    new_tokens: int
    resident_bytes: int
    streamed_bytes: int
    cold_bytes: int
    attended_bytes: int
    attended_s: float
    awaited_s: float | None
    elapsed_s: float

    @property
    def limit(self) -> str:
        """What the step had to wait for: "GPU", where everything is resident, "SSD", "CPU" or "link"."""
        if self.attended_bytes and (self.awaited_s or 0.0) > WAITED * self.elapsed_s:
            return "CPU"
        if self.cold_bytes:
            return "SSD"
        if self.streamed_bytes:
            return "link"
        return "CPU" if self.attended_bytes else "GPU"
