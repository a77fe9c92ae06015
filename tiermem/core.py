"""Core: the parts of one manager, as its sequences and steps use them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tiermem import _core
from tiermem.attention.backend import AttentionBackend
from tiermem.attention.pool_view import PoolView
from tiermem.breaker import Use
from tiermem.device.protocol import Device, Event, Slices
from tiermem.device_work import release_when_over
from tiermem.errors import CorruptPageError
from tiermem.inflight import InFlight
from tiermem.layout import PageLayout
from tiermem.lease import Leases
from tiermem.mover import Mover
from tiermem.page_sums import Check, SumWork
from tiermem.pools import FILLING, NO_SLOT, VALID, Ids, SlotPool, Slots, Tier
from tiermem.prefix import Prefixes
from tiermem.ram_attention import RamAttention
from tiermem.room import Room
from tiermem.streaming import NUM_HALVES, Ring
from tiermem.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Core:
    """Everything below the manager. Single-threaded: the manager's thread owns it."""

    layout: PageLayout
    device: Device
    backend: AttentionBackend
    table: _core.PageTable
    in_flight: InFlight
    pools: dict[Tier, SlotPool]
    hot: PoolView
    prefixes: Prefixes
    leases: Leases
    mover: Mover
    room: Room
    ring: Ring
    ram: RamAttention | None
    """None without a RAM tier."""

    def best_tiers(self, ids: Ids) -> Slots:
        """For each page the hottest tier with a VALID copy.

        Raises
        ------
        CorruptPageError: a page has none: its bytes were found damaged, or could not be read.
        TransferError: the only copy of a page is in a tier that is switched off.
        """
        tiers = np.full(len(ids), NO_SLOT, dtype=np.int64)
        for tier in reversed(Tier):
            usable = self.table.states(ids, tier) == VALID
            if self.mover.quarantine.is_waiting:
                usable &= ~self.mover.quarantine.holds(ids, tier)
            tiers[usable] = tier
        if (tiers == NO_SLOT).any():
            lost = tuple(int(page) for page in ids[tiers == NO_SLOT])
            raise CorruptPageError(
                f"{len(lost)} of {len(ids)} pages have no intact copy in any tier; roll the sequence "
                f"back to before them, or open it again",
                pages=lost,
                lost=lost,
            )
        if (tiers == Tier.SSD).any():
            self.mover.check(Use.READ)
        return tiers

    def num_within_reach(self, ids: Ids) -> int:
        """How many pages from the first on have a VALID copy in a tier that is not switched off."""
        if self.mover.allows(Use.READ):
            return len(ids)
        states = [self.table.states(ids, tier) == VALID for tier in (Tier.GPU, Tier.RAM)]
        missing = np.flatnonzero(~np.logical_or.reduce(states))
        return int(missing[0]) if len(missing) else len(ids)

    def touch(self, ids: Ids) -> None:
        """Pages of one chain, in its order, are used now: parents stay hotter than their children."""
        self.table.touch(ids[::-1].copy())
        self.prefixes.note_use(ids)

    def seal(self, ids: Ids) -> Slices | None:
        """Seal pages; the compute stream sums those in the hot tier, where it has written them.

        What is returned must be kept, and the copies pinned, until the stream has come so far.

        Raises
        ------
        TransferError: the device refuses to sum them; they are not sealed.
        """
        if len(ids) == 0:
            return None
        slices = self.mover.sums.begin(ids[self.table.states(ids, Tier.GPU) == VALID])
        self.table.seal(ids)
        return slices

    def seal_between_steps(self, ids: Ids, written: Event | None) -> None:
        """Seal hot pages that no step is writing, behind the step that has written them last."""
        compute = self.device.compute_stream()
        if written is not None:
            compute.wait_event(written)
        slices = self.seal(ids)
        if slices is not None:
            self.in_flight.add(SumWork(self.table, ids, slices, compute.record()))

    def drop_damaged(self) -> None:
        """Let go of copies that were found damaged, wherever no step or transfer holds them."""
        if self.mover.quarantine.is_waiting:
            self.leases.end_all()
            self.mover.quarantine.drop_found()

    def settle_filling(self, ids: Ids, tier: Tier) -> None:
        """Wait until no copy of `ids` in `tier` is on its way; DeadlineError where one missed its deadline."""
        while len(ids) and (self.table.states(ids, tier) == FILLING).any():
            self.in_flight.wait_any()

    def promote(self, ids: Ids) -> list[Transfer]:
        """Start copying pages to the GPU, which has the room; the caller waits for the transfers' events.

        Pages that are on the SSD alone come first to RAM where that has room, else through staging; those
        reads are waited for.

        Raises
        ------
        CorruptPageError, TransferError: a read failed; no page is lost that was not lost before.
        """
        self.settle_filling(ids, Tier.RAM)  # reads that were started ahead
        tiers = self.best_tiers(ids)
        cold = ids[tiers == Tier.SSD]
        copies = self.mover.submit(ids[tiers == Tier.RAM], Tier.RAM, Tier.GPU)
        through_ram = cold[: self._take_spare_ram(len(cold))]
        reads = self.mover.submit(through_ram, Tier.SSD, Tier.RAM)
        reads += self.mover.submit(cold[len(through_ram) :], Tier.SSD, Tier.GPU)
        self.in_flight.wait_for(reads)
        for read in reads:
            if read.error is not None:
                raise read.error
        return copies + self.mover.submit(through_ram, Tier.RAM, Tier.GPU)

    def prefetch(self, ids: Ids) -> int:
        """Start bringing pages closer into slots that are free or clean; never waits. How many were started."""
        for tier in Tier:
            ids = ids[self.table.states(ids, tier) != FILLING]
        tiers = self.best_tiers(ids)
        if self.room.spare(Tier.GPU) < len(ids):
            self.leases.end_idle()
        started = 0
        for src, dst in ((Tier.RAM, Tier.GPU), (Tier.SSD, Tier.RAM)):
            chosen = ids[tiers == src][: self.room.spare(dst)]
            # hold the pages while older copies make way, so that none of them is the victim
            self.table.pin(chosen, src)
            try:
                missing = len(chosen) - self.table.counts(dst).free
                if missing > 0:
                    self.room.evict(dst, missing)
                ready = chosen[: self.table.counts(dst).free]
                self.mover.submit(ready, src, dst)
            finally:
                self.table.unpin(chosen, src)
            started += len(ready)
        return started

    def read_pages(self, ids: Ids, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer of whole pages, (tokens, kv_heads, head_dim) each; waits for the device."""
        self.settle_filling(ids, Tier.GPU)
        tiers = self.best_tiers(ids)
        pins = [(ids[tiers == tier], tier) for tier in Tier]
        for chosen, tier in pins:
            self.table.pin(chosen, tier)
        compute, checks = self.device.compute_stream(), list[Check]()
        try:
            # the last page may still be written by a step that the compute stream has not ended
            self.mover.to_device.wait_event(compute.record())
            chunks = [
                self._read_chunk(ids, tiers, layer, i, checks) for i in self._chunks(len(ids))
            ]
            compute.record().wait()
            if damages := [damage for check in checks for damage in check.damages()]:
                raise self.mover.quarantine.report(damages)
        finally:

            def release() -> None:
                checks.clear()  # what they compare is needed until now
                for chosen, tier in pins:
                    self.table.unpin(chosen, tier)
                self.drop_damaged()

            streams = [self.mover.to_device, compute]
            release_when_over(self.in_flight, "reading pages", streams, release)
        layout = self.layout
        empty = self.ring.view.data.new_empty(
            (0, 2, layout.num_kv_heads, layout.page_tokens, layout.head_dim)
        )
        pages = torch.cat([empty, *chunks]).permute(1, 0, 3, 2, 4)
        kv = pages.reshape(2, -1, layout.num_kv_heads, layout.head_dim)
        return kv[0], kv[1]

    def _chunks(self, num_pages: int) -> range:
        return range(0, num_pages, self.ring.chunk_pages)

    def _read_chunk(
        self, ids: Ids, tiers: Slots, layer: int, start: int, checks: list[Check]
    ) -> torch.Tensor:
        end = start + self.ring.chunk_pages
        half = start // self.ring.chunk_pages % NUM_HALVES
        checks.append(self.ring.load(half, layer, ids[start:end], tiers[start:end]))
        chunk = self.ring.read_tensor(half, len(ids[start:end])).clone()
        self.ring.end_use(half)
        return chunk

    def _take_spare_ram(self, count: int) -> int:
        missing = min(count, self.room.spare(Tier.RAM)) - self.table.counts(Tier.RAM).free
        if missing > 0:
            self.room.evict(Tier.RAM, missing)
        return min(count, int(self.table.counts(Tier.RAM).free))
