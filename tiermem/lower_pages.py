"""LowerPages: the pages of a step that are not hot: streamed, attended in RAM, or written through."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tiermem.attention.arguments import check_attend
from tiermem.attention.page_lse import PageLse
from tiermem.attention.partial_sums import PartialSums
from tiermem.attention.pool_view import PagedTables
from tiermem.chunks import make_chunks, ram_places, ram_tables, step_bytes
from tiermem.core import Core
from tiermem.lookahead import Lookahead
from tiermem.page_sums import Check
from tiermem.plan import Plan
from tiermem.pools import as_ids
from tiermem.ram_attention import RamWork
from tiermem.upload import Upload
from tiermem.write_through import WriteThrough


class LowerPages:
    """Of one step. What the device reads here is kept as long as this is.

    `wanted`: what the step needs of lower tiers. `upload` takes the chunks' tables.
    """

    def __init__(self, core: Core, plan: Plan, upload: Upload) -> None:
        self.wanted = step_bytes(core, plan)
        self._core = core
        self._in_ram = ram_places(core, plan, self.wanted)
        self._chunks = make_chunks(core, plan, self._in_ram, upload)
        self._lookahead = Lookahead(core.ring, self._chunks, core.layout.num_layers)
        self._through = WriteThrough(core)
        self._ram_tables: Any = None
        self._attended = as_ids([])
        self._kv: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all pages are hot: nothing is streamed, attended in RAM or written through."""
        return not self._chunks and self._ram_tables is None

    def begin(self) -> None:
        """Put the link to work."""
        self._lookahead.advance()

    def begin_ram(self, plan: Plan) -> None:
        """Make the tables of what is attended in RAM."""
        tables = ram_tables(self._core, plan, self._in_ram)
        if tables is not None and self._core.ram is not None:
            self._ram_tables = self._core.ram.tables(tables)
            pairs = zip(plan.shares, self._in_ram, strict=True)
            self._attended = np.concatenate([share.pages[places] for share, places in pairs])

    # ---- the layers --------------------------------------------------------------------------------

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store K and V of the new tokens in the pages that are written through, and save those."""
        self._kv = (k, v)
        for i, chunk in enumerate(self._chunks):
            if chunk.token_slots is not None:
                self._fill(layer, i)
                self._through.save(chunk, layer)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        hot: PagedTables,
        scale: float,
        window: int | None,
        page_lse: PageLse | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results over hot pages, over those in RAM and over each chunk, merged by log-sum-exp."""
        backend, ram = self._core.backend, self._core.ram
        begun = None
        if ram is not None and self._ram_tables is not None:
            check_attend(self._core.hot, q, hot, window)
            begun = ram.begin(layer, q, self._ram_tables, scale, window, page_lse)
        out, lse = backend.attend(
            self._core.hot, layer, q, hot,
            scale=scale, window=window, out_dtype=torch.float32, page_lse=page_lse,
        )  # fmt: skip
        sums = PartialSums(backend, out, lse)
        for i, chunk in enumerate(self._chunks):
            self._fill(layer, i)
            sums.add(chunk.rows, *backend.attend(
                self._core.ring.view, layer, q[chunk.rows], chunk.tables,
                scale=scale, window=window, out_dtype=torch.float32,
                page_lse=None if page_lse is None else page_lse.of_rows(chunk.rows),
            ))  # fmt: skip
            self._lookahead.end_use(i)
        if ram is not None and begun is not None:
            if damages := self._core.mover.sums.verify_attended(self._attended, layer):
                raise self._core.mover.quarantine.report(damages)
            sums.add(slice(0, len(q)), *ram.result(begun))
        return sums.result(q.dtype)

    def _fill(self, layer: int, i: int) -> None:
        """Bring slices to the half of chunk `i`: old bytes from their tiers, new ones from k and v."""
        self._lookahead.begin_use(layer, i)
        chunk, ring = self._chunks[i], self._core.ring
        if chunk.token_slots is None:
            self._lookahead.advance()
            return
        assert self._kv is not None
        ring.begin_write(chunk.half)
        k, v = self._kv
        self._core.backend.store(ring.view, layer, k[chunk.rows], v[chunk.rows], chunk.token_slots)

    # ---- the end -----------------------------------------------------------------------------------

    def settle_ram(self) -> RamWork:
        """What was handed to the CPU has ended, well or by an error."""
        ram = self._core.ram
        if ram is None or self._ram_tables is None:
            return RamWork(0, 0.0)
        self._ram_tables = None
        work = ram.settle()
        self._core.mover.meter.attend(work.num_bytes, work.seconds)
        return work

    def checks(self) -> list[Check]:
        """The comparisons of what was streamed."""
        return [chunk.load.check for chunk in self._chunks if chunk.load]

    def commit(self) -> None:
        """Wait until what was written through is there; those pages are VALID then.

        Raises
        ------
        TransferError: a copy or a write failed.
        """
        self._through.commit(self._chunks)

    def drop_new(self) -> None:
        """Let go of K and V of the new tokens."""
        self._kv = None
