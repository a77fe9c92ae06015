"""Stats: a frozen picture of one manager, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tiermem.disk_budget import DiskStats
from tiermem.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier, in pages of `page_bytes` bytes; everything from `free` to `open` adds up to `slots`.

    `clean` copies can be dropped at once; `duplicate` ones too, but are the lowest copy of a page that is also
    in a hotter tier. `reads` counts pages that steps found with this as their hottest copy, `corrupt` copies
    whose bytes were not those that were stored.
    """

    tier: str
    slots: int
    page_bytes: int
    free: int
    filling: int
    clean: int
    duplicate: int
    dirty: int
    pinned: int
    open: int
    reads: int
    evictions: int
    demotions: int
    corrupt: int = 0

    @property
    def used(self) -> int:
        """Slots that hold a copy or are being filled."""
        return self.slots - self.free


@dataclass(frozen=True, slots=True)
class FlowStats:
    """What went from tier `src` to tier `dst`; the rate is a mean over the time with something in flight.

    `num_bytes`, `transfers` and the rate are of whole pages; `streamed_bytes` are slices of pages for a step.
    `limit_gb_per_s` is the rate that was measured to be possible on this route; None where nothing was.
    """

    src: str
    dst: str
    num_bytes: int
    transfers: int
    in_flight: int
    gb_per_s: float
    streamed_bytes: int
    limit_gb_per_s: float | None = None

    @property
    def share_of_limit(self) -> float | None:
        """The mean rate as a share of what is possible, about 0 to 1; None where nothing moved or is known."""
        if not self.limit_gb_per_s or self.gb_per_s <= 0:
            return None
        return self.gb_per_s / self.limit_gb_per_s


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """Whether `tier` is used: `state` is "on", "read-only" or "off"; it was switched off `trips` times.

    `reason` is the last one. It is tried again in `retry_in_s` seconds, None where it is on, and not before `late`
    operations have ended, which have missed their deadline.
    """

    tier: str
    state: str
    reason: str
    trips: int
    late: int
    retry_in_s: float | None


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """One open sequence."""

    label: str
    tokens: int
    pages: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A manager at one moment. Times are seconds since the epoch, sizes bytes.

    `attended_bytes` of K and V were attended by the CPU where they lie in RAM, in `attended_s` seconds;
    `attended_limit_gb_per_s` is the rate at which it was measured to read RAM, None where it was not.
    `last_step` is the newest one that was not undone. `disk` is None where there is no SSD tier.
    `computed_again_tokens` had been stored before, and their pages were lost.
    """

    pid: int
    model_id: str
    device: str
    device_kind: str
    started_s: float
    updated_s: float
    page_tokens: int
    tiers: tuple[TierStats, ...]
    flows: tuple[FlowStats, ...]
    sequences: tuple[SequenceStats, ...]
    steps: int
    in_flight: int
    published_pages: int
    prompt_tokens: int
    attached_tokens: int
    failed_transfers: int
    corrupt_pages: int
    staging_device_bytes: int
    staging_host_bytes: int
    device_used_bytes: int
    device_total_bytes: int
    rss_bytes: int
    ssd_path: str | None
    ssd_disk_bytes: int
    ssd_io: str | None
    attended_bytes: int
    attended_s: float
    attended_limit_gb_per_s: float | None
    last_step: StepRecord | None = None
    disk: DiskStats | None = None
    computed_again_tokens: int = 0
    breakers: tuple[BreakerStats, ...] = ()

    @property
    def attended_gb_per_s(self) -> float:
        """Mean rate of the CPU's attention while it attended, 10^9 bytes a second; 0 where it did not."""
        return self.attended_bytes / self.attended_s / 1e9 if self.attended_s > 0 else 0.0

    @property
    def attended_share_of_limit(self) -> float | None:
        """That rate as a share of the rate of RAM reads; None where nothing was attended or is known."""
        if not self.attended_limit_gb_per_s or self.attended_gb_per_s <= 0:
            return None
        return self.attended_gb_per_s / self.attended_limit_gb_per_s

    @property
    def hit_rates(self) -> dict[str, float]:
        """Of the stored pages that steps needed, the share found in each tier; empty before the first."""
        total = sum(tier.reads for tier in self.tiers)
        return {tier.tier: tier.reads / total for tier in self.tiers} if total else {}

    @property
    def prefix_hit_rate(self) -> float:
        """Of the tokens given to `open_sequence`, the share that was attached from the cache."""
        return self.attached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_json(self) -> dict[str, object]:
        """Names and plain values, for `json.dumps`."""
        derived = {
            "hit_rates": self.hit_rates,
            "prefix_hit_rate": self.prefix_hit_rate,
            "attended_share_of_limit": self.attended_share_of_limit,
        }
        flows = [{**asdict(flow), "share_of_limit": flow.share_of_limit} for flow in self.flows]
        step = self.last_step
        last_step = None if step is None else {**asdict(step), "limit": step.limit}
        return {**asdict(self), "flows": flows, "last_step": last_step, **derived}
