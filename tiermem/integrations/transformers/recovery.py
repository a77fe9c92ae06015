"""Recovery: a call of the model goes on when pages are lost: their tokens are computed once more.

A damaged copy is never served. Where a page has another copy, the call is carried out again and takes that one.
Where it has none, each row is cut back to its last good page, what is gone is prefilled again, with the ids and
positions that it had, and then the call is carried out again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from tiermem.errors import CorruptPageError, TransferError
from tiermem.integrations.transformers.columns import Gap
from tiermem.integrations.transformers.rows import Rows
from tiermem.pools import Tier
from tiermem.sequence import Sequence

log = logging.getLogger("tiermem")

Result = TypeVar("Result")

MOST_ATTEMPTS = 5
"""How often a call is carried out again. Damage is found as it is met, layer by layer, so that one recovery may
uncover more; the last attempt trusts no old page of the rows that were hit."""

NEAR_TIERS = (Tier.GPU, Tier.RAM)
"""What is left when the SSD cannot be read."""


class Computer(Protocol):
    """The cache, as its recovery sees it."""

    def compute_again(self, sequence: Sequence, gap: Gap) -> None:
        """Store tokens behind those of `sequence` as the model computed them first, and count them."""
        ...

    def chunk_tokens(self) -> int:
        """The most tokens that are to be computed at once."""
        ...

    def fits_near(self) -> bool:
        """Whether all rows have room in NEAR_TIERS."""
        ...


class Recovery:
    """Carries out calls of a model whose K and V are in `rows`. `refusal` says why nothing can be computed again;
    None where it can."""

    def __init__(self, rows: Rows, computer: Computer, refusal: str | None) -> None:
        self._rows = rows
        self._computer = computer
        self._refusal = refusal

    def carry_out(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, which stores nothing when it raises.

        Raises
        ------
        CorruptPageError, TransferError: pages are lost and cannot be computed again, or were lost again and
        again; rows that were cut are left so.
        """
        try:
            return attempt()
        except TransferError as error:
            found = error
        if self._refusal is not None:
            raise _refused(found, self._refusal)
        return _Rescue(self._rows, self._computer).run(attempt, found)


class _Rescue:
    """The recovery of one call."""

    def __init__(self, rows: Rows, computer: Computer) -> None:
        self._rows = rows
        self._computer = computer
        self._named: set[int] = set()
        self._damaged: set[int] = set()
        self._hit: set[int] = set()
        self._tiers: tuple[Tier, ...] = tuple(Tier)

    def run(self, attempt: Callable[[], Result], error: TransferError) -> Result:
        """Cut, compute again and attempt again, until it goes well."""
        num_tokens = 0
        for number in range(1, MOST_ATTEMPTS + 1):
            self._learn(error, number)
            self._cut(error, number)
            try:
                num_tokens += self._fill()
                result = attempt()
            except TransferError as again:
                error = again
                continue
            if num_tokens:
                log.warning(
                    "%d tokens of %d rows were computed again, because their pages were %s",
                    num_tokens, len(self._hit),
                    "damaged" if self._tiers != NEAR_TIERS else "on an SSD that cannot be read",
                )  # fmt: skip
            return result
        raise error

    def _learn(self, error: TransferError, number: int) -> None:
        """What cannot be trusted any more."""
        if isinstance(error, CorruptPageError):
            self._damaged |= set(error.lost) | (self._named & set(error.pages))
            self._named |= set(error.pages)
        elif number > 1:  # it failed twice: what is on the SSD alone is as good as lost
            self._tiers = NEAR_TIERS

    def _cut(self, error: TransferError, number: int) -> None:
        """Cut back every row that has lost something; raises `error` where that helps nothing."""
        kept = [self._kept(row, number) for row in range(len(self._rows.sequences))]
        short = {
            row: count
            for row, count in enumerate(kept)
            if count < self._rows.sequences[row].num_tokens
        }
        for row, count in short.items():
            if not self._rows.can_compute(row, count):
                raise _refused(
                    error, f"row {row} has tokens there whose ids or positions were not given"
                )
        if self._tiers == NEAR_TIERS and not (short and self._computer.fits_near()):
            raise error
        for row, count in short.items():
            self._rows.cut(row, count)
        self._hit |= short.keys()

    def _kept(self, row: int, number: int) -> int:
        """How many tokens of `row` can be kept."""
        if number == MOST_ATTEMPTS and (row in self._hit or not self._hit):
            return 0
        return self._rows.sequences[row].intact_tokens(self._tiers, self._damaged)

    def _fill(self) -> int:
        """Compute what is missing in rows that were cut; how many tokens that were."""
        num_tokens = 0
        for row in self._rows.short_rows():
            self._rows.reuse(row, self._is_intact)
            for gap in self._rows.missing(row, self._computer.chunk_tokens()):
                self._computer.compute_again(self._rows.sequences[row], gap)
                self._rows.stored_again(row, gap)
                num_tokens += gap.num_tokens
            self._rows.is_full(row)
        return num_tokens

    def _is_intact(self, sequence: Sequence) -> bool:
        return sequence.intact_tokens(self._tiers, self._damaged) == sequence.num_tokens


def _refused(error: TransferError, reason: str) -> TransferError:
    """`error`, and where pages are lost why nothing was done about it."""
    if not isinstance(error, CorruptPageError):
        return error
    return CorruptPageError(f"{error}; not computed again: {reason}", error.pages, error.lost)
