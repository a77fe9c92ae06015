"""Snapshot: one manager's stats as another process left them for us to read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from tiermem.disk_budget import DiskStats
from tiermem.stats import FlowStats, SequenceStats, Stats, TierStats
from tiermem.step_record import StepRecord

Part = TypeVar("Part", TierStats, FlowStats, SequenceStats, StepRecord, DiskStats)


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
        return max(0.0, time.time() - updated_s) if isinstance(updated_s, (int, float)) else 0.0


def read_stats(document: Mapping[str, Any]) -> Stats:
    """The Stats whose `to_json` gave `document`; what has a default may be missing.

    Raises
    ------
    KeyError, TypeError: it is not such a document.
    """
    values = {field.name: document[field.name] for field in fields(Stats)}
    values["tiers"] = _parts(TierStats, document["tiers"])
    values["flows"] = _parts(FlowStats, document["flows"])
    values["sequences"] = _parts(SequenceStats, document["sequences"])
    steps = [] if document["last_step"] is None else [document["last_step"]]
    values["last_step"] = next(iter(_parts(StepRecord, steps)), None)
    disks = [document["disk"]] if document["disk"] is not None else []
    values["disk"] = next(iter(_parts(DiskStats, disks)), None)
    return Stats(**values)


def _parts(kind: type[Part], tables: list[Mapping[str, Any]]) -> tuple[Part, ...]:
    names = [field.name for field in fields(kind)]
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    return tuple(
        kind(**{name: table[name] for name in names if name in table or name not in optional})
        for table in tables
    )
