"""Publication: what the SSD tier holds when a manager is flushed or closed.

Published pages are those that a later prompt can find; within the tier's cap the ones used last are kept. Where
the disk is to be spared (its free space, its write budget), fewer are written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tiermem.breaker import Use
from tiermem.core import Core
from tiermem.disk_budget import Pause
from tiermem.errors import NotDurableError, TransferError
from tiermem.page_sums import Damage
from tiermem.pools import ABSENT, VALID, Ids, Tier
from tiermem.store import ColdStore

NO_SLOT_LEFT = "other pages that are in use fill the SSD tier"
"""Why published pages are not durable though nothing failed."""


def flush_published(core: Core, store: ColdStore) -> None:
    """Return when every published page is durable, within the cap; what can be is, whatever fails.

    Raises
    ------
    NotDurableError: pages are not durable. TransferError: they are, but something else failed.
    """
    failure = None
    try:
        core.mover.check(Use.WRITE)
        core.in_flight.check_late()
        write_published(core, store)
    except TransferError as error:
        failure = error
    try:
        core.mover.check(Use.WRITE)
        store.sync()
    except TransferError as error:
        failure = failure or error
    kept = _within_cap(core)
    if num_missing := int((~_are_durable(core, store, kept)).sum()):
        raise NotDurableError(num_missing, len(kept), _reason(failure)) from failure
    if failure is not None and core.mover.allows(Use.WRITE):  # a tier that is off had nothing to do
        raise failure


def write_published(core: Core, store: ColdStore) -> None:
    """Write published pages that are not on the SSD, coldest first; within the cap, the hottest.

    Those that a failed sync left in doubt are written again, and where they are damaged, from another copy.

    Raises
    ------
    TransferError: a write failed. NotDurableError: some were left out, because the disk is to be spared.
    """
    core.leases.note_use()
    store.payload.write_again()
    _drop_damaged(core, store)
    pages = core.prefixes.pages()
    _name_stored(core, store, pages[core.table.states(pages, Tier.SSD) == VALID])
    kept = _within_cap(core)
    on_ssd = core.table.states(kept, Tier.SSD) == VALID
    missing = kept[~on_ssd]
    num_allowed = core.room.allow(len(missing))
    chosen = missing[len(missing) - num_allowed :]
    core.table.pin(kept[on_ssd], Tier.SSD)  # they stay; what is colder makes way
    try:
        for src in (Tier.RAM, Tier.GPU):
            _write_from(core, src, core.room.wanted(chosen))
    finally:
        core.table.unpin(kept[on_ssd], Tier.SSD)
    if num_left := len(missing) - num_allowed:
        why = store.guard.pause or Pause.BUDGET
        raise NotDurableError(num_left, len(kept), why.value)


def _drop_damaged(core: Core, store: ColdStore) -> None:
    """Drop copies that were found damaged when they were to be written again."""
    pages = core.prefixes.pages()
    pages = pages[core.table.states(pages, Tier.SSD) == VALID]
    slots = core.table.slots(pages, Tier.SSD)
    damaged = np.flatnonzero(store.payload.are_damaged(slots))
    if len(damaged):
        core.mover.quarantine.report(
            [Damage(Tier.SSD, int(pages[i]), int(slots[i]), None) for i in damaged]
        )
        core.mover.quarantine.drop_found()


def _within_cap(core: Core) -> Ids:
    """The published pages that the SSD tier has room for: those used last."""
    return core.prefixes.pages()[-core.table.counts(Tier.SSD).slots :]


def _are_durable(core: Core, store: ColdStore, pages: Ids) -> NDArray[np.bool_]:
    durable: NDArray[np.bool_] = core.table.states(pages, Tier.SSD) == VALID
    durable[durable] = store.index.is_durable(core.table.slots(pages[durable], Tier.SSD))
    return durable


def _reason(failure: TransferError | None) -> str:
    if failure is None:
        return NO_SLOT_LEFT
    if isinstance(failure, NotDurableError):
        return failure.reason
    return failure.strerror or str(failure)


def _write_from(core: Core, src: Tier, pages: Ids) -> None:
    """Write those of `pages` whose hottest copy is in `src`, and wait."""
    pages = pages[core.table.states(pages, Tier.SSD) == ABSENT]  # not those of a write that is late
    held = pages[core.best_tiers(pages) == src]
    core.table.pin(held, src)
    try:
        room = core.room.gain(Tier.SSD, len(held))
        wanted = core.room.wanted(held)
        # Where there is not room for all: those that others are found through.
        transfers = core.mover.submit(wanted[max(0, len(wanted) - room) :], src, Tier.SSD)
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
