"""Manager text: one manager's stats as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tiermem.cli.human import (
    NOTHING,
    count_text,
    duration_text,
    rate_text,
    share_text,
    size_text,
)
from tiermem.cli.snapshot import Snapshot
from tiermem.cli.table import Table, clip, pairs, printable
from tiermem.disk_budget import DiskStats
from tiermem.stats import BreakerStats, FlowStats, Stats, TierStats
from tiermem.step_record import StepRecord

MOST_SEQUENCES = 8
"""More open sequences than this are counted, not listed."""

INDENT = "  "


class Rates:
    """Bytes a second of each direction between the last two snapshots of one manager."""

    def __init__(self) -> None:
        self._updated_s = 0.0
        self._bytes: dict[tuple[str, str], int] = {}
        self._gb_per_s: dict[tuple[str, str], float] = {}

    def update(self, snapshot: Snapshot) -> None:
        """Look at a snapshot; one that was seen already changes nothing."""
        stats = snapshot.stats
        if stats is None or stats.updated_s <= self._updated_s:
            return
        moved = {(flow.src, flow.dst): all_bytes(flow) for flow in stats.flows}
        if self._updated_s:
            seconds = stats.updated_s - self._updated_s
            self._gb_per_s = {
                way: (num_bytes - self._bytes.get(way, 0)) / seconds / 1e9
                for way, num_bytes in moved.items()
            }
        self._updated_s, self._bytes = stats.updated_s, moved

    def gb_per_s(self, flow: FlowStats) -> float:
        """10^9 bytes a second that `flow` moved lately."""
        return self._gb_per_s.get((flow.src, flow.dst), 0.0)


def manager_lines(snapshot: Snapshot, width: int | None, rates: Rates | None) -> list[str]:
    """A manager as lines of text of at most `width` columns; `rates` adds what moves now."""
    stats = snapshot.stats
    if stats is None:
        return [f"process {snapshot.pid}: its figures come from another version of tiermem"]
    title = (
        f"process {stats.pid} on {stats.device}, up {duration_text(stats.updated_s - stats.started_s)}, "
        f"figures {duration_text(snapshot.age_s)} old"
    )
    inner = None if width is None else width - len(INDENT)
    tiers = tier_table(stats.tiers, stats.hit_rates)
    parts = [
        fitting(tiers, inner).lines(inner),
        flow_table(stats.flows, rates).lines(inner),
        facts(stats).lines(inner),
        sequence_lines(stats, inner),
    ]
    lines = [printable(title) if width is None else clip(printable(title), width)]
    for i, part in enumerate(part for part in parts if part):
        lines += [""] * (i > 0) + [INDENT + line for line in part]
    return lines


def fitting(table: Table, width: int | None) -> Table:
    """`table`, turned where it is too wide."""
    return table if width is None or table.width <= width else table.turned()


def tier_table(tiers: Sequence[TierStats], hit_rates: dict[str, float]) -> Table:
    """Tiers, hottest first; counts are pages."""
    titles = (
        "tier", "capacity", "pages", "used", "filling", "clean", "duplicate", "dirty", "pinned",
        "open", "hits", "evicted", "demoted",
    )  # fmt: skip
    return Table(titles, tuple(_tier_row(tier, hit_rates.get(tier.tier)) for tier in tiers))


def flow_table(flows: Sequence[FlowStats], rates: Rates | None = None) -> Table:
    """Bytes moved between tiers by direction; empty where nothing moved yet."""
    titles: tuple[str, ...] = (
        "moved", "pages", "transfers", "in flight", "rate while busy", "of limit", "streamed",
    )  # fmt: skip
    rows = [
        (
            f"{flow.src} to {flow.dst}",
            size_text(flow.num_bytes),
            count_text(flow.transfers),
            count_text(flow.in_flight),
            rate_text(flow.gb_per_s),
            share_text(flow.share_of_limit),
            size_text(flow.streamed_bytes),
            *([] if rates is None else [rate_text(rates.gb_per_s(flow))]),
        )
        for flow in flows
    ]
    titles = titles if rates is None else (*titles, "rate now")
    return Table(titles, tuple(rows)) if rows else Table((), ())


def all_bytes(flow: FlowStats) -> int:
    """What `flow` moved, as pages and as slices of pages."""
    return flow.num_bytes + flow.streamed_bytes


def facts(stats: Stats) -> Table:
    """What is neither of a tier nor of a direction."""
    tokens = sum(sequence.tokens for sequence in stats.sequences)
    rows = [
        ("sequences", f"{len(stats.sequences)} open, {count_text(tokens)} tokens"),
        ("steps", f"{count_text(stats.steps)} done, {stats.in_flight} pieces of work in flight"),
        ("prefixes", _prefix_text(stats)),
        ("device memory", _device_memory_text(stats)),
        ("host memory", _host_memory_text(stats)),
        ("SSD", _ssd_text(stats)),
        *([("SSD writes", disk_text(stats.disk))] if stats.disk is not None else []),
        ("model", stats.model_id or NOTHING),
    ]
    if stats.last_step is not None:
        rows.append(("last step", step_text(stats.last_step)))
    if stats.attended_bytes:
        rows.append(("attended in RAM", attended_text(stats)))
    rows += [
        (f"{breaker.tier} tier", breaker_text(breaker))
        for breaker in stats.breakers
        if breaker.trips
    ]
    if stats.failed_transfers or stats.corrupt_pages or stats.computed_again_tokens:
        rows.append(("trouble", trouble_text(stats)))
    return pairs(rows)


def trouble_text(stats: Stats) -> str:
    """Failed transfers, damaged pages, and what was done about those."""
    found = f"{stats.failed_transfers} failed transfers, {stats.corrupt_pages} damaged pages"
    if stats.computed_again_tokens:
        found += f", {count_text(stats.computed_again_tokens)} tokens computed again"
    return found


def breaker_text(breaker: BreakerStats) -> str:
    """Whether a tier that was switched off is on again, else why and for how long it is not."""
    times = f"switched off {count_text(breaker.trips)} time{'' if breaker.trips == 1 else 's'}"
    if breaker.retry_in_s is None:
        return f"on again; {times}, the last for {breaker.reason}"
    again = f"tried again in {duration_text(breaker.retry_in_s)}"
    if breaker.late:
        again = f"tried again when {count_text(breaker.late)} late operations have ended"
    return f"{breaker.state.upper()}: {breaker.reason}; {again}; {times}"


def sequence_lines(stats: Stats, width: int | None) -> list[str]:
    """The open sequences with the most tokens."""
    largest = sorted(stats.sequences, key=lambda sequence: -sequence.tokens)
    rows = [
        (sequence.label or NOTHING, count_text(sequence.tokens), count_text(sequence.pages))
        for sequence in largest[:MOST_SEQUENCES]
    ]
    if not rows:
        return []
    lines = Table(("sequence", "tokens", "pages"), tuple(rows)).lines(width)
    more = len(largest) - len(rows)
    return lines + [f"and {more} more"] * (more > 0)


def _tier_row(tier: TierStats, hit_rate: float | None) -> tuple[str, ...]:
    if tier.slots == 0:
        return (tier.tier, "off", *[NOTHING] * 11)
    counts = (
        tier.slots, tier.used, tier.filling, tier.clean, tier.duplicate, tier.dirty, tier.pinned,
        tier.open,
    )  # fmt: skip
    return (
        tier.tier,
        size_text(tier.slots * tier.page_bytes),
        *(count_text(count) for count in counts),
        share_text(hit_rate),
        count_text(tier.evictions),
        count_text(tier.demotions),
    )


def _prefix_text(stats: Stats) -> str:
    if not stats.prompt_tokens:
        return f"{count_text(stats.published_pages)} pages can be found again"
    return (
        f"{count_text(stats.published_pages)} pages can be found again; "
        f"{count_text(stats.attached_tokens)} of {count_text(stats.prompt_tokens)} tokens looked up "
        f"were attached ({share_text(stats.prefix_hit_rate)})"
    )


def attended_text(stats: Stats) -> str:
    """Bytes that the CPU attended where they lie in RAM, and how fast."""
    text = f"{size_text(stats.attended_bytes)} by the CPU, {rate_text(stats.attended_gb_per_s)}"
    share = stats.attended_share_of_limit
    return text if share is None else f"{text}, {share_text(share)} of RAM reads"


def step_text(step: StepRecord) -> str:
    """What a step read from where, and what limited it."""
    parts = {
        "on the GPU": step.resident_bytes,
        "from RAM": step.streamed_bytes,
        "from SSD": step.cold_bytes,
        "attended in RAM": step.attended_bytes,
    }
    read = [f"{size_text(count)} {where}" for where, count in parts.items() if count]
    tokens = f"{count_text(step.new_tokens)} new token{'' if step.new_tokens == 1 else 's'}"
    return f"{tokens}; K and V: {', '.join(read) or 'none'}; limited by the {step.limit}"


def _host_memory_text(stats: Stats) -> str:
    rss, staging = size_text(stats.rss_bytes), size_text(stats.staging_host_bytes)
    return f"{rss} resident (RSS), staging {staging}"


def _device_memory_text(stats: Stats) -> str:
    used, total = size_text(stats.device_used_bytes), size_text(stats.device_total_bytes)
    return (
        f"{used} of {total} in use by all, staging {size_text(stats.staging_device_bytes)}"
        if stats.device_kind != "cpu"
        else f"none: the GPU tier is host memory, {used} of {total} in use by all"
    )


def _ssd_text(stats: Stats) -> str:
    if stats.ssd_path is None:
        return "off"
    text = f"{size_text(stats.ssd_disk_bytes)} on disk at {stats.ssd_path}, through {stats.ssd_io}"
    return text if stats.disk is None else f"{text}; at most {size_text(stats.disk.cap_bytes)}"


def disk_text(disk: DiskStats) -> str:
    """What was written to the SSD, what may be, and why not more."""
    text = f"{size_text(disk.written_bytes)} written"
    if disk.budget_bytes is not None and disk.budget_left_bytes is not None:
        left = size_text(max(0, disk.budget_left_bytes))
        text += f", {left} of {size_text(disk.budget_bytes)} a day left"
    text += f"; {size_text(disk.free_bytes)} free on its disk"
    if disk.pause is not None:
        text += f"; writes only what it must: {disk.pause}"
    return text + (f"; {count_text(disk.skipped_pages)} pages spared" if disk.skipped_pages else "")
