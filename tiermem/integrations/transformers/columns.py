"""Columns: what each stored column of a batch is: padding or a token, with which id and at which position."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.integrations.transformers.call import Call

UNKNOWN = -1
"""An id or a position that nobody said; neither is ever below 0."""

LEAST_ROOM = 256


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """Tokens of one row in the columns [start, end), none of them padding: all that a model needs to compute them.

    ids, positions: (1, end - start). real: (1, end), False where a column up to the last one is padding.
    """

    start: int
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    real: NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        """How many."""
        return int(self.ids.shape[1])

    def as_call(self) -> Call:
        """What a call of the model with these tokens alone says."""
        real = np.ones(self.ids.shape, dtype=np.bool_)
        return Call(1, self.num_tokens, real, None, self.ids, self.positions)


class Columns:
    """`rows` rows of as many columns; memory grows ahead, so that a column more costs the same at any length.

    `real`, `ids` and `positions` (rows, columns) are views, until the next change.
    """

    def __init__(self, rows: int) -> None:
        self.count = 0
        self._real: NDArray[np.bool_] = np.ones((rows, LEAST_ROOM), dtype=np.bool_)
        self._ids: NDArray[np.int64] = np.zeros((rows, LEAST_ROOM), dtype=np.int64)
        self._positions: NDArray[np.int64] = np.zeros((rows, LEAST_ROOM), dtype=np.int64)

    @property
    def real(self) -> NDArray[np.bool_]:
        """False at padding."""
        return self._real[:, : self.count]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Token ids; UNKNOWN where K and V depend on more than ids and positions, anything at padding."""
        return self._ids[:, : self.count]

    @property
    def positions(self) -> NDArray[np.int64]:
        """What K were rotated by; UNKNOWN where the model chose them by itself, anything at padding."""
        return self._positions[:, : self.count]

    def append(self, call: Call) -> None:
        """The columns of `call` come behind those that are here."""
        end = self.count + call.columns
        self._make_room(end)
        new = slice(self.count, end)
        self._real[:, new] = call.real
        self._ids[:, new] = UNKNOWN if call.ids is None else call.ids
        self._positions[:, new] = self._positions_of(call)
        self.count = end

    def attach(
        self, real: NDArray[np.bool_], ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """Columns (rows, columns) that were stored before, the first ones."""
        self._real, self._ids, self._positions = real.copy(), ids.copy(), positions.copy()
        self.count = real.shape[1]

    def cut(self, count: int) -> None:
        """Forget all but the first `count`, at most."""
        self.count = min(self.count, count)

    def select(self, rows: SequenceOf[int]) -> None:
        """Row i becomes what row `rows[i]` is."""
        chosen = list(rows)
        self._real, self._ids = self._real[chosen], self._ids[chosen]
        self._positions = self._positions[chosen]

    def gaps(self, row: int, start_token: int, most_columns: int) -> list[Gap]:
        """All tokens of `row` from its `start_token`-th on, in runs of neighbours, `most_columns` at most."""
        columns = np.flatnonzero(self.real[row])[start_token:]
        runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
        starts = [(run, i) for run in runs for i in range(0, len(run), most_columns)]
        return [self._gap(row, run[i : i + most_columns]) for run, i in starts]

    def are_known(self, row: int, start_token: int) -> bool:
        """Whether id and position of all those tokens were said."""
        columns = np.flatnonzero(self.real[row])[start_token:]
        known = (self.ids[row, columns] != UNKNOWN) & (self.positions[row, columns] != UNKNOWN)
        return bool(known.all())

    # ---- inside ------------------------------------------------------------------------------------

    def _gap(self, row: int, columns: NDArray[np.intp]) -> Gap:
        first, end = int(columns[0]), int(columns[-1]) + 1
        one = slice(row, row + 1)
        return Gap(
            first,
            self.ids[one, first:end].copy(),
            self.positions[one, first:end].copy(),
            self.real[one, :end].copy(),
        )

    def _positions_of(self, call: Call) -> NDArray[np.int64]:
        """As given; else column numbers, which models agree on only where no padding lies before."""
        if call.positions is not None:
            return call.positions
        numbers = np.arange(self.count, self.count + call.columns, dtype=np.int64)
        past = self._real[:, : self.count].all(axis=1, keepdims=True)
        unpadded = past & np.logical_and.accumulate(call.real, axis=1)
        return np.where(unpadded, numbers, UNKNOWN)

    def _make_room(self, count: int) -> None:
        have = self._real.shape[1]
        if count <= have:
            return
        more = ((0, 0), (0, max(2 * count, LEAST_ROOM) - have))
        self._real = np.pad(self._real, more)
        self._ids, self._positions = np.pad(self._ids, more), np.pad(self._positions, more)
