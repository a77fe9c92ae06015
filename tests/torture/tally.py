"""Tally: what one case, or all of them together, did and saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields


class ViolationError(AssertionError):
    """Something that must never happen did."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation: what happened, and the case that shows it."""

    kind: str
    seed: int
    text: str


@dataclass(frozen=True, slots=True)
class Slope:
    """How much something grows an operation, and the ends of the interval that the noise leaves."""

    middle: float
    low: float
    high: float


@dataclass(slots=True)
class Tally:
    """Counts, which add up, and extremes, of which the worst is kept.

    open_s, call_s: the slowest opening of a store and the slowest other call, seconds. late: calls that took
    longer than their deadline and one second. disk_share: the most bytes on the disk, of the cap. slopes: of what
    a soak has measured, by name; those of the last one.
    """

    cases: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    flips: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    refused: int = 0
    reopened: int = 0
    bytes_checked: int = 0
    wrong_bytes: int = 0
    lost_pages: int = 0
    corrupt_found: int = 0
    index_lost: int = 0
    hangs: int = 0
    late: int = 0
    open_s: float = 0.0
    call_s: float = 0.0
    disk_share: float = 0.0
    disk_samples: int = 0
    slopes: dict[str, Slope] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what another one counted."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, list):
                mine.extend(theirs)
            elif isinstance(mine, dict):
                mine.update(theirs)
            elif isinstance(mine, float):
                setattr(self, entry.name, max(mine, theirs))
            else:
                setattr(self, entry.name, mine + theirs)

    @property
    def failed(self) -> bool:
        """Whether anything happened that must not."""
        return bool(self.findings or self.wrong_bytes or self.lost_pages or self.hangs or self.late)

    def to_table(self) -> dict[str, object]:
        """Names and plain values."""
        table: dict[str, object] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            table[entry.name] = dict(value) if isinstance(value, Counter) else value
        table["slopes"] = {name: asdict(slope) for name, slope in self.slopes.items()}
        table["findings"] = [
            {"kind": f.kind, "seed": f.seed, "text": f.text} for f in self.findings
        ]
        return table

    @classmethod
    def from_table(cls, table: dict[str, object]) -> Tally:
        """The inverse of `to_table`, for tables that this program wrote."""
        tally = cls()
        for entry in fields(tally):
            value, own = table[entry.name], getattr(tally, entry.name)
            if isinstance(own, Counter):
                assert isinstance(value, dict)
                own.update(value)
            elif entry.name == "slopes":
                assert isinstance(value, dict)
                tally.slopes = {name: Slope(**ends) for name, ends in value.items()}
            elif entry.name == "findings":
                assert isinstance(value, list)
                tally.findings = [Finding(**finding) for finding in value]
            else:
                setattr(tally, entry.name, value)
        return tally
