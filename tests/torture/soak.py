"""Soak: mixed sequences for a long time, with flat memory and bytes on the disk that never exceed the cap."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil

from torture.actor import Actor
from torture.content import Prompts
from torture.setting import Setting
from torture.tally import Tally, ViolationError

SOAK_S = 6.0
"""Where nobody says how long."""
REOPEN_AFTER = 3000
"""Operations, about, until the manager is closed and another one opened."""
NUM_SAMPLES = 600
"""At most, of resident memory: what is alive, since garbage and free pages are given back before each."""
DISK_S = 0.02
"""Between looks at the disk."""
WARM_SHARE = 0.3
"""Of the samples, from the start, that are left out: caches of interpreter and allocator fill up first."""
NUM_BLOCKS = 12
"""Samples near each other are alike: the line is fitted to means of so many blocks."""
ERRORS = 4.0
"""A slope so many standard errors above zero is growth."""
LEAST_GROWTH_BYTES = 8 << 20
"""Over the run: less is the warming up of allocator and tables in a short one, whatever the fit says."""


@dataclass(slots=True)
class Samples:
    """Resident bytes after so many operations."""

    operations: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def slope(self) -> tuple[float, float, float]:
        """Bytes an operation, their standard error, and the growth over all operations, bytes."""
        start = int(len(self.operations) * WARM_SHARE)
        blocks = [
            np.array_split(np.array(values[start:], dtype=np.float64), NUM_BLOCKS)
            for values in (self.operations, self.resident)
        ]
        x, y = (np.array([block.mean() for block in part]) for part in blocks)
        x_mean = x.mean()
        spread = ((x - x_mean) ** 2).sum()
        slope = float(((x - x_mean) * (y - y.mean())).sum() / spread)
        residuals = y - y.mean() - slope * (x - x_mean)
        error = float(np.sqrt((residuals**2).sum() / (NUM_BLOCKS - 2) / spread))
        return slope, error, slope * float(self.operations[-1] - self.operations[start])


def run_soak(seed: int, where: Path, tally: Tally, seconds: float = SOAK_S) -> None:
    """Work for `seconds`; raises ViolationError where memory grows or the disk holds more than the cap."""
    rng, path = random.Random(seed), where / "store"
    setting = replace(Setting.made(rng), ssd=rng.randint(40, 120))
    samples = Samples()
    start_s = time.monotonic()
    end_s, disk_s, sample_s, reopen_at = start_s + seconds, 0.0, 0.0, REOPEN_AFTER
    actor = Actor(setting.open(path), Prompts.made(rng), rng, tally, strays=True)
    while time.monotonic() < end_s:
        actor.act()
        if tally.operations >= reopen_at:
            reopen_at += rng.randint(1, 2 * REOPEN_AFTER)
            actor.close_all()
            actor.manager.close()
            note_disk(path, setting, tally)
            actor.manager = setting.open(path)
            tally.reopened += 1
        if time.monotonic() >= disk_s:
            disk_s = time.monotonic() + DISK_S
            note_disk(path, setting, tally)
        if time.monotonic() >= sample_s:
            sample_s = time.monotonic() + max(DISK_S, seconds / NUM_SAMPLES)
            samples.operations.append(tally.operations)
            samples.resident.append(live_bytes())
    actor.manager.close()
    slope, error, growth = samples.slope()
    tally.slopes.append((slope, error))
    if slope > ERRORS * error and growth > LEAST_GROWTH_BYTES:
        raise ViolationError(
            f"resident memory grows by {slope:.0f} ± {error:.0f} bytes an operation, {growth:.0f} in all"
        )


def live_bytes() -> int:
    """Resident memory of this process without what may be given back at any time."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def note_disk(path: Path, setting: Setting, tally: Tally) -> None:
    """Compare what the directory takes on the disk with the cap."""
    used = sum(file.lstat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    tally.disk_samples += 1
    tally.disk_share = max(tally.disk_share, used / setting.cap_bytes)
    if used > setting.cap_bytes:
        raise ViolationError(f"{used} bytes on the disk, the cap is {setting.cap_bytes}")
