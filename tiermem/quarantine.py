"""Quarantine: copies whose bytes are not those of their page: never served, dropped once nobody holds them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.errors import CorruptPageError
from tiermem.page_sums import Damage, PageSums
from tiermem.pools import VALID, Ids, Tier, as_ids
from tiermem.store import ColdStore
from tiermem.store_names import GoneReason, PageName

log = logging.getLogger("tiermem")


class Names(Protocol):
    """What pages are called; the prefix index, as transfers see it."""

    def names_of(self, ids: Ids) -> Sequence[PageName | None]: ...

    def forget(self, ids: Ids) -> None: ...


class Quarantine:
    """Of one manager: what was found damaged, counted by tier, and not dropped yet."""

    def __init__(
        self, table: _core.PageTable, sums: PageSums, names: Names, store: ColdStore | None
    ) -> None:
        self.num_corrupt = dict.fromkeys(Tier, 0)
        self._table = table
        self._sums = sums
        self._names = names
        self._store = store
        self._found: list[Damage] = []

    def report(self, damages: Sequence[Damage]) -> CorruptPageError:
        """Count and log copies that were found damaged, and quarantine them as soon as nobody holds them.

        Returns what to raise for them. Of bytes that came from RAM, where they are still right, the way was wrong:
        they are not quarantined.
        """
        for damage in damages:
            self.num_corrupt[damage.tier] += 1
            log.error(
                "%s slot %d, page %d, layer %s: its bytes are not those that were stored; they are not served",
                damage.tier.name, damage.slot, damage.page,
                "unknown" if damage.layer is None else damage.layer,
            )  # fmt: skip
        for damage in damages:
            if damage.tier != Tier.RAM or self._is_bad_in_ram(damage.page):
                self._found.append(damage)
        pages = sorted({damage.page for damage in damages})
        return CorruptPageError(
            f"{len(pages)} pages from {', '.join(sorted({d.tier.name for d in damages}))} are not what was "
            f"written there; they were not served",
            pages=tuple(pages),
            lost=tuple(page for page in pages if not self._has_good_copy(page)),
        )

    @property
    def is_waiting(self) -> bool:
        """Whether something found damaged was not dropped yet."""
        return bool(self._found)

    def holds(self, ids: Ids, tier: Tier) -> NDArray[np.bool_]:
        """Which copies were found damaged and wait for quarantine."""
        pages = [damage.page for damage in self._found if damage.tier == tier]
        return np.isin(ids, pages)

    def drop_found(self) -> None:
        """Quarantine what was found damaged and is not held any more."""
        for tier in Tier:
            pages = {damage.page for damage in self._found if damage.tier == tier}
            if pages:
                self.drop(as_ids(sorted(pages)), tier)
        self._found = [damage for damage in self._found if self._is_there(damage)]

    def drop(self, ids: Ids, tier: Tier) -> None:
        """Drop copies that were found damaged, even the last ones: their pages are lost, never served.

        A copy that someone else holds stays for now.
        """
        ids = ids[self._table.alive(ids)]
        ids = ids[self._table.states(ids, tier) == VALID]
        ids = ids[self._table.pins(ids, tier) == 0]
        if tier == Tier.SSD and self._store is not None:
            keys = [name.key for name in self._names.names_of(ids) if name is not None]
            self._store.index.unpublish_keys(keys, GoneReason.QUARANTINED)
        self._table.discard(ids, tier)
        alive = self._table.alive(ids)
        lost = ids[alive][self._table.is_lost(ids[alive])]
        self._names.forget(np.concatenate([ids[~alive], lost]))

    # ---- inside ------------------------------------------------------------------------------------

    def _has_good_copy(self, page: int) -> bool:
        """Whether a page has a VALID copy that was not found damaged."""
        ids = as_ids([page])
        return bool(self._table.alive(ids)[0]) and any(
            self._table.states(ids, tier)[0] == VALID and not self.holds(ids, tier)[0]
            for tier in Tier
        )

    def _is_there(self, damage: Damage) -> bool:
        """Whether the copy is in the slot in which it was found damaged."""
        ids = as_ids([damage.page])
        return bool(
            self._table.alive(ids)[0]
            and self._table.states(ids, damage.tier)[0] == VALID
            and self._table.slots(ids, damage.tier)[0] == damage.slot
        )

    def _is_bad_in_ram(self, page: int) -> bool:
        """Whether the copy in RAM is damaged where it lies."""
        ids = as_ids([page])
        if not self._table.alive(ids)[0] or self._table.states(ids, Tier.RAM)[0] != VALID:
            return False
        return bool(self._sums.verify_in_ram(ids, self._sums.every_layer))
