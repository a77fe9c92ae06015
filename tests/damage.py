"""Damage: bytes of a TieredCache's stored pages are changed behind its back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiermem.integrations.transformers import TieredCache
from tiermem.pools import VALID, Tier
from tiermem.store_format import TRAILER_BYTES


def pages_only_in(cache: TieredCache, tier: Tier, row: int = 0) -> np.ndarray:
    """Which pages of a row have their hottest copy in `tier`: their numbers in the row."""
    core, pages = cache.manager._core, cache._rows.sequences[row].pages
    return np.flatnonzero(core.best_tiers(pages) == tier)


def damage_ssd(cache: TieredCache, numbers: np.ndarray, where: int = 0, row: int = 0) -> int:
    """Flip a bit of byte `where` of the SSD copies of these pages of a row; how many have one."""
    core, pages = cache.manager._core, cache._rows.sequences[row].pages[numbers]
    chosen = pages[core.table.states(pages, Tier.SSD) == VALID]
    root = Path(str(cache.stats().ssd_path))
    file = max(root.rglob("*"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as slots:
        for slot in core.table.slots(chosen, Tier.SSD).tolist():
            place = slot * (cache.layout.slot_bytes + TRAILER_BYTES) + where
            slots.seek(place)
            byte = slots.read(1)[0]
            slots.seek(place)
            slots.write(bytes([byte ^ 1]))
    return len(chosen)


def damage_ram(cache: TieredCache, numbers: np.ndarray, where: int = 0, row: int = 0) -> int:
    """As damage_ssd, of the copies in RAM."""
    core, pages = cache.manager._core, cache._rows.sequences[row].pages[numbers]
    chosen = pages[core.table.states(pages, Tier.RAM) == VALID]
    pool = core.pools[Tier.RAM]
    for slot in core.table.slots(chosen, Tier.RAM).tolist():
        pool.memory.tensor[slot * pool.slot_bytes + where] ^= 1
    return len(chosen)
