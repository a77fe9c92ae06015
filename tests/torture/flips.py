"""Flips: single bits of a store's files and of pinned memory that are not what was written.

A flipped bit is never served: the chains that it cuts end before it, and every other page is served as it was.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

from world import LAYOUT

from tiermem import TransferError
from tiermem.pools import VALID, Tier
from tiermem.store_format import TRAILER_BYTES
from torture.actor import Actor
from torture.built import Built
from torture.content import Prompts
from torture.life import num_intact
from torture.setting import AMPLE, Setting
from torture.tally import Tally, ViolationError

ROUNDS = 6
"""Copies of one store that are damaged; each in up to FLIPS slots."""
FLIPS = 40
MEMORY_OPERATIONS = 120
STRIDE = LAYOUT.slot_bytes + TRAILER_BYTES
TRAILER_FIELDS_BYTES = 512
"""Of a trailer, from its start: about what has a meaning; the rest of its bits are flipped as well."""


def run_flips(seed: int, where: Path, tally: Tally) -> None:
    """Flip one bit in each of some slots; what is served then is exactly what is intact."""
    rng = random.Random(seed)
    built = Built.made(rng, where / "built")
    slots = sorted({slot for chain in built.chains for slot in chain.slots})
    for _ in range(ROUNDS):
        path = built.copied(where / "copy")
        damaged = set(rng.sample(slots, rng.randint(1, min(FLIPS, len(slots)))))
        flip_slots(path / "slots", damaged, rng, tally)
        with built.setting.open(path) as manager:
            actor = Actor(manager, built.prompts, rng, tally)
            for chain in rng.sample(built.chains, len(built.chains)):
                intact = num_intact(actor, chain.prompt, chain.salt)
                good = [slot not in damaged for slot in chain.slots]
                wanted = good.index(False) if False in good else len(good)
                if intact > wanted:
                    raise ViolationError(f"page {wanted} of a chain was served with a flipped bit")
                if intact < wanted:
                    tally.lost_pages += wanted - intact
                    raise ViolationError(
                        f"{wanted - intact} pages were not damaged, but not served"
                    )
            manager.check()
        tally.reopened += 1


def flip_slots(path: Path, slots: set[int], rng: random.Random, tally: Tally) -> None:
    """Flip one bit in each of `slots`: in its page, or in its trailer."""
    with path.open("r+b") as file:
        for slot in sorted(slots):
            place, start, length = rng.choice(
                [
                    ("payload", 0, LAYOUT.page_bytes),
                    ("trailer", LAYOUT.slot_bytes, TRAILER_FIELDS_BYTES),
                    ("trailer", LAYOUT.slot_bytes, TRAILER_BYTES),
                ]
            )
            offset = slot * STRIDE + start + rng.randrange(length)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
            tally.flips[place] += 1


def run_index_flips(seed: int, where: Path, tally: Tally) -> None:
    """Damage the index; whatever is found then is right, and nothing that was durable is lost."""
    rng = random.Random(seed)
    built = Built.made(rng, where / "built")
    for _ in range(ROUNDS):
        path = built.copied(where / "copy")
        damage_index(path / "index" / "data.mdb", rng, tally)
        for _opening in range(2):
            with built.setting.open(path) as manager:
                actor = Actor(manager, built.prompts, rng, tally)
                for chain in rng.sample(built.chains, len(built.chains)):
                    intact = num_intact(actor, chain.prompt, chain.salt)
                    tally.index_lost += len(chain.slots) - intact
                manager.check()
            tally.reopened += 1


def damage_index(path: Path, rng: random.Random, tally: Tally) -> None:
    """Flip bits of the index' file, cut it, or write zeros or noise over part of it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["index bits", "index bits", "index cut", "index zeros", "index noise"])
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 64, 512, 4096]), len(data) - start)
    if kind == "index bits":
        for _ in range(rng.choice([1, 1, 4, 32])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "index cut":
        del data[start:]
    else:
        data[start : start + length] = (
            bytes(length) if kind == "index zeros" else rng.randbytes(length)
        )
    path.write_bytes(data)
    tally.flips[kind] += 1


def run_memory_flips(seed: int, where: Path, tally: Tally) -> None:
    """Flip bits of pages in pinned memory while they are worked with: a miss or an error, never a wrong byte."""
    rng = random.Random(seed)
    setting = Setting(
        gpu=rng.choice([3, 6]),
        ram=rng.choice([12, 40]),
        ssd=rng.choice([20, AMPLE]),
        cpu_share=rng.choice([0.0, 0.5, 1.0]),
        verify_ram="always",
    )
    manager = setting.open(where / "store")
    expected = (TransferError,)
    actor = Actor(manager, Prompts.made(rng), rng, tally, strays=True, expected=expected)
    for _ in range(MEMORY_OPERATIONS):
        if rng.random() < 0.25:
            flip_memory(actor, tally)
        actor.act()
    actor.drop_damaged()
    tally.corrupt_found += manager.stats().corrupt_pages
    manager.close()


def flip_memory(actor: Actor, tally: Tally) -> None:
    """Flip one bit of the RAM copy of some page of some sequence, where there is one."""
    known = actor.pick()
    if known is None:
        return
    core = actor.manager._core
    pages = known.sequence.pages
    slots = core.table.slots(pages, Tier.RAM)[core.table.states(pages, Tier.RAM) == VALID]
    if len(slots) and Tier.RAM in core.pools:
        address = int(core.pools[Tier.RAM].addresses(slots)[actor.rng.randrange(len(slots))])
        place = ctypes.c_uint8.from_address(address + actor.rng.randrange(LAYOUT.page_bytes))
        place.value ^= 1 << actor.rng.randrange(8)
        tally.flips["memory"] += 1
