"""Soak: mixed sequences for a long time, with flat memory and bytes on the disk that never exceed the cap.

Memory is looked at in equal states: every sequence closed, all flushed, garbage and free pages given back. Growth
is judged by the Theil-Sen slope, the median of the slopes between all pairs of blocks of samples, and by Sen's
interval around it, which asks nothing of the noise: it is growth where even the lower end is above what MOST says.

Before the managers have been opened a few times memory does grow, and not by a leak. LMDB takes a table of 2 MiB
for every environment. The C library maps the first one, of which few pages are touched; once it was freed the
next ones lie in the heap, where LMDB clears them: 1.9 MiB more at the second or third opening, once. Over 74
seconds that looked like 448 bytes an operation. Pages of the libraries, of which ever more are touched, took
another 0.4 MiB; they and the index, which is bounded, are files and not counted here. So the first half of a run
is left out, and a run with few openings in its second half is judged by LEAST_GROWTH_BYTES alone.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torture.actor import Actor
from torture.content import Prompts
from torture.setting import Setting
from torture.tally import Slope, Tally, ViolationError

SOAK_S = 6.0
"""Where nobody says how long."""
REOPEN_AFTER = 3000
"""Operations, about, until the manager is closed and another one opened."""
NUM_SAMPLES = 1000
"""At most, in a run."""
SAMPLE_AFTER = 40
"""Operations at least between samples: before one, every sequence is closed."""
DISK_S = 0.02
"""Between looks at the disk."""
WARM_SHARE = 0.5
"""Of the samples, from the start, that are left out."""
NUM_BLOCKS = 16
"""The line is laid through the medians of so many blocks of samples."""
NUM_ERRORS = 4.0
"""Standard errors from the slope to an end of its interval."""
LEAST_OPENINGS = 5
"""In the part that is judged."""
LEAST_GROWTH_BYTES = 8 << 20
"""Of resident memory over a run that is too short to be judged by its slope."""

MOST = {"resident": 2.0, "allocated": 0.5, "objects": 0.005, "handles": 1e-5}
"""An operation, of what is measured: bytes of memory that is no file's, bytes that the C library has given out,
blocks that Python has, descriptors and threads. A leak of one small object in 200 operations is above it."""


class _Mallinfo2(ctypes.Structure):
    """Of glibc; bytes."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    )  # fmt: skip


_LIBC = ctypes.CDLL(None)
_LIBC.mallinfo2.restype = _Mallinfo2


def measures() -> tuple[float, ...]:
    """What this process has now, in the order of MOST, without what may be given back at any time."""
    gc.collect()
    _LIBC.malloc_trim(0)
    info = _LIBC.mallinfo2()
    handles = sum(1 for place in ("fd", "task") for _ in Path("/proc/self", place).iterdir())
    return (
        resident_bytes(),
        info.uordblks + info.hblkhd,
        sys.getallocatedblocks(),
        handles,
    )


def resident_bytes() -> int:
    """Memory of this process that lies in RAM and is no file's."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    )
    return sum(int(fields[name].split()[0]) << 10 for name in ("Anonymous", "Pss_Shmem"))


def slope_of(x: NDArray[np.float64], y: NDArray[np.float64]) -> Slope:
    """The Theil-Sen slope of y over x, and its interval (Sen 1968)."""
    ends = [np.array_split(values, NUM_BLOCKS) for values in (x, y)]
    x, y = (np.array([np.median(block) for block in part]) for part in ends)
    i, j = np.triu_indices(NUM_BLOCKS, 1)
    slopes = np.sort((y[j] - y[i]) / (x[j] - x[i]))
    n = NUM_BLOCKS
    error = np.sqrt(n * (n - 1) * (2 * n + 5) / 18)  # of Kendall's sum
    end = int((len(slopes) - NUM_ERRORS * error) / 2)
    return Slope(float(np.median(slopes)), float(slopes[end]), float(slopes[-1 - end]))


@dataclass(slots=True)
class Samples:
    """Operations, openings, and `measures` after them; memory is taken for all of them at once."""

    rows: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros((NUM_SAMPLES + 1, 2 + len(MOST)))
    )
    count: int = 0

    def add(self, operations: int, openings: int, measured: tuple[float, ...]) -> None:
        """One more."""
        if self.count < len(self.rows):
            self.rows[self.count] = operations, openings, *measured
            self.count += 1

    def slopes(self) -> dict[str, Slope]:
        """Of each measure over what is judged; none where there are too few samples."""
        rows = self.rows[int(self.count * WARM_SHARE) : self.count]
        if len(rows) < NUM_BLOCKS:
            return {}
        return {name: slope_of(rows[:, 0], rows[:, 2 + i]) for i, name in enumerate(MOST)}

    def judge(self) -> None:
        """Raise ViolationError where something grows."""
        rows = self.rows[int(self.count * WARM_SHARE) : self.count]
        if len(rows) == 0:
            return
        if rows[-1, 1] - rows[0, 1] < LEAST_OPENINGS:
            growth = rows[-1, 2] - rows[0, 2]
            if growth > LEAST_GROWTH_BYTES:
                raise ViolationError(f"resident memory grows by {growth:.0f} bytes")
            return
        for name, slope in self.slopes().items():
            if slope.low > MOST[name]:
                raise ViolationError(
                    f"{name}: grows by {slope.middle:.3g} an operation, within [{slope.low:.3g}, "
                    f"{slope.high:.3g}]; must be at most {MOST[name]:g}"
                )


def run_soak(seed: int, where: Path, tally: Tally, seconds: float = SOAK_S) -> None:
    """Work for `seconds`; raises ViolationError where memory grows or the disk holds more than the cap."""
    rng, path = random.Random(seed), where / "store"
    setting = replace(Setting.made(rng), ssd=rng.randint(40, 120))
    samples = Samples()
    end_s, disk_s, sample_s = time.monotonic() + seconds, 0.0, 0.0
    reopen_at, sample_at = REOPEN_AFTER, 0
    actor = Actor(setting.open(path), Prompts.made(rng), rng, tally, strays=True)
    while (now_s := time.monotonic()) < end_s:
        actor.act()
        if tally.operations >= reopen_at:
            reopen_at += rng.randint(1, 2 * REOPEN_AFTER)
            actor.close_all()
            actor.manager.close()
            note_disk(path, setting, tally)
            actor.manager = setting.open(path)
            tally.reopened += 1
        if now_s >= disk_s:
            disk_s = now_s + DISK_S
            note_disk(path, setting, tally)
        if now_s >= sample_s and tally.operations >= sample_at:
            sample_s = now_s + seconds / NUM_SAMPLES
            sample_at = tally.operations + SAMPLE_AFTER
            actor.close_all()
            actor.manager.flush()
            samples.add(tally.operations, tally.reopened, measures())
    actor.manager.close()
    tally.slopes = samples.slopes()
    samples.judge()


def note_disk(path: Path, setting: Setting, tally: Tally) -> None:
    """Compare what the directory takes on the disk with the cap."""
    used = sum(file.lstat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    tally.disk_samples += 1
    tally.disk_share = max(tally.disk_share, used / setting.cap_bytes)
    if used > setting.cap_bytes:
        raise ViolationError(f"{used} bytes on the disk, the cap is {setting.cap_bytes}")
