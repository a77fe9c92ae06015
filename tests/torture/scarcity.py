"""Scarcity: memory that is refused while a manager starts, and a disk that somebody else fills while it works."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from tiermem import ConfigError, TransferError
from tiermem.device import host
from torture.actor import Actor
from torture.built import Built
from torture.content import Prompts
from torture.life import intact_pages, num_intact
from torture.setting import Setting
from torture.tally import Tally, ViolationError

REFUSALS = 6
OPERATIONS = 120
DISK_BYTES = 2 << 20
SLOTS = 100


def run_scarcity(seed: int, where: Path, tally: Tally) -> None:
    """Both, one after the other."""
    rng = random.Random(seed)
    refuse_memory(rng, where, tally)
    with small_disk(where / "disk") as disk:
        if disk is None:
            tally.faults["no small disk here"] += 1
        else:
            fill_disk(rng, disk, tally)


def refuse_memory(rng: random.Random, where: Path, tally: Tally) -> None:
    """The n-th block of host memory is refused: the start fails, nothing stays open, and the next one is whole."""
    built = Built.made(rng, where / "store")
    for _ in range(REFUSALS):
        number = rng.randint(1, 5)
        try:
            with refused(number):
                built.setting.open(built.path).close()
        except ConfigError:
            tally.faults["memory refused"] += 1
    with built.setting.open(built.path) as manager:
        actor = Actor(manager, built.prompts, rng, tally)
        for chain in built.chains:
            if num_intact(actor, chain.prompt, chain.salt) < len(chain.slots):
                raise ViolationError("pages are lost after a start without memory")
    tally.reopened += 1


@contextmanager
def refused(number: int) -> Iterator[None]:
    """Refuse the block of host memory that is asked for as this one, counted from 1."""
    grant, asked = host._map, 0

    def grant_or_refuse(num_bytes: int) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if asked == number:
            raise ConfigError(f"{num_bytes} bytes of host memory cannot be had")
        return grant(num_bytes)

    with patch.object(host, "_map", grant_or_refuse):
        yield


def fill_disk(rng: random.Random, disk: Path, tally: Tally) -> None:
    """Random work while the file system fills up and is freed again; then the store opens and is right."""
    setting = Setting(gpu=6, ram=rng.choice([0, 12]), ssd=SLOTS, engine="threads")
    prompts, ballast = Prompts.made(rng), disk / "of somebody else"
    manager = setting.open(disk / "store")
    actor = Actor(manager, prompts, rng, tally, strays=True, expected=(TransferError,))
    for _ in range(OPERATIONS):
        if rng.random() < 0.1:
            ballast.unlink(missing_ok=True)
            if rng.random() < 0.6:
                fill(ballast)
                tally.faults["full disk"] += 1
        actor.act()
    manager.close()
    ballast.unlink(missing_ok=True)
    with setting.open(disk / "store") as manager:
        intact_pages(Actor(manager, prompts, rng, tally))
        manager.check()
    tally.reopened += 1


def fill(path: Path) -> None:
    """Take all bytes that are free."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of DISK_BYTES of its own; None where it cannot be mounted."""
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(place)]
    try:
        mounted = (
            subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
        )
    except FileNotFoundError:
        mounted = False
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)
