"""PartialSums: attention over disjoint parts of what rows see, merged as few times as memory allows."""

from __future__ import annotations

import torch

from tiermem.attention.backend import AttentionBackend

MOST_BYTES = 64 << 20
"""Of parts that wait to be merged: all of a decode step's, and a few of a long prompt's."""


class PartialSums:
    """Starts with a result over all rows of a step; takes further ones, over all rows or some.

    Parameters
    ----------
    out, lse: (rows, q_heads, head_dim) and (rows, q_heads), float32, with an lse of -inf where nothing was seen.
        They are overwritten.
    """

    def __init__(self, backend: AttentionBackend, out: torch.Tensor, lse: torch.Tensor) -> None:
        self._backend = backend
        self._out, self._lse = out, lse
        self._parts: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._bytes = 0

    def add(self, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        """A result over other tokens of `rows`; different `rows` are the same or have none in common."""
        self._parts.setdefault((rows.start, rows.stop), []).append((out, lse))
        self._bytes += out.nbytes
        if self._bytes > MOST_BYTES:
            self._fold()

    def result(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Over everything: the output, of `dtype`, and its lse."""
        everything = (0, self._lse.shape[0])
        parts = self._parts.pop(everything, [])
        self._fold()
        if not parts:
            return self._out.to(dtype), self._lse
        outs, lses = zip((self._out, self._lse), *parts, strict=True)
        return self._backend.merge(list(outs), list(lses), dtype)

    def _fold(self) -> None:
        """Merge what waits into the result so far."""
        for (start, stop), parts in self._parts.items():
            rows = slice(start, stop)
            outs, lses = zip((self._out[rows], self._lse[rows]), *parts, strict=True)
            self._out[rows], self._lse[rows] = self._backend.merge(
                list(outs), list(lses), torch.float32
            )
        self._parts.clear()
        self._bytes = 0
