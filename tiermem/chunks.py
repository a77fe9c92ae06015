"""Chunks and tables: a step's pages as the attention backend sees them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tiermem.attention.pool_view import PagedTables
from tiermem.core import Core
from tiermem.plan import NO_PAGE, Plan, Share
from tiermem.pools import Ids, Slots, Tier
from tiermem.streaming import NUM_HALVES

NOT_STORED = -1
"""Where a token has no place in the pool at hand."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Pages of one sequence that a step reads through one half of the ring.

    `ids` and `tiers` are what is loaded, to the first slots of the half; for a chunk of written pages only
    those that continue older bytes are, into `loaded_slots`. `token_slots` is None for old pages.
    """

    share: Share
    half: int
    ids: Ids
    tiers: Slots
    num_pages: int
    tables: PagedTables
    written: Ids
    home: Tier
    token_slots: torch.Tensor | None

    @property
    def rows(self) -> slice:
        """Rows of q, k and v of this chunk's sequence."""
        return slice(self.share.first_row, self.share.first_row + self.share.new_tokens)


def hot_tables(core: Core, plan: Plan) -> PagedTables:
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
    put = partial(upload, core)
    return _tables(put, plan.shares, slots, None if all_hot else starts, counts)


def hot_token_slots(core: Core, plan: Plan) -> torch.Tensor:
    """Where each new token goes in the hot pool: slot x page_tokens + offset, or NOT_STORED; (num_rows,) int64."""
    parts = []
    for share in plan.shares:
        slots = np.full(len(share.pages), NOT_STORED, dtype=np.int64)
        hot = share.homes == Tier.GPU
        slots[hot] = core.table.slots(share.pages[hot], Tier.GPU)
        parts.append(_token_slots(core, share, slots))
    return upload(core, np.concatenate(parts))


def ram_places(core: Core, plan: Plan) -> list[Slots]:
    """For each sequence, the indices of its pages that are attended in RAM."""
    none = np.empty(0, dtype=np.int64)
    return [
        none
        if core.ram is None
        else core.ram.policy.choose(share.homes[: share.first_written], share.new_tokens)
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


def make_chunks(core: Core, plan: Plan, in_ram: SequenceOf[Slots]) -> list[Chunk]:
    """Every page of the step that is neither hot nor attended in RAM, in chunks that alternate between the
    halves of the ring."""
    chunks: list[Chunk] = []
    for share, attended in zip(plan.shares, in_ram, strict=True):
        cold = np.flatnonzero(share.homes != Tier.GPU)
        old = np.setdiff1d(cold[cold < share.first_written], attended, assume_unique=True)
        written = cold[cold >= share.first_written]
        groups = _groups(core, old)
        for tier in (Tier.RAM, Tier.SSD):
            groups += _groups(core, written[share.homes[written] == tier])
        for places in groups:
            chunks.append(_make_chunk(core, share, places, len(chunks) % NUM_HALVES))
    return chunks


def upload(core: Core, array: np.ndarray) -> torch.Tensor:
    """A small table on the device; the copy runs on the compute stream."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if core.device.torch_device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(core.device.torch_device, non_blocking=True)


def _groups(core: Core, places: Slots) -> list[Slots]:
    size = core.ring.chunk_pages
    return [places[i : i + size] for i in range(0, len(places), size)]


def _make_chunk(core: Core, share: Share, places: Slots, half: int) -> Chunk:
    ring_slots = core.ring.slots_of(half, len(places))
    starts = places * core.layout.page_tokens
    put = partial(upload, core)
    tables = _tables(put, [share], [ring_slots], [starts], [len(places)], first_row=share.first_row)
    if places[0] < share.first_written:
        return Chunk(
            share, half, share.pages[places], share.homes[places], len(places), tables,
            share.pages[:0], Tier.GPU, None,
        )  # fmt: skip
    slots = np.full(len(share.pages), NOT_STORED, dtype=np.int64)
    slots[places] = ring_slots
    token_slots = upload(core, _token_slots(core, share, slots))
    bases = share.bases[places - share.first_written]
    bases = bases[bases != NO_PAGE]  # at most one, and then of the first page
    return Chunk(
        share, half, bases, core.best_tiers(bases), len(places), tables,
        share.pages[places], Tier(int(share.homes[places[0]])), token_slots,
    )  # fmt: skip


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
