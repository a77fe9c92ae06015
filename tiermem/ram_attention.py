"""RamAttention: the part of a step's attention that the CPU computes over pages where they lie in RAM.

Only q goes down and the partial result comes up; the pages are not copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tiermem.attention.host import HostBackend
from tiermem.attention.pool_view import TORCH_DTYPES, PagedTables, PoolView
from tiermem.layout import PageLayout
from tiermem.pools import SlotPool, Slots, Tier

MOST_ROWS = 32
"""New tokens of a sequence up to which the CPU attends beside a GPU: its arithmetic grows with them."""


@dataclass(frozen=True, slots=True)
class RamPolicy:
    """Which pages the CPU attends in RAM; the other ones there are streamed to the device.

    Parameters
    ----------
    fraction: of a sequence's old pages that are in RAM alone, 0 to 1.
    most_rows: sequences with more new tokens have none; None: any number.
    """

    fraction: float
    most_rows: int | None = MOST_ROWS

    def choose(self, homes: Slots, new_tokens: int) -> Slots:
        """Indices of the pages of one sequence that are attended in RAM; `homes` are the tiers of its old ones."""
        places = np.flatnonzero(homes == Tier.RAM)
        if self.most_rows is not None and new_tokens > self.most_rows:
            return places[:0]
        return places[: round(self.fraction * len(places))]


class RamAttention:
    """Attends over the warm pool in place, by threads of its own.

    `policy` may be replaced between steps.
    """

    def __init__(
        self, layout: PageLayout, pool: SlotPool, backend: HostBackend, policy: RamPolicy
    ) -> None:
        self.policy = policy
        self._backend = backend
        self._view = PoolView(
            pool.memory.tensor.view(TORCH_DTYPES[layout.dtype]),
            layout,
            pool.slot_bytes // layout.item_bytes,
            pool.num_slots,
        )

    def attend(
        self, layer: int, q: torch.Tensor, tables: PagedTables, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The partial result over the pages in `tables`, which are on the host.

        Parameters
        ----------
        q: (new tokens, q_heads, head_dim), on any device; the host waits for it.

        Returns
        -------
        (new tokens, q_heads, head_dim) and (new tokens, q_heads), both float32, on q's device.
        """
        out, lse = self._backend.attend(
            self._view, layer, q.cpu(), tables,
            scale=scale, window=window, out_dtype=torch.float32,
        )  # fmt: skip
        return out.to(q.device), lse.to(q.device)
