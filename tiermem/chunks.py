"""Chunks and tables: a step's pages as the attention backend sees them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from tiermem.attention.pool_view import PagedTables
from tiermem.core import Core
from tiermem.plan import NO_PAGE, Plan, Share
from tiermem.pools import Ids, Slots, Tier
from tiermem.ram_attention import StepBytes
from tiermem.streaming import NUM_HALVES, SliceLoad
from tiermem.upload import Upload

NOT_STORED = -1
"""Where a token has no place in the pool at hand."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Pages of one sequence that a step reads through one half of the ring.

    `load` brings old bytes to the first slots of the half: all pages, or of a chunk of written ones the page that
    continues older bytes; None where there is none. `token_slots` is None for old pages.
    """

    share: Share
    half: int
    load: SliceLoad | None
    num_pages: int
    tables: PagedTables
    written: Ids
    home: Tier
    token_slots: torch.Tensor | None

    @property
    def rows(self) -> slice:
        """Rows of q, k and v of this chunk's sequence."""
        return slice(self.share.first_row, self.share.first_row + self.share.new_tokens)


def hot_tables(core: Core, plan: Plan, upload: Upload) -> PagedTables:
    """Tables of the hot pages of every sequence, old and written."""
    slots, starts, counts = [], [], []
    page_tokens = core.layout.page_tokens
    all_hot = True
    for share in plan.shares:
        hot = np.flatnonzero(share.homes == Tier.GPU)
        slots.append(core.table.slots(share.pages[hot], Tier.GPU))
        starts.append(hot * page_tokens)
        counts.append(len(hot))
        all_hot = all_hot and len(hot) == len(share.pages)
    return _tables(upload.put, plan.shares, slots, None if all_hot else starts, counts)


def hot_token_slots(core: Core, plan: Plan, upload: Upload) -> torch.Tensor:
    """Where each new token goes in the hot pool: slot x page_tokens + offset, or NOT_STORED; (num_rows,) int64."""
    parts = []
    for share in plan.shares:
        slots = np.full(len(share.pages), NOT_STORED, dtype=np.int64)
        hot = share.homes == Tier.GPU
        slots[hot] = core.table.slots(share.pages[hot], Tier.GPU)
        parts.append(_token_slots(core, share, slots))
    return upload.put(np.concatenate(parts))


def step_bytes(core: Core, plan: Plan) -> StepBytes:
    """What the step needs of lower tiers."""
    homes = np.concatenate([share.homes[: share.first_written] for share in plan.shares])
    size = core.layout.page_bytes
    ram, cold = (int((homes == tier).sum()) * size for tier in (Tier.RAM, Tier.SSD))
    return StepBytes(ram, cold, max(share.new_tokens for share in plan.shares))


def ram_places(core: Core, plan: Plan, wanted: StepBytes) -> list[Slots]:
    """For each sequence, the indices of its pages that are attended in RAM."""
    if core.ram is None:
        return [np.empty(0, dtype=np.int64) for _ in plan.shares]
    policy = core.ram.policy
    fraction = policy.fraction(wanted)
    return [
        policy.choose(share.homes[: share.first_written], share.new_tokens, fraction)
        for share in plan.shares
    ]


def ram_tables(core: Core, plan: Plan, in_ram: SequenceOf[Slots]) -> PagedTables | None:
    """Tables, on the host, of the pages that are attended in RAM; None where there are none."""
    if not any(len(places) for places in in_ram):
        return None
    shares, page_tokens = plan.shares, core.layout.page_tokens
    slots = [
        core.table.slots(share.pages[places], Tier.RAM)
        for share, places in zip(shares, in_ram, strict=True)
    ]
    starts = [places * page_tokens for places in in_ram]
    return _tables(torch.from_numpy, shares, slots, starts, [len(places) for places in in_ram])


def make_chunks(core: Core, plan: Plan, in_ram: SequenceOf[Slots], upload: Upload) -> list[Chunk]:
    """Every page of the step that is neither hot nor attended in RAM, in chunks that alternate between the
    halves of the ring."""
    chunks: list[Chunk] = []
    for share, attended in zip(plan.shares, in_ram, strict=True):
        cold = np.flatnonzero(share.homes != Tier.GPU)
        old = np.setdiff1d(cold[cold < share.first_written], attended, assume_unique=True)
        written = cold[cold >= share.first_written]
        groups = _even_groups(core, old)
        for tier in (Tier.RAM, Tier.SSD):
            groups += _groups(core, written[share.homes[written] == tier])
        for places in groups:
            chunks.append(_make_chunk(core, upload, share, places, len(chunks) % NUM_HALVES))
    return chunks


def _even_groups(core: Core, places: Slots) -> list[Slots]:
    """Of about one size, and as many for one half of the ring as for the other, layer after layer."""
    rounds = -(-len(places) // (NUM_HALVES * core.ring.chunk_pages))
    groups = np.array_split(places, NUM_HALVES * rounds) if rounds else []
    return [group for group in groups if len(group)]


def _groups(core: Core, places: Slots) -> list[Slots]:
    size = core.ring.chunk_pages
    return [places[i : i + size] for i in range(0, len(places), size)]


def _make_chunk(core: Core, upload: Upload, share: Share, places: Slots, half: int) -> Chunk:
    ring_slots = core.ring.slots_of(half, len(places))
    starts = places * core.layout.page_tokens
    tables = _tables(
        upload.put, [share], [ring_slots], [starts], [len(places)], first_row=share.first_row
    )
    if places[0] < share.first_written:
        load = core.ring.plan(half, share.pages[places], share.homes[places])
        return Chunk(
            share, half, load, len(places), tables, share.pages[:0], Tier.GPU, token_slots=None
        )
    slots = np.full(len(share.pages), NOT_STORED, dtype=np.int64)
    slots[places] = ring_slots
    token_slots = upload.put(_token_slots(core, share, slots))
    bases = share.bases[places - share.first_written]
    bases = bases[bases != NO_PAGE]  # at most one, and then of the first page
    older = core.ring.plan(half, bases, core.best_tiers(bases)) if len(bases) else None
    home = Tier(int(share.homes[places[0]]))
    return Chunk(share, half, older, len(places), tables, share.pages[places], home, token_slots)


def _token_slots(core: Core, share: Share, slots: Slots) -> Slots:
    positions = np.arange(share.past_tokens, share.past_tokens + share.new_tokens)
    page_slots = slots[positions // core.layout.page_tokens]
    places = page_slots * core.layout.page_tokens + positions % core.layout.page_tokens
    return np.where(page_slots == NOT_STORED, NOT_STORED, places).astype(np.int64)


def _tables(
    put: Callable[[np.ndarray], torch.Tensor],
    shares: list[Share],
    slots: list[Slots],
    starts: list[Slots] | None,
    counts: list[int],
    first_row: int = 0,
) -> PagedTables:
    max_pages = max(counts)
    block = np.zeros((len(shares), max(max_pages, 1)), dtype=np.int32)
    begin = np.zeros_like(block)
    for i, count in enumerate(counts):
        block[i, :count] = slots[i]
        if starts is not None:
            begin[i, :count] = starts[i]
    rows = [share.first_row - first_row for share in shares]
    end = rows[-1] + shares[-1].new_tokens
    past = [share.past_tokens for share in shares]
    ends = [share.past_tokens + share.new_tokens for share in shares]
    # one upload for the vectors, one or two for the tables
    vectors = put(np.array([*counts, *ends, *past, *rows, end], dtype=np.int32))
    n = len(shares)
    return PagedTables(
        block_table=put(block),
        page_starts=None if starts is None else put(begin),
        num_pages=vectors[:n],
        kv_end=vectors[n : 2 * n],
        q_start=vectors[2 * n : 3 * n],
        row_starts=vectors[3 * n :],
        max_rows=max(share.new_tokens for share in shares),
        max_pages=max_pages,
        num_rows=end,
    )
