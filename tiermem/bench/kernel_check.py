"""KernelCheck: what the timed kernels computed, against plain torch in a wider type."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tiermem.attention.pool_view import PagedTables, PoolView
from tiermem.errors import InvariantError

TOLERANCE = 5e-3
"""Of the norm of one head's output: rounding to fp16 gives 3e-4, a page mixed up at least a few percent."""
CHUNK_BYTES = 1 << 30
"""K and V that are widened at a time."""
CHECKED_ROWS = 64
"""Of one sequence: the first and the last ones, so that the cost stays small."""


def check_attention(
    pool: PoolView,
    layer: int,
    q: torch.Tensor,
    tables: PagedTables,
    lengths: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Compare `out` for the rows of every sequence with attention in float32 (float64 on the CPU).

    Raises
    ------
    InvariantError: a head of a row differs by more than rounding explains.
    """
    starts = tables.row_starts.tolist()
    for i, length in enumerate(lengths):
        first, end = starts[i], starts[i + 1]
        rows = sorted({*range(first, end)[:CHECKED_ROWS], *range(first, end)[-CHECKED_ROWS:]})
        chosen = torch.tensor(rows, device=q.device)
        positions = int(tables.q_start[i]) + chosen - first
        slots = tables.block_table[i, : pool.layout.pages_for(length)].long()
        wanted = _attend(pool, layer, q[chosen], slots, positions, length)
        _compare(out[chosen], wanted, f"layer {layer}, sequence {i} of {length} tokens")


def check_stored(
    pool: PoolView, layer: int, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
) -> None:
    """Look whether every token's K and V are where they were to be stored.

    Raises
    ------
    InvariantError: they are not.
    """
    slots, offsets = places // pool.layout.page_tokens, places % pool.layout.page_tokens
    pages = pool.layer_pages(layer)
    for i, tensor in enumerate((k, v)):
        wrong = int((pages[slots, i, :, offsets] != tensor).any(-1).any(-1).sum())
        if wrong:
            raise InvariantError(f"store: {wrong} of {len(places)} tokens differ in layer {layer}")


def _attend(
    pool: PoolView,
    layer: int,
    q: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    length: int,
) -> torch.Tensor:
    """Attention of rows (n, q_heads, head_dim) at `positions`, a few heads of K and V at a time."""
    layout, pages = pool.layout, pool.layer_pages(layer)
    wide = torch.float64 if q.device.type == "cpu" else torch.float32
    group = q.shape[1] // layout.num_kv_heads
    head_bytes = 2 * len(slots) * layout.head_items * wide.itemsize
    step = max(1, CHUNK_BYTES // head_bytes)
    hidden = torch.arange(length, device=q.device)[None] > positions[:, None]
    outs = []
    for head in range(0, layout.num_kv_heads, step):
        kv = pages[slots, :, head : head + step].to(wide)  # (pages, 2, heads, tokens, dim)
        k, v = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        rows = q.unflatten(1, (layout.num_kv_heads, group))[:, head : head + step].to(wide)
        scores = torch.einsum("nhgd,htd->hgnt", rows, k) * layout.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
        outs.append(torch.einsum("hgnt,htd->nhgd", weights, v))
    return torch.cat(outs, 1).flatten(1, 2)


def _compare(out: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    error = (out.to(wanted.dtype) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    worst = float(error.max())
    if not worst <= TOLERANCE:
        raise InvariantError(
            f"attention, {where}: an output differs from the reference by {worst:.2g} of its norm, "
            f"more than {TOLERANCE:g}"
        )
