"""Tally: what a manager has counted, and its picture of one moment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

import psutil

from tiermem.core import Core
from tiermem.device.protocol import Device
from tiermem.meter import Route
from tiermem.pools import Tier
from tiermem.sequence import Sequence
from tiermem.stats import BreakerStats, FlowStats, SequenceStats, Stats, TierStats
from tiermem.step_record import StepRecord
from tiermem.store import ColdStore


class Tally:
    """Of one manager, which was made at `started_s`, seconds since 1970.

    `limits` and `attended_limit` are the rates that were measured to be possible, 10^9 bytes/s: of the routes that
    have one, and of the CPU's reads of RAM.
    """

    def __init__(
        self,
        core: Core,
        device: Device,
        store: ColdStore | None,
        model_id: str,
        limits: Mapping[Route, float],
        attended_limit: float | None,
        started_s: float,
    ) -> None:
        self.prompt_tokens = 0
        self.attached_tokens = 0
        self.computed_again_tokens = 0
        self._steps = 0
        self._last_step: StepRecord | None = None
        self._reads = dict.fromkeys(Tier, 0)
        self._core = core
        self._device = device
        self._store = store
        self._model_id = model_id
        self._limits = limits
        self._attended_limit = attended_limit
        self._started_s = started_s

    def note_step(self, reads: dict[Tier, int], record: StepRecord | None) -> None:
        """A step was left that found so many old pages in each tier; `record` is None where it was undone."""
        self._steps += 1
        self._last_step = record or self._last_step
        for tier, count in reads.items():
            self._reads[tier] += count

    def stats(self, sequences: Iterable[Sequence]) -> Stats:
        """A frozen picture of now; `sequences` are the open ones."""
        core, store = self._core, self._store
        info = self._device.memory_info()
        return Stats(
            pid=os.getpid(),
            model_id=self._model_id,
            device=self._device.name,
            device_kind=self._device.kind.value,
            started_s=self._started_s,
            updated_s=time.time(),
            page_tokens=core.layout.page_tokens,
            tiers=tuple(self._tier_stats(tier) for tier in Tier),
            flows=tuple(
                FlowStats(
                    src.name, dst.name, flow.num_bytes, flow.num_transfers, flow.in_flight,
                    flow.gb_per_s, flow.streamed_bytes, self._limits.get((src, dst)),
                )
                for (src, dst), flow in sorted(core.mover.meter.flows().items())
            ),
            sequences=tuple(
                SequenceStats(s.label, s.num_tokens, len(s.pages)) for s in sequences
            ),
            breakers=() if store is None else (_breaker_stats(store),),
            steps=self._steps,
            in_flight=len(core.in_flight),
            published_pages=len(core.prefixes),
            prompt_tokens=self.prompt_tokens,
            attached_tokens=self.attached_tokens,
            failed_transfers=core.in_flight.num_failed,
            corrupt_pages=sum(core.mover.quarantine.num_corrupt.values()),
            staging_device_bytes=core.ring.device_bytes + self._device.staging_bytes,
            staging_host_bytes=core.ring.host_bytes
            + core.mover.staging_bytes
            + core.mover.sums.num_bytes
            + (store.staging_bytes if store else 0),
            device_used_bytes=info.total_bytes - info.free_bytes,
            device_total_bytes=info.total_bytes,
            rss_bytes=psutil.Process().memory_info().rss,
            ssd_path=str(store.path) if store else None,
            ssd_disk_bytes=store.disk_bytes if store else 0,
            ssd_io=store.io_kind if store else None,
            attended_bytes=core.mover.meter.attended_bytes,
            attended_s=core.mover.meter.attended_s,
            attended_limit_gb_per_s=self._attended_limit,
            last_step=self._last_step,
            disk=store.guard.stats() if store else None,
            computed_again_tokens=self.computed_again_tokens,
        )  # fmt: skip

    def _tier_stats(self, tier: Tier) -> TierStats:
        core = self._core
        counts = core.table.counts(tier)
        return TierStats(
            tier=tier.name,
            slots=counts.slots,
            page_bytes=core.layout.page_bytes,
            free=counts.free,
            filling=counts.filling,
            clean=counts.droppable,
            duplicate=counts.redundant,
            dirty=counts.dirty,
            pinned=counts.pinned,
            open=counts.open,
            reads=self._reads[tier],
            evictions=core.room.evictions[tier],
            demotions=core.room.demotions[tier],
            corrupt=core.mover.quarantine.num_corrupt[tier],
        )


def _breaker_stats(store: ColdStore) -> BreakerStats:
    report = store.breaker.report()
    return BreakerStats(
        Tier.SSD.name, report.state.value, report.reason, report.num_trips, store.num_late,
        report.retry_in_s,
    )  # fmt: skip
