"""Snapshot: one manager's stats as another process left them for us to read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from tiermem.disk_budget import DiskStats
from tiermem.stats import BreakerStats, FlowStats, SequenceStats, Stats, TierStats
from tiermem.step_record import StepRecord

MAX_NUMBER = 2**63
_LISTS: dict[str, type[Any]] = {
    "tiers": TierStats, "flows": FlowStats, "sequences": SequenceStats, "breakers": BreakerStats
}  # fmt: skip
_PARTS: dict[str, type[Any]] = {"last_step": StepRecord, "disk": DiskStats}
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document of a live manager; `stats` is None where another version of tiermem wrote it."""

    document: dict[str, object]
    stats: Stats | None

    @classmethod
    def of(cls, document: dict[str, object]) -> Snapshot:
        """Read `document`, whoever wrote it."""
        try:
            return cls(document, read_stats(document))
        except (KeyError, TypeError):
            return cls(document, None)

    @property
    def pid(self) -> int:
        """The manager's process; 0 where the document does not say."""
        pid = self.document.get("pid")
        return pid if isinstance(pid, int) else 0

    @property
    def key(self) -> str:
        """Tells this manager from every other."""
        return f"{self.pid} {self.document.get('started_s')} {self.document.get('model_id')}"

    @property
    def age_s(self) -> float:
        """Seconds since the manager wrote its figures; an idle manager does not."""
        updated_s = self.document.get("updated_s")
        if not isinstance(updated_s, (int, float)) or not abs(updated_s) < MAX_NUMBER:
            return 0.0
        return max(0.0, time.time() - updated_s)


def read_stats(document: Mapping[str, Any]) -> Stats:
    """The Stats whose `to_json` gave `document`; what has a default may be missing.

    Raises
    ------
    KeyError, TypeError: it is not such a document: something is missing, of another type or out of bounds.
    """
    values = {field.name: document[field.name] for field in fields(Stats)}
    for name, kind in _LISTS.items():
        values[name] = tuple(_part(kind, table) for table in document[name])
    for name, kind in _PARTS.items():
        values[name] = None if document[name] is None else _part(kind, document[name])
    _check_types(Stats, values)
    return Stats(**values)


def _part(kind: type[Any], table: Mapping[str, Any]) -> Any:
    """One of the parts of Stats."""
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    names = [field.name for field in fields(kind)]
    values = {name: table[name] for name in names if name in table or name not in optional}
    _check_types(kind, values)
    return kind(**values)


def _check_types(kind: type[Any], values: Mapping[str, Any]) -> None:
    """TypeError unless each plain value is of the type that its field has, and a number one of a machine."""
    for field in fields(kind):
        wanted = str(field.type).removesuffix(" | None")
        value = values.get(field.name)
        types = _PLAIN.get(wanted)
        if types is None or (value is None and wanted != field.type):
            continue
        if field.name not in values and field.default is not MISSING:
            continue
        fits = isinstance(value, types) and isinstance(value, bool) == (wanted == "bool")
        if not fits or (isinstance(value, (int, float)) and not abs(value) < MAX_NUMBER):
            raise TypeError(f"{field.name}: must be {field.type}, and below {MAX_NUMBER}")
