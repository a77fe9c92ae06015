"""Rows: the batch of a cache, one sequence a row, and which columns of each row are padding.

transformers counts columns: every row of a batch is as long as the longest, and shorter ones are padded.
tiermem stores tokens: padding has no K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiermem.errors import TierMemError
from tiermem.integrations.transformers.call import Call
from tiermem.integrations.transformers.columns import Columns, Gap
from tiermem.manager import TierManager
from tiermem.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Unnamed:
    """Tokens of a call that are stored from column `start` on, and get their names in `rows` later."""

    call: Call
    start: int
    rows: SequenceOf[int]


class Rows:
    """Sequences of the rows of one batch; empty until the first call or `attach` says how many rows there are.

    `reusable` says whether tokens are named, so that others may find their pages. `names_wait` says that the last
    columns of a call may be drafts: its tokens get their names by the `crop` that follows, or whatever else comes
    next, so that no page with tokens that are rolled back is ever found, nor takes another page's place.
    """

    def __init__(self, manager: TierManager, salt: bytes, label: str, reusable: bool) -> None:
        self.sequences: list[Sequence] = []
        self.names_wait = False
        self._columns = Columns(0)
        self._short: dict[Sequence, int] = {}
        self._is_settled = True
        self._unnamed: Unnamed | None = None
        self._manager = manager
        self._salt = salt
        self._label = label
        self._reusable = reusable

    @property
    def columns(self) -> int:
        """Columns that are stored, padding included: the length that transformers sees."""
        return self._columns.count

    @property
    def real(self) -> NDArray[np.bool_]:
        """(rows, columns), False at padding; until the next change."""
        return self._columns.real

    @property
    def padded(self) -> bool:
        """Whether any stored column of any row is padding."""
        return not self.real.all()

    # ---- growing -----------------------------------------------------------------------------------

    def fit(self, call: Call) -> None:
        """Open sequences for the rows of `call`, if nothing is stored yet.

        Raises
        ------
        ValueError: another number of rows than before, or a mask that contradicts what is stored.
        """
        self._name_waiting()
        if self.columns == 0 and call.rows != len(self.sequences):
            self.reset()
            self._open(call.rows)
        if call.rows != len(self.sequences):
            raise ValueError(
                f"input_ids of {call.rows} rows: the cache holds {len(self.sequences)}; reset it, or use "
                f"batch_repeat_interleave for several continuations of each row"
            )
        if call.past_real is None:
            if self.padded:
                raise ValueError(
                    "attention_mask: must be given, because the cache holds padded rows"
                )
        elif call.past_real.shape[1] != self.columns:
            raise ValueError(
                f"attention_mask of {call.past_real.shape[1] + call.columns} columns: must be "
                f"{self.columns} (stored) + {call.columns} (new)"
            )
        elif not np.array_equal(call.past_real, self.real):
            raise ValueError(
                "attention_mask: differs from before in columns that are stored already"
            )

    @contextmanager
    def growing(self, call: Call) -> Iterator[None]:
        """A step stores the tokens of `call` meanwhile: count its columns and name its tokens.

        Where the body raises, rows have no more columns than before: fewer where they were cut and not filled.
        """
        start, self._is_settled = self.columns, False
        try:
            yield
            self._advance(call)
        except BaseException:
            self._columns.cut(start)
            self._unnamed = None
            with suppress(TierMemError):  # what cannot be settled now is settled later, or reset
                self.settle()
            raise
        self._is_settled = True

    def settle(self) -> None:
        """Let every row have the tokens of its columns: what a call that raised left, or took, is forgotten."""
        if self._is_settled:
            return
        kept = self.columns
        for row, sequence in enumerate(self.sequences):
            missing = np.flatnonzero(self.real[row])[sequence.num_tokens :]
            kept = min(kept, int(missing[0])) if len(missing) else kept
        self._short = {}
        self.crop(self.columns - kept)
        self._is_settled = True

    def _advance(self, call: Call) -> None:
        start = self.columns
        named = [row for row in range(call.rows) if self._placed_as_stored(call, row)]
        self._columns.append(call)
        self._unnamed = Unnamed(call, start, named)
        if not self.names_wait:
            self._name_waiting()

    def _name_waiting(self) -> None:
        """What is left of the latest call gets its names."""
        unnamed, self._unnamed = self._unnamed, None
        if unnamed is None or unnamed.call.ids is None or not self._reusable:
            return
        columns = slice(0, self.columns - unnamed.start)
        for row in unnamed.rows if columns.stop > 0 else ():
            ids, real = unnamed.call.ids[row], unnamed.call.real[row]
            self.sequences[row].record(ids[columns][real[columns]])

    def _placed_as_stored(self, call: Call, row: int) -> bool:
        """Whether all tokens before are named, and the model counted each new one's position as tiermem does.

        K are rotated by positions: a token at another place than its index must not be found by its index.
        """
        sequence, real = self.sequences[row], call.real[row]
        count = int(real.sum())
        first = sequence.num_tokens - count
        positions = (
            np.arange(self.columns, self.columns + call.columns)
            if call.positions is None
            else call.positions[row]
        )
        return sequence.num_named == first and np.array_equal(
            positions[real], np.arange(first, first + count)
        )

    # ---- reusing -----------------------------------------------------------------------------------

    def attach(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> int:
        """Attach stored prefixes of rows `ids` (rows, columns), left-padded where `real` is False.

        As many columns as every row finds, but never the last one: its logits are to be computed. Returns their
        number.
        """
        padding = [int(np.argmax(row)) if row.any() else len(row) for row in real]
        rows, columns = ids.shape
        try:
            for row in range(rows):
                self.sequences.append(self._open_one(ids[row][padding[row] :]))
            found = [
                start + sequence.num_tokens
                for start, sequence in zip(padding, self.sequences, strict=True)
            ]
            attached: int = min(columns - 1, *found)
            for start, sequence in zip(padding, self.sequences, strict=True):
                sequence.rollback(sequence.num_tokens - max(attached - start, 0))
        except BaseException:
            self.reset()
            raise
        known = slice(0, attached)
        positions = np.cumsum(real, axis=1, dtype=np.int64) - 1
        self._columns.attach(real[:, known], ids[:, known], positions[:, known])
        return attached

    # ---- shrinking and choosing --------------------------------------------------------------------

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns.

        Raises
        ------
        ValueError: below 0 or more than there are.
        """
        if not 0 <= columns <= self.columns:
            raise ValueError(f"columns={columns}: must be 0 to {self.columns}")
        kept = self.columns - columns
        for sequence, count in zip(self.sequences, self.real[:, :kept].sum(axis=1), strict=True):
            sequence.rollback(sequence.num_tokens - int(count))
        self._columns.cut(kept)
        self._name_waiting()

    def select(self, rows: SequenceOf[int]) -> None:
        """Row i becomes what row `rows[i]` is now; a row that is chosen twice is forked, others are closed.

        Raises
        ------
        ValueError: none chosen, or a row that does not exist.
        """
        if not rows or not all(0 <= row < len(self.sequences) for row in rows):
            raise ValueError(f"rows={list(rows)}: each must be 0 to {len(self.sequences) - 1}")
        self._name_waiting()
        left = dict(enumerate(self.sequences))
        chosen = []
        for row in rows:
            first = left.pop(row, None)
            chosen.append(self.sequences[row].fork(self._label) if first is None else first)
        self._columns.select(rows)
        self.sequences = chosen
        for sequence in left.values():
            sequence.close()

    def reset(self) -> None:
        """Close every sequence, settled or not; pages of named tokens stay in the cache."""
        if self._is_settled:
            self._name_waiting()
        for sequence in self.sequences:
            sequence.close()
        self.sequences = []
        self._short, self._unnamed = {}, None
        self._columns = Columns(0)
        self._is_settled = True

    # ---- losing tokens, and storing them again -----------------------------------------------------

    def can_compute(self, row: int, start_token: int) -> bool:
        """Whether all is known that it takes to compute the tokens of `row` from number `start_token` on."""
        return self._columns.are_known(row, start_token)

    def cut(self, row: int, num_tokens: int) -> None:
        """Let go of what `row` has stored beyond `num_tokens`; its columns stay, to be stored again."""
        sequence = self.sequences[row]
        self._short.setdefault(sequence, sequence.num_named)
        sequence.rollback(sequence.num_tokens - num_tokens)

    def short_rows(self) -> list[int]:
        """Rows that were cut and not filled again."""
        return [row for row, sequence in enumerate(self.sequences) if sequence in self._short]

    def reuse(self, row: int, is_intact: Callable[[Sequence], bool]) -> None:
        """Take over what is stored of a row that was cut: another row may have stored it again."""
        sequence = self.sequences[row]
        named = self._short[sequence]
        if len(self.sequences) == 1 or not self._reusable or named <= sequence.num_tokens:
            return
        ids = self._columns.ids[row][self.real[row]][:named]
        other = self._open_one(ids)
        if other.num_tokens <= sequence.num_tokens or not is_intact(other):
            other.close()
            return
        self._short[other] = self._short.pop(sequence)
        self.sequences[row] = other
        sequence.close()

    def missing(self, row: int, most_columns: int) -> list[Gap]:
        """The tokens of a row that was cut, in runs of at most so many."""
        return self._columns.gaps(row, self.sequences[row].num_tokens, most_columns)

    def stored_again(self, row: int, gap: Gap) -> None:
        """A step has stored `gap` of a row that was cut: tokens that had names get them."""
        sequence = self.sequences[row]
        wanted = min(self._short[sequence], sequence.num_tokens) - sequence.num_named
        if wanted > 0:  # names have no holes: those of the gap begin where it begins
            sequence.record(gap.ids[0, :wanted])

    def is_full(self, row: int) -> None:
        """All tokens of a row that was cut are stored again."""
        del self._short[self.sequences[row]]

    # ---- inside ------------------------------------------------------------------------------------

    def _open(self, count: int) -> None:
        self._columns = Columns(count)
        for _ in range(count):
            self.sequences.append(self._open_one(np.empty(0, dtype=np.int64)))

    def _open_one(self, ids: NDArray[np.int64]) -> Sequence:
        return self._manager.open_sequence(ids, salt=self._salt, label=self._label)
