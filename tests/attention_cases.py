"""Random pools, tables and queries for the attention tests, and the float64 result to compare with.

Everything that no query row may see is poison: stored NaN, and block-table entries of slots that do not
exist. A kernel that reads it gives NaN or faults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tiermem.attention import TORCH_DTYPES, PagedTables, PoolView, SlotHolds, WorkList
from tiermem.attention.backend import AttentionBackend
from tiermem.attention.page_lse import PageLse
from tiermem.attention.reference import ReferenceBackend
from tiermem.attention.work_list import NO_SEQUENCE, PlannedWork
from tiermem.layout import PageLayout

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": 1e-5}
"""Relative error (norm of the difference over the norm) that each dtype may have."""
WILD_SLOT = 2**31 - 1
LAYER = 1


@dataclass(frozen=True)
class Shape:
    """What a case is made of; `rows` and `stored` have one number a sequence."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    page_tokens: int = 16
    dtype: str = "float32"
    rows: tuple[int, ...] = (1,)
    """Query rows, the last tokens of each sequence."""
    stored: tuple[int, ...] = (40,)
    """Tokens that are there in all, the query rows' own included."""
    window: int | None = None
    scattered: bool = False
    """Pages in any order, some missing, each with a start of its own."""
    holds: SlotHolds = SlotHolds.WHOLE_PAGE
    gain: float = 1.0
    """What q and k are multiplied by."""
    scale: float | None = None
    """None: 1 / sqrt(head_dim)."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call to `attend`, on the CPU."""

    pool: PoolView
    q: torch.Tensor
    tables: PagedTables
    scale: float
    window: int | None
    seed: int

    def run(
        self,
        backend: AttentionBackend,
        out_dtype: torch.dtype = torch.float32,
        page_lse: PageLse | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return backend.attend(
            self.pool,
            LAYER,
            self.q,
            self.tables,
            scale=self.scale,
            window=self.window,
            out_dtype=out_dtype,
            page_lse=page_lse,
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse in float64 on the CPU, by definition."""
        return self.to("cpu").run(ReferenceBackend(), torch.float64)

    def expected_quickly(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `expected`, a sequence at a time, on the case's device: for large cases."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        lse = torch.full(self.q.shape[:2], -math.inf, dtype=torch.float64, device=self.q.device)
        row_starts = self.tables.row_starts.tolist()
        for sequence in range(self.tables.num_sequences):
            rows = slice(row_starts[sequence], row_starts[sequence + 1])
            if rows.start < rows.stop:
                out[rows], lse[rows] = self._attend_densely(sequence, self.q[rows].double())
        return out, lse

    def expected_mass(self, num_pages: int) -> torch.Tensor:
        """(num_rows, q_heads, num_pages) in float64, on the case's device: of each page by its number."""
        shape = (*self.q.shape[:2], num_pages)
        mass = torch.zeros(shape, dtype=torch.float64, device=self.q.device)
        row_starts = self.tables.row_starts.tolist()
        for sequence in range(self.tables.num_sequences):
            rows = slice(row_starts[sequence], row_starts[sequence + 1])
            tokens, weights, _, _ = self._weigh_densely(sequence, self.q[rows].double())
            pages = (tokens // self.pool.layout.page_tokens).long()
            mass[rows].index_add_(2, pages, weights.flatten(1, 2))
        return mass

    def _attend_densely(self, sequence: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, weights, v, lse = self._weigh_densely(sequence, q)
        return torch.einsum("rhgn,hnd->rhgd", weights, v).flatten(1, 2), lse.flatten(1, 2)

    def _weigh_densely(self, sequence: int, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens' positions (n,), their weights (rows, kv_heads, group, n), V and the lse."""
        layout, tables = self.pool.layout, self.tables
        count = int(tables.num_pages[sequence])
        slots = tables.block_table[sequence, :count].long()
        starts = torch.arange(count, device=q.device) * layout.page_tokens
        if tables.page_starts is not None:
            starts = tables.page_starts[sequence, :count].long()
        offsets = torch.arange(layout.page_tokens, device=q.device)
        tokens = (starts[:, None] + offsets).flatten()
        rows = torch.arange(q.shape[0], device=q.device)[:, None] + tables.q_start[sequence]
        seen = (tokens < tables.kv_end[sequence]) & (tokens <= rows)
        if self.window is not None:
            seen &= tokens > rows - self.window
        slots = slots.where(slots < self.pool.num_slots, 0)
        pages = self.pool.layer_pages(LAYER)[slots].double()
        k, v = (part.transpose(0, 1).flatten(1, 2) for part in pages.unbind(1))
        unseen = ~seen.any(0)[:, None]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        grouped = q.unflatten(1, (layout.num_kv_heads, -1))
        scores = torch.einsum("rhgd,hnd->rhgn", grouped, k) * self.scale
        scores.masked_fill_(~seen[:, None, None], -math.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
        return tokens, weights, v, lse

    def to(self, device: str) -> Case:
        """The same case on another device."""
        tables = self.tables
        moved = {
            name: getattr(tables, name).to(device)
            for name in ("block_table", "num_pages", "kv_end", "row_starts", "q_start")
        }
        if tables.work is not None:
            moved["work"] = replace(tables.work, rows=tables.work.rows.to(device))
        starts = None if tables.page_starts is None else tables.page_starts.to(device)
        return replace(
            self,
            pool=replace(self.pool, data=self.pool.data.to(device)),
            q=self.q.to(device),
            tables=replace(tables, page_starts=starts, **moved),
        )


def make_case(shape: Shape, seed: int) -> Case:
    """A case of that shape whose numbers depend on the seed."""
    rng = torch.Generator().manual_seed(seed)
    layout = PageLayout(3, shape.kv_heads, shape.head_dim, shape.dtype, shape.page_tokens)
    pages = [layout.pages_for(stored) for stored in shape.stored]
    num_slots = sum(pages) + 3
    pool = _poisoned_pool(layout, num_slots, shape.holds)
    tables = _tables(shape, pages, num_slots, rng)
    _fill(pool, tables, shape, rng)
    q_shape = (tables.num_rows, shape.kv_heads * shape.group, shape.head_dim)
    q = (torch.randn(q_shape, generator=rng) * shape.gain).to(pool.data.dtype)
    scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
    return Case(pool, q, tables, scale, shape.window, seed)


def split_pages(case: Case, parts: int) -> list[Case]:
    """The same queries over disjoint sets of the pages, every `parts`-th page each."""
    tables = case.tables
    page_tokens = case.pool.layout.page_tokens
    starts = tables.page_starts
    if starts is None:
        entries = torch.arange(tables.block_table.shape[1], device=case.q.device)
        starts = (entries.int() * page_tokens).expand(tables.block_table.shape)
    cases = []
    for part in range(parts):
        table = tables.block_table[:, part::parts].contiguous()
        num_pages = ((tables.num_pages - part + parts - 1) // parts).clamp(min=0).int()
        some = replace(
            tables,
            block_table=table,
            page_starts=starts[:, part::parts].contiguous(),
            num_pages=num_pages,
            max_pages=max(1, int(num_pages.max())) if table.shape[1] else 0,
        )
        cases.append(replace(case, tables=some))
    return cases


def with_work(case: Case, backend: AttentionBackend, padding: int = 0) -> Case:
    """The same case with the backend's plan, followed by `padding` unused rows and partial results."""
    planned = backend.plan(case.pool.layout, case.tables.kv_end.cpu().long().numpy())
    assert planned is not None
    work = on_device(planned, case.q.device, padding)
    return replace(case, tables=replace(case.tables, work=work))


def on_device(planned: PlannedWork, device: torch.device, padding: int = 0) -> WorkList:
    """What a step makes of a plan."""
    rows = torch.from_numpy(planned.rows.copy())
    unused = torch.zeros((padding, rows.shape[1]), dtype=torch.int32)
    unused[:, 0] = NO_SEQUENCE
    rows = torch.cat([rows, unused]).to(device)
    return WorkList(rows, planned.max_splits, planned.num_partials + padding)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN and inf count as inf."""
    difference = (actual.double().cpu() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def check(
    case: Case,
    result: tuple[torch.Tensor, torch.Tensor],
    tolerance: float | None = None,
    expected: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Compare output and lse with what is expected, the reference's result by default."""
    out, lse = case.expected() if expected is None else expected
    allowed = TOLERANCE[case.pool.layout.dtype] if tolerance is None else tolerance
    error = relative_error(result[0], out.cpu())
    assert error <= allowed, f"relative error {error:.2e}, seed {case.seed}"
    check_lse(result[1], lse.cpu())


def check_lse(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """-inf exactly where nothing is seen, close elsewhere."""
    actual = actual.double().cpu()
    unseen = expected == -math.inf
    assert torch.equal(actual == -math.inf, unseen)
    assert actual.dtype == torch.float64 and not actual.isnan().any()
    seen = ~unseen
    bound = 1e-4 + 2e-6 * expected[seen].abs()
    assert ((actual[seen] - expected[seen]).abs() <= bound).all()


def check_mass(
    case: Case,
    backend: AttentionBackend,
    parts: int = 1,
    tolerance: float = 1e-5,
    expected: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend `parts` disjoint sets of the pages and compare the mass of all pages; what the merged result is."""
    num_rows, num_heads = case.q.shape[:2]
    num_pages = case.pool.layout.pages_for(max(case.tables.kv_end.tolist())) + 3
    page_lse = backend.new_page_lse(case.pool, num_rows, num_heads, num_pages)
    wide = page_lse.values.dtype
    pieces = [case] if parts == 1 else split_pages(case, parts)
    results = [piece.run(backend, wide, page_lse) for piece in pieces]
    out, lse = backend.merge([out for out, _ in results], [lse for _, lse in results], wide)
    mass = backend.page_mass(page_lse, lse)
    if expected is None:
        expected = case.expected_mass(num_pages)
    assert mass.shape == (num_rows, num_heads, num_pages) and mass.dtype == wide
    assert mass.is_contiguous()
    error = float((mass.double() - expected).abs().max()) if mass.numel() else 0.0
    assert error <= tolerance, f"error {error:.2e}, seed {case.seed}"
    total = mass.double().sum(2)
    assert ((total - (lse > -math.inf).double()).abs() <= 1e-4).all(), f"seed {case.seed}"
    assert not (mass[expected == 0] != 0).any(), f"seed {case.seed}"
    return out, lse


def _poisoned_pool(layout: PageLayout, num_slots: int, holds: SlotHolds) -> PoolView:
    slot_items = layout.slot_bytes // layout.item_bytes
    if holds is SlotHolds.ONE_LAYER:
        slot_items = layout.layer_items
    data = torch.full((num_slots * slot_items,), math.nan, dtype=TORCH_DTYPES[layout.dtype])
    return PoolView(data, layout, slot_items, num_slots, holds)


def _tables(shape: Shape, pages: list[int], num_slots: int, rng: torch.Generator) -> PagedTables:
    batch = len(pages)
    width = max(1, *pages) + 2
    block_table = torch.full((batch, width), WILD_SLOT, dtype=torch.int32)
    starts = torch.full((batch, width), -WILD_SLOT, dtype=torch.int32)
    counts = []
    slots = torch.randperm(num_slots, generator=rng).int()
    for sequence, count in enumerate(pages):
        mine, slots = slots[:count], slots[count:]
        order = torch.arange(count)
        if shape.scattered:
            kept = max(1, count - count // 3) if count else 0
            order = torch.randperm(count, generator=rng)[:kept]
        counts.append(order.numel())
        block_table[sequence, : order.numel()] = mine[order]
        starts[sequence, : order.numel()] = order.int() * shape.page_tokens
        if shape.window is not None and not shape.scattered:
            unseen = shape.stored[sequence] - shape.rows[sequence] - shape.window + 1
            block_table[sequence, : max(0, unseen // shape.page_tokens)] = WILD_SLOT
    row_starts = torch.tensor([0, *shape.rows]).cumsum(0).int()
    stored = torch.tensor(shape.stored, dtype=torch.int32)
    return PagedTables(
        block_table,
        starts if shape.scattered else None,
        torch.tensor(counts, dtype=torch.int32),
        stored,
        row_starts,
        stored - torch.tensor(shape.rows, dtype=torch.int32),
        max(shape.rows),
        max(counts),
        sum(shape.rows),
    )


def _fill(pool: PoolView, tables: PagedTables, shape: Shape, rng: torch.Generator) -> None:
    """Write random K and V for every token that is there."""
    pages = pool.layer_pages(LAYER)
    layout = pool.layout
    for sequence in range(tables.num_sequences):
        for entry in range(int(tables.num_pages[sequence])):
            slot = int(tables.block_table[sequence, entry])
            start = entry * layout.page_tokens
            if tables.page_starts is not None:
                start = int(tables.page_starts[sequence, entry])
            there = min(layout.page_tokens, int(tables.kv_end[sequence]) - start)
            if slot == WILD_SLOT or there < 1:
                continue
            kv = torch.randn((2, layout.num_kv_heads, there, layout.head_dim), generator=rng)
            kv[0] *= shape.gain
            pages[slot, :, :, :there] = kv.to(pool.data.dtype)
