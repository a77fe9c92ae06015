"""Damage: bytes of a TieredCache's stored pages are changed behind its back, also while a model writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tiny_models import PAGE_TOKENS, tiers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

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


class Vandal(LogitsProcessor):
    """Does something to the cache before some of the choices of tokens, and changes no score."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self._act = act
        self.count = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._act(self.count)
        self.count += 1
        return scores


def small_cache(
    model: PreTrainedModel, path: Path, gpu_pages: int = 4, ram_pages: int = 4
) -> TieredCache:
    """Few hot and warm pages, the rest on disk."""
    return TieredCache(model, tiers(model, gpu_pages, ram_pages, path), page_tokens=PAGE_TOKENS)


def damage(cache: TieredCache, numbers: np.ndarray, where: int = 0, row: int = 0) -> int:
    """As damage_ssd, of those that the row has; at least one."""
    pages = cache._rows.sequences[row].pages
    hurt = damage_ssd(cache, numbers[numbers < len(pages)], where, row)
    assert hurt
    return hurt


def damage_cold(cache: TieredCache, *chosen: int, where: int = 0, row: int = 0) -> int:
    """Damage some of the pages of a row that are on the SSD alone: 0 for the first; the first one's number."""
    cold = pages_only_in(cache, Tier.SSD, row)
    damage(cache, cold[list(chosen)], where, row)
    return int(cold[chosen[0]])


def disturbed(
    model: PreTrainedModel,
    cache: TieredCache,
    ids: torch.Tensor,
    act: Callable[[int], None],
    **options: object,
) -> torch.Tensor:
    """What is generated while `act` happens between tokens."""
    tokens: torch.Tensor = model.generate(
        ids, past_key_values=cache, logits_processor=LogitsProcessorList([Vandal(act)]), **options
    )
    cache.manager.check()
    return tokens
