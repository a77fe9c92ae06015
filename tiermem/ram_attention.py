"""RamAttention: the part of a step's attention that the CPU computes over pages where they lie in RAM.

Only q goes down and the partial result comes up; the pages are not copied.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tiermem.attention.host import HostBackend
from tiermem.attention.page_lse import PageLse
from tiermem.attention.pool_view import TORCH_DTYPES, PagedTables, PoolView
from tiermem.layout import PageLayout
from tiermem.pools import SlotPool, Slots, Tier

MOST_ROWS = 32
"""New tokens of a sequence up to which the CPU attends beside a GPU: its arithmetic grows with them."""


@dataclass(frozen=True, slots=True)
class RamWork:
    """What the CPU did for a step: bytes of K and V that it read, and the seconds that took.

    `awaited_s`: how long the device waited for it. `late`: of the layers, the share (0 to 1) in which it did. Both
    None where that is not known.
    """

    num_bytes: int
    seconds: float
    awaited_s: float | None = None
    late: float | None = None


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Old K and V that a step needs and that are not hot: bytes in RAM alone, and on the SSD alone.

    `new_tokens`: the most of a sequence.
    """

    ram: int
    cold: int
    new_tokens: int


class RamPolicy(Protocol):
    """Which pages the CPU attends in RAM; the other ones there are streamed to the device."""

    def fraction(self, wanted: StepBytes) -> float:
        """Of pages that are in RAM alone, for a step that needs `wanted`."""

    def choose(self, homes: Slots, new_tokens: int, fraction: float) -> Slots:
        """Indices of the pages of one sequence that are attended in RAM; `homes` are the tiers of its old ones."""

    def learn(self, wanted: StepBytes, work: RamWork, elapsed_s: float) -> None:
        """A step took `elapsed_s` from when the link began, and the CPU did `work` for it."""


@dataclass(frozen=True, slots=True)
class FixedShare:
    """The same share of every step.

    Parameters
    ----------
    share: of a sequence's old pages that are in RAM alone, 0 to 1.
    most_rows: sequences with more new tokens have none; None: any number.
    """

    share: float
    most_rows: int | None = MOST_ROWS

    def fraction(self, wanted: StepBytes) -> float:  # noqa: ARG002 - whatever is wanted
        """The share."""
        return self.share

    def choose(self, homes: Slots, new_tokens: int, fraction: float) -> Slots:
        """The first ones of those in RAM."""
        too_many = self.most_rows is not None and new_tokens > self.most_rows
        return first_places(homes, 0.0 if too_many else fraction)

    def learn(self, wanted: StepBytes, work: RamWork, elapsed_s: float) -> None:
        """Nothing: it is fixed."""


def first_places(homes: Slots, fraction: float) -> Slots:
    """The first of the indices of pages that are in RAM."""
    places = np.flatnonzero(homes == Tier.RAM)
    return places[: round(fraction * len(places))]


class RamAttention(Protocol):
    """Attends over the warm pool in place, for one step at a time; `policy` may be replaced between steps."""

    policy: RamPolicy

    def tables(self, tables: PagedTables) -> Any:
        """What `begin` takes, of tables on the host."""

    def begin(
        self,
        layer: int,
        q: torch.Tensor,
        tables: Any,
        scale: float,
        window: int | None,
        page_lse: PageLse | None = None,
    ) -> Any:
        """Start attending, on the compute stream's terms; `result` takes what this returns.

        Parameters
        ----------
        q: (new tokens, q_heads, head_dim), on the device.
        page_lse: gets the log-sum-exp of the tables' pages by the time of `result`; on the device.

        Raises
        ------
        TransferError: the threads cannot take it.
        """

    def result(self, begun: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The partial result, (new tokens, q_heads, head_dim) and (new tokens, q_heads), float32, on the device.

        Ordering: for the compute stream, and until a few more layers begin.
        """

    def settle(self) -> RamWork:
        """End the step: wait for what has begun in it.

        Raises
        ------
        TransferError: attention failed; what `result` gave is not to be used.
        """

    def close(self, timeout_s: float) -> bool:
        """End the threads; False if the pool must stay mapped, because one of them reads it for ever."""


class DirectAttention:
    """On the CPU device, where nothing is handed over: attends as it is asked."""

    def __init__(self, pool: PoolView, backend: HostBackend, policy: RamPolicy) -> None:
        self.policy = policy
        self._pool = pool
        self._backend = backend
        self._bytes = 0
        self._seconds = 0.0

    def tables(self, tables: PagedTables) -> PagedTables:
        """As they are."""
        return tables

    def begin(
        self,
        layer: int,
        q: torch.Tensor,
        tables: PagedTables,
        scale: float,
        window: int | None,
        page_lse: PageLse | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend now."""
        start_s = time.perf_counter()
        result = self._backend.attend(
            self._pool, layer, q, tables,
            scale=scale, window=window, out_dtype=torch.float32, page_lse=page_lse,
        )  # fmt: skip
        self._seconds += time.perf_counter() - start_s
        self._bytes += int(tables.num_pages.sum()) * self._pool.layout.layer_bytes
        return result

    def result(self, begun: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """It."""
        return begun

    def settle(self) -> RamWork:
        """Nothing is left to wait for."""
        work = RamWork(self._bytes, self._seconds, self._seconds)
        self._bytes, self._seconds = 0, 0.0
        return work

    def close(self, timeout_s: float) -> bool:  # noqa: ARG002 - there are no threads of its own
        """Nothing to end."""
        return True


def warm_view(layout: PageLayout, pool: SlotPool) -> PoolView:
    """The warm pool as attention sees it."""
    return PoolView(
        pool.memory.tensor.view(TORCH_DTYPES[layout.dtype]),
        layout,
        pool.slot_bytes // layout.item_bytes,
        pool.num_slots,
    )
