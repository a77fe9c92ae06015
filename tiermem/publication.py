"""Publication: what the SSD tier holds when a manager is flushed or closed.

Published pages are those that a later prompt can find; within the tier's cap the ones used last are kept. Where
the disk is to be spared (its free space, its write budget), fewer are written.
"""

from __future__ import annotations

from tiermem.core import Core
from tiermem.pools import ABSENT, VALID, Ids, Tier
from tiermem.store import ColdStore


def write_published(core: Core, store: ColdStore) -> None:
    """Write published pages that are not on the SSD, coldest first; within the cap, the hottest.

    Raises
    ------
    TransferError: a write failed.
    """
    core.leases.note_use()
    pages = core.prefixes.pages()
    _name_stored(core, store, pages[core.table.states(pages, Tier.SSD) == VALID])
    kept = core.prefixes.pages()[-core.table.counts(Tier.SSD).slots :]
    on_ssd = core.table.states(kept, Tier.SSD) == VALID
    missing = kept[~on_ssd]
    missing = missing[len(missing) - core.room.allow(len(missing)) :]
    core.table.pin(kept[on_ssd], Tier.SSD)  # they stay; what is colder makes way
    try:
        for src in (Tier.RAM, Tier.GPU):
            _write_from(core, src, core.room.wanted(missing))
    finally:
        core.table.unpin(kept[on_ssd], Tier.SSD)


def _write_from(core: Core, src: Tier, pages: Ids) -> None:
    """Write those of `pages` whose hottest copy is in `src`, and wait."""
    pages = pages[core.table.states(pages, Tier.SSD) == ABSENT]  # not those of a write that is late
    held = pages[core.best_tiers(pages) == src]
    core.table.pin(held, src)
    try:
        room = core.room.gain(Tier.SSD, len(held))
        transfers = core.mover.submit(core.room.wanted(held)[:room], src, Tier.SSD)
    finally:
        core.table.unpin(held, src)
    core.in_flight.wait_for(transfers)
    for transfer in transfers:
        if transfer.error is not None:
            raise transfer.error


def _name_stored(core: Core, store: ColdStore, pages: Ids) -> None:
    """Pages that were spilled before they had a name get it."""
    slots = core.table.slots(pages, Tier.SSD)
    unnamed = ~store.index.is_published(slots)
    if unnamed.any():
        names = core.prefixes.names_of(pages[unnamed])
        good = store.rename(slots[unnamed], [name for name in names if name is not None])
        core.mover.quarantine.drop(pages[unnamed][~good], Tier.SSD)
