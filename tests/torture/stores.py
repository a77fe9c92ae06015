"""Stores that are not what they should be: cut, emptied, foreign, from the future, half made, wanted by many.

Each is refused with ConfigError, or opened without a wrong byte and left in a state that opens again.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tiermem import ConfigError, TransferError
from torture.actor import Actor
from torture.built import Built, Chain
from torture.flips import STRIDE
from torture.life import num_intact
from torture.process import FAILED, Child
from torture.tally import Tally, ViolationError

ROUNDS = 12
NUM_OPENERS = 5
HOLD_S = 0.02
LIMIT_S = 30.0

Damage = Callable[[Path, random.Random], None]


def cut_slots(path: Path, rng: random.Random) -> None:
    """The slot file ends early."""
    os.truncate(path / "slots", rng.randrange((path / "slots").stat().st_size))


def lose_files(path: Path, rng: random.Random) -> None:
    """Some of the files are not there (any more, or yet)."""
    files = [file for file in path.rglob("*") if file.is_file()]
    for file in rng.sample(files, rng.randint(1, len(files))):
        file.unlink()


def exchange_slots(path: Path, rng: random.Random) -> None:
    """Whole slots, trailers and all, lie in each other's place."""
    data = (path / "slots").read_bytes()
    slots = [data[at : at + STRIDE] for at in range(0, len(data), STRIDE)]
    first, second = rng.randrange(len(slots)), rng.randrange(len(slots))
    slots[first], slots[second] = slots[second], slots[first]
    (path / "slots").write_bytes(b"".join(slots))


def zero_slots(path: Path, rng: random.Random) -> None:
    """A run of bytes is zeros: blocks that were never written before the power went."""
    size = (path / "slots").stat().st_size
    start = rng.randrange(size)
    with (path / "slots").open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(size - start, rng.choice([512, 4096, 65536]))))


def change_header(path: Path, rng: random.Random) -> None:
    """One value of the header is another one."""
    header = json.loads((path / "header.json").read_text())
    key = rng.choice(list(header))
    header[key] = rng.choice(
        [None, -1, 0, 2**70, "", "x" * 5000, [], {}, 1e308, True, dict(header)]
    )
    (path / "header.json").write_text(json.dumps(header))


def spoil_header(path: Path, rng: random.Random) -> None:
    """The header is cut, or one of its bits is flipped, or it is noise."""
    data = bytearray((path / "header.json").read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data[:] = rng.randbytes(rng.choice([1, 100, 100_000]))
    (path / "header.json").write_bytes(data)


def replace_file(path: Path, rng: random.Random) -> None:
    """A directory, a link or a pipe is where a file should be."""
    files = [file for file in path.rglob("*") if file.is_file()]
    file = rng.choice(files)
    file.unlink()
    kind = rng.randrange(3)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.symlink_to(path.parent / "elsewhere")
    else:
        os.mkfifo(file)


def be_foreign(path: Path, rng: random.Random) -> None:
    """A directory of something else."""
    shutil.rmtree(path)
    path.mkdir()
    (path / rng.choice(["slots", "thesis.tex", "header.jso"])).write_bytes(b"important")


DAMAGES: tuple[Damage, ...] = (
    cut_slots, lose_files, exchange_slots, zero_slots, change_header, spoil_header, replace_file, be_foreign,
)  # fmt: skip


def run_stores(seed: int, where: Path, tally: Tally) -> None:
    """Copies of one store, each damaged in one way and opened twice; then many processes want one."""
    rng = random.Random(seed)
    built = Built.made(rng, where / "built")
    show_no_salt(built)
    for _ in range(ROUNDS):
        path = built.copied(where / "copy")
        damage = rng.choice(DAMAGES)
        damage(path, rng)
        tally.stores[damage.__name__] += 1
        before = sorted(file.name for file in path.iterdir())
        if not open_and_read(built, path, rng, tally):
            after = sorted(file.name for file in path.iterdir())
            if damage is be_foreign and after != before:
                raise ViolationError(f"a foreign directory was changed: {before}, then {after}")
        elif not open_and_read(built, path, rng, tally):
            raise ViolationError(f"{damage.__name__}: the store was opened once, then refused")
    open_at_once(built, where / "built", tally)


def show_no_salt(built: Built) -> None:
    """The salts of what is stored are in no file of it."""
    for file in built.path.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if any(chain.salt and chain.salt in data for chain in built.chains):
            raise ViolationError(f"{file.name} shows a salt")


def open_and_read(built: Built, path: Path, rng: random.Random, tally: Tally) -> bool:
    """Whether the store was opened; then every byte that it serves was right."""
    try:
        manager = built.setting.open(path)
    except ConfigError:
        return False
    with manager:
        actor = Actor(manager, built.prompts, rng, tally)
        for chain in rng.sample(built.chains, len(built.chains)):
            tally.refused += not read_chain(actor, chain)
        manager.check()
    tally.reopened += 1
    return True


def read_chain(actor: Actor, chain: Chain) -> bool:
    """Compare what is served of one chain; whether all that is attached could be read."""
    try:
        num_intact(actor, chain.prompt, chain.salt)
    except TransferError:
        return False
    return True


def open_at_once(built: Built, path: Path, tally: Tally) -> None:
    """Of processes that open one store at the same time, one at a time has it; the others hear so."""
    owners = mmap.mmap(-1, 1)
    told = mmap.mmap(-1, 4096)

    def body(report: int) -> None:
        try:
            manager = built.setting.open(path)
        except ConfigError as error:
            if "one owns a store" not in str(error):
                raise
            return
        with manager:
            owners[0] += 1
            time.sleep(HOLD_S)
            if owners[0] != 1:
                raise ViolationError(f"{owners[0]} processes own one store")
            owners[0] -= 1

    def tell(text: str) -> None:
        told[:2000] = text.encode()[-2000:].ljust(2000, b"\0")

    gc.collect()  # closed managers still have threads, which children cannot end
    children = [Child.start(body, tell) for _ in range(NUM_OPENERS)]
    for child in children:
        status = child.wait(LIMIT_S)
        if status is None:
            tally.hangs += 1
            raise ViolationError(f"an opening hangs\n{child.explain_hang()}")
        text = told[:2000].rstrip(b"\0").decode() if status == FAILED else child.hang_text()
        child.forget()
        if status != 0:
            raise ViolationError(f"an opening ended with status {status}\n{text}")
    tally.stores["opened_at_once"] += NUM_OPENERS
