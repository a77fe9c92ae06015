"""Faults: calls of the operating system that fail, are cut short, are slow or hang, under random work.

Whatever happens, no byte is wrong, every call returns within its deadline and a second, and the store that is left
holds what flush() had returned for.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from tiermem import TierMemError, TransferError, _core
from tiermem._core import EngineKind, FaultOps, FileCall
from torture.actor import Actor
from torture.content import SALTS, Prompts
from torture.life import intact_pages, matched_pages
from torture.setting import AMPLE, Setting
from torture.tally import Tally, ViolationError

OPERATIONS = 60
TIMEOUT_S = 0.4
SLOW_S = 0.1
MARGIN_S = float(os.environ.get("TORTURE_MARGIN_S", "1"))
"""Beyond its deadline, until a call counts as late. A test on a busy machine gives more."""
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EINTR, errno.EAGAIN)
HARMLESS = ("short", "EINTR", "EAGAIN", "slow")
"""Faults that nobody above the I/O engine may notice."""


@contextmanager
def under(faults: FaultOps) -> Iterator[None]:
    """Every engine and slot file that is opened within makes its system calls through `faults`."""

    def make_engine(kind: EngineKind = EngineKind.THREADS, **options: int) -> _core.IoEngine:
        return engine(EngineKind.THREADS, num_threads=2, piece_bytes=16384, faults=faults)

    engine, file = _core.IoEngine, _core.BlockFile
    with patch.multiple(_core, IoEngine=make_engine, BlockFile=partial(file, faults=faults)):
        yield


@dataclass(slots=True)
class Planner:
    """Plans faults for the calls to come, one at a time; `hanging` while calls are held."""

    faults: FaultOps
    rng: random.Random
    tally: Tally
    kinds: tuple[str, ...]
    hanging: bool = False

    def plan(self) -> None:
        """One fault of one kind, within the next few calls."""
        kind = self.rng.choice(self.kinds)
        call = self.rng.choice([FileCall.READ, FileCall.WRITE, FileCall.WRITE])
        first = self.faults.num_calls(call) + self.rng.randint(1, 6)
        count = self.rng.choice([1, 1, 2, 8])
        if kind == "short":
            self.faults.shorten(call, first, self.rng.choice([1, 511, 4096, 5000]), count)
        elif kind == "slow":
            self.faults.hold(call, first, count)
            threading.Timer(SLOW_S, self.faults.release).start()
        elif kind == "hang":
            self.faults.hold(call, first, count)
            self.hanging = True
        elif kind == "sync":
            number = self.faults.num_calls(FileCall.SYNC) + 1
            self.faults.fail(FileCall.SYNC, number, errno.EIO)
        else:
            self.faults.fail(call, first, getattr(errno, kind), count)
        self.tally.faults[kind] += 1

    def release(self) -> None:
        """Let what hangs go on."""
        self.faults.release()
        self.hanging = False


def run_faults(seed: int, where: Path, tally: Tally) -> None:
    """Random work with faults; then the store is opened without them and checked."""
    rng = random.Random(seed)
    setting = replace(Setting.made(rng), ssd=AMPLE, engine="threads", timeout_s=TIMEOUT_S)
    kinds = rng.choice(
        [
            HARMLESS,
            ("EIO", "ENOSPC", "EROFS", "sync"),
            ("hang",),
            (*HARMLESS, "EIO", "hang", "sync"),
        ]
    )
    prompts, faults = Prompts.made(rng), FaultOps()
    planner = Planner(faults, rng, tally, kinds)
    is_harmless = kinds is HARMLESS
    with under(faults):
        manager = setting.open(where / "store")
    expected: tuple[type[TierMemError], ...] = () if is_harmless else (TransferError,)
    limit_s = TIMEOUT_S + MARGIN_S
    actor = Actor(manager, prompts, rng, tally, expected=expected, limit_s=limit_s)
    covered = [[0] * len(SALTS) for _ in prompts.tokens]
    for number in range(OPERATIONS):
        if number > 5 and not planner.hanging and rng.random() < 0.3:
            planner.plan()
        elif planner.hanging and rng.random() < 0.1:
            planner.release()
        if rng.random() < 0.08:
            covered = _flush(actor, covered)
        else:
            actor.act()
    _close(actor)
    planner.release()
    _check(setting, where, prompts, covered, tally)


def _flush(actor: Actor, covered: list[list[int]]) -> list[list[int]]:
    """What is on the disk for sure after a flush, if that returned."""
    matched = matched_pages(actor)
    try:
        actor.do_flush()
    except actor.expected:
        actor.tally.refused += 1
        return covered
    return matched


def _close(actor: Actor) -> None:
    with actor.timed("close"):
        actor.manager.close()


def _check(
    setting: Setting, where: Path, prompts: Prompts, covered: list[list[int]], tally: Tally
) -> None:
    """Reopen without faults: nothing is wrong, and nothing lost that a flush had returned for."""
    start_s = time.monotonic()
    manager = replace(setting, timeout_s=20.0).reopen(where / "store")
    tally.open_s = max(tally.open_s, time.monotonic() - start_s)
    tally.reopened += 1
    actor = Actor(manager, prompts, random.Random(0), tally)
    intact = intact_pages(actor)
    lost = sum(
        max(0, want - have)
        for wanted, found in zip(covered, intact, strict=True)
        for want, have in zip(wanted, found, strict=True)
    )
    manager.close()
    tally.lost_pages += lost
    if lost:
        raise ViolationError(f"{lost} pages are lost that flush() had returned for")
