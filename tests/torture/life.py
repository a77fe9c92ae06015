"""Life: what a process does with a store until it is killed, or until it has closed it."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiermem import CorruptPageError, TierManager
from torture.actor import Actor
from torture.content import PAGE, SALTS, Prompts
from torture.oracle import COUNTED, Oracle, Phase
from torture.setting import Setting
from torture.tally import Tally, ViolationError

OPERATIONS = 40


@dataclass(slots=True)
class Life:
    """One process' part: opens the store, checks what the one before left, works, closes.

    `report` is told each phase by one byte. Nothing of what it counts is lost when it is killed.
    """

    setting: Setting
    path: Path
    prompts: Prompts
    oracle: Oracle
    report: int
    seed: int

    def run(self) -> None:
        """All of it; raises ViolationError where the store is not what it must be."""
        tally, rng = Tally(), random.Random(self.seed)
        self.enter(Phase.OPENING)
        start_s = time.monotonic()
        manager = self.setting.open(self.path)
        figures = self.oracle.figures
        figures["open_s"] = max(figures["open_s"], time.monotonic() - start_s)
        figures["has_opened"] += 1
        strays = not self.setting.is_ample
        actor = Actor(manager, self.prompts, rng, tally, strays=strays)
        self.enter(Phase.CHECKING)
        try:
            self.check(actor)
            self.enter(Phase.WORKING)
            for _ in range(rng.randint(1, OPERATIONS)):
                self.work(actor)
            self.enter(Phase.CLOSING)
            self.close(actor)
            self.enter(Phase.CLOSED)
        finally:
            self.note(tally)

    def enter(self, phase: Phase) -> None:
        """Tell the parent."""
        os.write(self.report, bytes([phase]))

    def note(self, tally: Tally) -> None:
        """Count what was done since the last note, in memory that outlives this process."""
        figures = self.oracle.figures
        for name in COUNTED:
            figures[name] += getattr(tally, name)
            setattr(tally, name, 0)
        figures["call_s"] = max(figures["call_s"], tally.call_s)

    # ---- what must be there ------------------------------------------------------------------------

    def check(self, actor: Actor) -> None:
        """Nothing that a flush had returned for is lost, and every byte found is right."""
        figures = self.oracle.figures
        lost = max(0, int(figures["least_pages"]) - actor.manager.stats().published_pages)
        found = np.array(intact_pages(actor))
        lost += int(np.maximum(0, figures["covered"] - found).sum())
        figures["covered"][:] = found if self.setting.is_ample else 0
        figures["least_pages"] = 0
        actor.tally.lost_pages += lost
        self.note(actor.tally)
        if lost:
            raise ViolationError(f"{lost} pages are lost that flush() had returned for")

    # ---- work --------------------------------------------------------------------------------------

    def work(self, actor: Actor) -> None:
        """One operation; around a flush, what it promises is noted."""
        figures = self.oracle.figures
        name = actor.rng.choices(("flush", "other"), (1, 9))[0]
        if name == "other":
            figures["least_pages"] = 0
            actor.act()
        elif self.setting.is_ample:
            covered = matched_pages(actor)
            self.flush(actor)
            figures["covered"][:] = covered
        else:
            actor.close_all()
            least = min(actor.manager.stats().published_pages, self.setting.ssd)
            self.flush(actor)
            figures["least_pages"] = least
        self.note(actor.tally)

    def flush(self, actor: Actor) -> None:
        """Flush, and tell the parent before and after."""
        self.enter(Phase.FLUSHING)
        actor.do_flush()
        self.enter(Phase.FLUSHED)

    def close(self, actor: Actor) -> None:
        """Close, which is a flush too."""
        figures = self.oracle.figures
        if self.setting.is_ample:
            covered = matched_pages(actor)
            actor.manager.close()
            figures["covered"][:] = covered
        else:
            figures["least_pages"] = 0
            least = min(actor.manager.stats().published_pages, self.setting.ssd)
            actor.manager.close()
            figures["least_pages"] = least


def matched_pages(actor: Actor) -> list[list[int]]:
    """For each prompt and salt, how many leading pages are published."""
    return [
        [num_matched(actor.manager, prompt, salt) for salt in SALTS]
        for prompt in actor.prompts.tokens
    ]


def intact_pages(actor: Actor) -> list[list[int]]:
    """The same, after every byte of them was compared."""
    return [[num_intact(actor, prompt, salt) for salt in SALTS] for prompt in actor.prompts.tokens]


def num_matched(manager: TierManager, prompt: tuple[int, ...], salt: bytes) -> int:
    """How many leading pages of a prompt are published."""
    sequence = manager.open_sequence(prompt, salt=salt)
    found = sequence.num_tokens // PAGE
    sequence.close()
    return found


def num_intact(actor: Actor, prompt: tuple[int, ...], salt: bytes) -> int:
    """The same, after every byte of them was compared; damaged copies that were refused are counted."""
    for _ in range(len(prompt) // PAGE + 1):  # each time, it ends earlier
        sequence = actor.manager.open_sequence(prompt, salt=salt)
        try:
            actor.compare_tokens(sequence, salt, prompt[: sequence.num_tokens])
            return sequence.num_tokens // PAGE
        except CorruptPageError as error:
            actor.tally.corrupt_found += len(error.pages)
        finally:
            sequence.close()
    raise ViolationError("pages that were found damaged are attached again and again")
