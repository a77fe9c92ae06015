"""Resident tables: what the attention backend reads of a batch that is all hot, at addresses that stay.

Decode steps of the same sequences differ by a token: the tables are made once for a batch and updated in place, by
one small copy a step, so that a captured CUDA graph can be replayed while the sequences grow.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from tiermem.attention.pool_view import PagedTables
from tiermem.attention.work_list import NO_SEQUENCE, ROW_INTS, SEQUENCE, PlannedWork, WorkList
from tiermem.core import Core
from tiermem.lease import Lease
from tiermem.packed import Packed, copy_later, lasting_zeros
from tiermem.plan import Plan, Share
from tiermem.pools import Ids, Tier

LEAST_PAGES = 64
"""Block tables start with room for this many pages a sequence, and double when a sequence outgrows them."""
SPARE_CHUNKS = 1.25
"""Work lists have room for a quarter more chunks than plans for sequences as they are, and as long as the tables
allow: plans change as sequences grow, and programs without work cost little while they are few."""
REPLAN_STEPS = 32
"""Steps until the work list is planned anew; the last chunk of each sequence grows meanwhile."""
MOST_TABLES = 8
"""Tables that are kept, for batches of different sizes; the ones used longest ago go first."""


@dataclass(slots=True)
class Row:
    """What one row of the block table holds: `num_stable` pages under `lease`, and `tail` behind them."""

    lease: Lease | None
    num_stable: int
    tail: Ids


class ResidentTables:
    """Tables of `num_sequences` sequences with one new token each and at most `max_pages` pages each.

    There is room for each of `works`, of which there are none where the backend plans nothing. `paged` and
    `token_slots` keep their addresses; what they hold is written in the order of the compute stream.
    """

    def __init__(
        self,
        num_sequences: int,
        max_pages: int,
        works: SequenceOf[PlannedWork],
        device: torch.device,
    ) -> None:
        n = num_sequences
        self.num_sequences = n
        self.max_pages = max_pages
        self.max_chunks = max((int(SPARE_CHUNKS * len(work.rows)) + 1 for work in works), default=0)
        self.max_splits = max((work.max_splits for work in works), default=0)
        self.steps_since_plan = REPLAN_STEPS
        self._rows = [_unknown_row() for _ in range(n)]
        self._block = lasting_zeros((n, max_pages), device)
        self._packed = Packed([2 * n, n, n, n, n + 1, self.max_chunks * ROW_INTS], device)
        host, packed = self._packed.host, self._packed.device
        self._token_slots = host[0].view(np.int64)
        self._num_pages, self._kv_end, self._q_start = host[1:4]
        host[4][:] = np.arange(n + 1)
        self._work = host[5].reshape(-1, ROW_INTS)
        self.token_slots = packed[0].view(torch.int64)
        self.paged = PagedTables(
            block_table=self._block,
            page_starts=None,
            num_pages=packed[1],
            kv_end=packed[2],
            q_start=packed[3],
            row_starts=packed[4],
            max_rows=1,
            max_pages=max_pages,
            num_rows=n,
            work=None
            if not works
            else WorkList(packed[5].view(-1, ROW_INTS), self.max_splits, self.max_chunks),
        )

    def forget(self) -> None:
        """The rows are of other sequences now, or were of others meanwhile."""
        self._rows = [_unknown_row() for _ in range(self.num_sequences)]
        self.steps_since_plan = REPLAN_STEPS

    def set_work(self, work: PlannedWork) -> bool:
        """Take a work list over; False, and nothing changed, where there is no room for it."""
        count = len(work.rows)
        if count > self.max_chunks or work.max_splits > self.max_splits:
            return False
        self._work[:count] = work.rows
        self._work[count:] = 0
        self._work[count:, SEQUENCE] = NO_SEQUENCE
        self.steps_since_plan = 0
        return True

    def write(self, core: Core, plan: Plan) -> None:
        """Write everything but the work list for `plan`, and copy to the device what changed."""
        shares, page_tokens = plan.shares, core.layout.page_tokens
        past = np.array([share.past_tokens for share in shares], dtype=np.int64)
        first = np.array([share.written[0] for share in shares], dtype=np.int64)
        self._token_slots[:] = core.table.slots(first, Tier.GPU) * page_tokens + past % page_tokens
        self._num_pages[:] = past // page_tokens + 1
        self._kv_end[:] = past + 1
        self._q_start[:] = past
        for i, share in enumerate(shares):
            self._write_pages(core, i, share, core.leases.of(share.sequence))
        self._packed.upload()
        self.steps_since_plan += 1

    def _write_pages(self, core: Core, i: int, share: Share, lease: Lease | None) -> None:
        row = self._rows[i]
        stable = 0
        if lease is not None:
            if lease is row.lease:
                stable = min(row.num_stable, lease.low_mark)
            lease.low_mark = lease.num_pages
        tail = share.pages[stable:]
        if stable != row.num_stable or lease is not row.lease or not np.array_equal(tail, row.tail):
            slots = core.table.slots(tail, Tier.GPU).astype(np.int32)
            copy_later(self._block[i, stable : stable + len(tail)], slots)
        self._rows[i] = Row(lease, share.first_written, share.pages[share.first_written :])


class ResidentPool:
    """The resident tables of one manager, by batch size."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tables: dict[int, ResidentTables] = {}
        self._latest: ResidentTables | None = None
        self._batch: list[object] = []

    def tables_of(self, plan: Plan) -> ResidentTables:
        """Tables that hold `plan`, a resident one of one token a sequence."""
        shares = plan.shares
        tables = self._tables.pop(len(shares), None)
        most_pages = max(len(share.pages) for share in shares)
        if tables is not None and tables.max_pages < most_pages:
            tables = None
        batch: list[object] = [share.sequence for share in shares]
        if tables is not None and (tables is not self._latest or batch != self._batch):
            tables.forget()
        if tables is None or tables.steps_since_plan >= REPLAN_STEPS:
            tables = self._with_work(plan, tables, most_pages)
        tables.write(self._core, plan)
        self._tables[len(shares)] = self._latest = tables
        self._batch = batch
        if len(self._tables) > MOST_TABLES:
            del self._tables[next(iter(self._tables))]
        return tables

    def _with_work(
        self, plan: Plan, tables: ResidentTables | None, most_pages: int
    ) -> ResidentTables:
        """`tables` with a new work list, or new tables where it does not fit."""
        core, count = self._core, len(plan.shares)
        lengths = np.array([share.past_tokens + 1 for share in plan.shares], dtype=np.int64)
        work = core.backend.plan(core.layout, lengths)
        if tables is None or (work is not None and not tables.set_work(work)):
            max_pages = max(LEAST_PAGES, 1 << (most_pages - 1).bit_length())
            grown = np.full(count, max_pages * core.layout.page_tokens, dtype=np.int64)
            works = [w for w in (work, core.backend.plan(core.layout, grown)) if w is not None]
            tables = ResidentTables(count, max_pages, works, core.hot.data.device)
            if work is not None:
                tables.set_work(work)
        return tables


def _unknown_row() -> Row:
    return Row(None, 0, np.empty(0, dtype=np.int64))
