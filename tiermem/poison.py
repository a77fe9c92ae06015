"""Poison: a debug mode that fills memory nobody owns with a pattern and finds out who wrote to it.

A slot that becomes free is filled with 0xFF, a NaN in every dtype of K and V, so that bytes that are used after
their end, or before anyone wrote them, show. When the slot is taken again the pattern must still be there. Slow:
every slot that changes hands is written and read once more, and the host waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from tiermem import _core
from tiermem.device.protocol import Device
from tiermem.errors import InvariantError
from tiermem.pools import NO_SLOT, Ids, SlotPool, Slots, Tier
from tiermem.store import ColdStore

POISON_BYTE = 0xFF


class SlotMemory(Protocol):
    """Slots that can be filled and looked at."""

    def fill(self, slots: Sequence[int]) -> None: ...

    def written_at(self, slot: int) -> int | None:
        """The first byte of a filled slot that is not as it was filled; None where all are."""


class PoolSlots:
    """Of a pool in memory; everything that uses the slots has ended."""

    def __init__(self, pool: SlotPool, device: Device) -> None:
        num_bytes = pool.num_slots * pool.slot_bytes
        self._rows = pool.memory.tensor[:num_bytes].view(pool.num_slots, pool.slot_bytes)
        self._device = device

    def fill(self, slots: Sequence[int]) -> None:
        """Fill them, before anything that is enqueued from now on."""
        self._rows[torch.as_tensor(list(slots), device=self._rows.device)] = POISON_BYTE
        self._device.compute_stream().synchronize()

    def written_at(self, slot: int) -> int | None:
        """As the protocol says."""
        self._device.compute_stream().synchronize()
        places = (self._rows[slot] != POISON_BYTE).nonzero()
        return int(places[0]) if len(places) else None


class StoreSlots:
    """Of a store's slot file, through the page cache."""

    def __init__(self, store: ColdStore) -> None:
        self._store = store
        self._pattern = bytes([POISON_BYTE]) * store.slot_stride

    def fill(self, slots: Sequence[int]) -> None:
        """Fill them, trailers included."""
        with self._open(os.O_WRONLY) as file:
            for slot in slots:
                os.pwrite(file.fileno(), self._pattern, slot * self._store.slot_stride)

    def written_at(self, slot: int) -> int | None:
        """As the protocol says."""
        with self._open(os.O_RDONLY) as file:
            stride = self._store.slot_stride
            found = np.frombuffer(os.pread(file.fileno(), stride, slot * stride), dtype=np.uint8)
        places = np.flatnonzero(found != POISON_BYTE)
        return int(places[0]) if len(places) else None

    def _open(self, flags: int) -> Any:
        mode = "wb" if flags == os.O_WRONLY else "rb"
        name = self._store.path / "slots"
        return os.fdopen(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC), mode, buffering=0)


class Poison:
    """Which slots of which memory are filled; `watch` names the memory."""

    def __init__(self) -> None:
        self._memories: dict[str, SlotMemory] = {}
        self._filled: dict[str, set[int]] = {}

    def watch(self, name: str, memory: SlotMemory) -> None:
        """Look after the slots of `memory`; none is filled so far."""
        self._memories[name] = memory
        self._filled[name] = set()

    def note_free(self, name: str, slots: Iterable[int]) -> None:
        """Nobody owns these slots any more, or yet."""
        new = list(slots)
        if new and name in self._memories:
            self._memories[name].fill(new)
            self._filled[name].update(new)

    def note_taken(self, name: str, slots: Iterable[int]) -> None:
        """These slots have an owner now.

        Raises
        ------
        InvariantError: somebody wrote to one while it was free.
        """
        filled = self._filled.get(name, set())
        for slot in filled.intersection(slots):
            filled.discard(slot)
            offset = self._memories[name].written_at(slot)
            if offset is not None:
                raise InvariantError(
                    f"{name}: slot {slot} was written to at byte {offset} while it was free"
                )


class PoisonedTable:
    """A page table that tells `poison` whose slots become free and are taken; all else is the table's own."""

    def __init__(self, table: _core.PageTable, poison: Poison) -> None:
        self._table = table
        self._poison = poison
        self._slots: dict[Tier, dict[int, int]] = {tier: {} for tier in Tier}
        for tier in Tier:
            if tier != Tier.SSD:  # what a file had before is not known
                poison.note_free(tier.name, range(table.counts(tier).slots))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def create_stored(self, tier: int, slots: Slots) -> Ids:
        """As the table's."""
        ids = self._table.create_stored(tier, slots)
        self._take(ids, Tier(tier), slots)
        return ids

    def reserve(self, ids: Ids, tier: int) -> Slots:
        """As the table's."""
        slots = self._table.reserve(ids, tier)
        self._take(ids, Tier(tier), slots)
        return slots

    def release(self, ids: Ids) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.release(ids))

    def unpublish(self, ids: Ids) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.unpublish(ids))

    def commit(self, ids: Ids, tier: int) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.commit(ids, tier))

    def abort(self, ids: Ids, tier: int) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.abort(ids, tier))

    def discard(self, ids: Ids, tier: int) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.discard(ids, tier))

    def unpin(self, ids: Ids, tier: int) -> Ids:
        """As the table's."""
        return self._settled(ids, self._table.unpin(ids, tier))

    def drop(self, ids: Ids, tier: int) -> None:
        """As the table's."""
        self._table.drop(ids, tier)
        self._settled(ids, ids[:0])

    def evict(self, tier: int, count: int) -> tuple[Ids, Ids]:
        """As the table's."""
        dropped, dead = self._table.evict(tier, count)
        self._settled(dropped, dead)
        return dropped, dead

    def evict_redundant(self, tier: int, count: int) -> tuple[Ids, Ids]:
        """As the table's."""
        dropped, dead = self._table.evict_redundant(tier, count)
        self._settled(dropped, dead)
        return dropped, dead

    def _take(self, ids: Ids, tier: Tier, slots: Slots) -> None:
        self._slots[tier].update(zip(ids.tolist(), slots.tolist(), strict=True))
        self._poison.note_taken(tier.name, slots.tolist())

    def _settled(self, ids: Ids, dead: Ids) -> Ids:
        """`dead`; slots that these pages do not have any more are free."""
        for tier, slots in self._slots.items():
            had = [page for page in {*ids.tolist(), *dead.tolist()} if page in slots]
            gone = [page for page in had if not self._has(page, tier)]
            self._poison.note_free(tier.name, [slots.pop(page) for page in gone])
        return dead

    def _has(self, page: int, tier: Tier) -> bool:
        ids = np.array([page], dtype=np.int64)
        return bool(self._table.alive(ids)[0]) and int(self._table.slots(ids, tier)[0]) != NO_SLOT
