"""PageLse: the log-sum-exp of each page's scores, from which the page's mass follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.attention.pool_view import PagedTables


@dataclass(frozen=True, slots=True, eq=False)
class PagePlaces:
    """Where the entries of a table are in their sequences: one triple for each query row and entry.

    Parameters
    ----------
    rows, entries, pages: (n,) int64; query row `rows[i]` sees, in entry `entries[i]` of its sequence's
        table, the page that is number `pages[i]` of the sequence.
    """

    rows: torch.Tensor
    entries: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(
        cls,
        row_starts: NDArray[np.int32],
        num_pages: NDArray[np.int32],
        page_starts: NDArray[np.int32] | None,
        page_tokens: int,
    ) -> PagePlaces:
        """Those of tables on the host; see PagedTables."""
        triples = [np.empty((3, 0), dtype=np.int64)]
        for sequence, count in enumerate(num_pages.tolist()):
            entries = np.arange(count)
            pages = entries if page_starts is None else page_starts[sequence, :count] // page_tokens
            rows = np.arange(row_starts[sequence], row_starts[sequence + 1])
            many = (rows.repeat(count), np.tile(entries, len(rows)), np.tile(pages, len(rows)))
            triples.append(np.stack(many).astype(np.int64))
        return cls(*torch.from_numpy(np.concatenate(triples, axis=1)))

    def on(self, device: torch.device) -> PagePlaces:
        """The same on a device; the copies run in the order of its current stream."""
        if device.type == "cpu":
            return self
        tensors = (self.rows, self.entries, self.pages)
        return PagePlaces(
            *(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
        )

    @classmethod
    def of_tables(cls, tables: PagedTables, page_tokens: int) -> PagePlaces:
        """Those of tables on the CPU."""
        starts = tables.page_starts
        return cls.of(
            tables.row_starts.numpy(), tables.num_pages.numpy(),
            None if starts is None else starts.numpy(), page_tokens,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class PageLse:
    """The log-sum-exp of each page's scores for every query row and query head, as attention leaves it.

    A page is in the place of its number in its sequence, wherever it is stored, so that calls over disjoint
    sets of pages fill one object between them. A page's tokens may be in several parts, whose exp add up to
    the page's: programs that share a page then need not know of each other.

    Parameters
    ----------
    values: (num_rows, num_pages * parts, q_heads), contiguous, float32 (float64 in the reference), natural
        logarithm; -inf where nothing is seen, or nothing was attended yet.
    num_pages: of the longest sequence, or more.
    parts: of a page.
    """

    values: torch.Tensor
    num_pages: int
    parts: int = 1

    @classmethod
    def empty(
        cls,
        num_rows: int,
        num_heads: int,
        num_pages: int,
        device: torch.device,
        *,
        parts: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> PageLse:
        """Before anything was attended."""
        shape = (num_rows, num_pages * parts, num_heads)
        return cls(torch.full(shape, -math.inf, dtype=dtype, device=device), num_pages, parts)

    @property
    def form(self) -> tuple[object, ...]:
        """Everything but the address: what serves one serves all others of the same form."""
        values = self.values
        return (values.shape, values.stride(), values.dtype, values.device, self.parts)

    def of_rows(self, rows: slice) -> PageLse:
        """What belongs to some of the query rows: a view."""
        return PageLse(self.values[rows], self.num_pages, self.parts)

    def place(self, page_lse: torch.Tensor, places: PagePlaces) -> None:
        """Take over what attention over one table found: (num_rows, q_heads, entries), on the same device."""
        found = page_lse[places.rows, :, places.entries]
        self.values[places.rows, places.pages * self.parts] = found.to(self.values.dtype)

    def mass(self, lse: torch.Tensor) -> torch.Tensor:
        """(num_rows, q_heads, num_pages): exp(page's lse - lse); `lse` (num_rows, q_heads) is of all pages.

        This is the definition; see AttentionBackend.page_mass.
        """
        anchor = torch.where(lse == -math.inf, 0.0, lse)[:, None]
        shape = (len(self.values), self.num_pages, self.parts, lse.shape[1])
        parts = torch.exp(self.values - anchor).view(shape)
        return parts.sum(2).transpose(1, 2).contiguous()
