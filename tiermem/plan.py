"""Plan: where each page of a step's sequences is read and written.

A page is either *hot* (read and written in its slot of the hot pool), *streamed* (old, read layer by layer
through the ring), *attended in RAM* (old, read by the CPU where it lies: see `ram_attention`) or
*write-through* (new, filled layer by layer in a lower tier, because the hot tier has no slot for it). Pages that
a step writes are new or open; a sealed last page that must grow is continued in a new page that starts with its
bytes (`base`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tiermem.core import Core
from tiermem.device.protocol import Slices
from tiermem.lease import Lease
from tiermem.page_sums import Check
from tiermem.pools import FILLING, Ids, Slots, Tier
from tiermem.sequence import Sequence
from tiermem.transfer import Transfer

NO_PAGE = 0
"""Not an id: where a write-through page has no base."""
NO_PAGES: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Copies of `ids` in `tier`, each held once; compared by identity."""

    ids: Ids
    tier: Tier


@dataclass(slots=True, eq=False)
class Share:
    """One sequence's part of a step: `new_tokens` rows from `first_row` on.

    `pages` are all pages after the step; the ones from `first_written` on are written by it. `bases` names, for
    each written page, the page whose bytes it continues, or NO_PAGE. `homes` is the tier each page is read and
    written in during the step: GPU for hot ones.
    """

    sequence: Sequence
    new_tokens: int
    first_row: int
    pages: Ids
    first_written: int
    bases: Ids
    homes: Slots
    replaced: Ids

    @property
    def is_hot(self) -> bool:
        """Whether every page is read and written in the hot pool."""
        return bool((self.homes == Tier.GPU).all())

    @property
    def past_tokens(self) -> int:
        """Tokens stored before the step."""
        return self.sequence.num_tokens

    @property
    def written(self) -> Ids:
        """The pages that the step writes."""
        return self.pages[self.first_written :]


@dataclass(slots=True, eq=False)
class Plan:
    """Shares of a step and what it holds: pins until the step was reaped, created pages until it failed.

    `checks` are of bytes that were copied for it, beside the chunks'; `born` of pages it sealed, kept until the
    device has summed them. `is_resident` says that every page is hot, old and written.
    """

    shares: list[Share] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    created: list[Ids] = field(default_factory=list)
    promotions: list[Transfer] = field(default_factory=list)
    reads: dict[Tier, int] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    born: Slices | None = None
    is_resident: bool = False

    @property
    def num_rows(self) -> int:
        """New tokens of all sequences."""
        return sum(share.new_tokens for share in self.shares)

    def pin(self, core: Core, ids: Ids, tier: Tier) -> Pin:
        """Hold copies until `release_pins`, or until `unpin` of what this returns."""
        core.table.pin(ids, tier)
        pin = Pin(ids, tier)
        self.pins.append(pin)
        return pin

    def unpin(self, core: Core, pin: Pin) -> None:
        """Let go of some copies before the step has begun."""
        self.pins.remove(pin)
        core.table.unpin(pin.ids, pin.tier)

    def release_pins(self, core: Core) -> None:
        """The step was reaped, or never began."""
        while self.pins:
            self.unpin(core, self.pins[-1])
        while self.leases:
            self.leases.pop().end_use()

    def discard_created(self, core: Core) -> None:
        """The step failed: its new pages die. No pin of the step may be left."""
        while self.created:
            ids = self.created.pop()
            for tier in (Tier.RAM, Tier.SSD):
                core.table.abort(ids[core.table.states(ids, tier) == FILLING], tier)
            core.table.release(ids)
