"""The disk's limits: a floor of free space on its file system, and bytes a day against wear.

Slots are allocated when a store is opened, so that what is stored never needs more room; what these limits stop is
writing ahead of need. A page that a sequence refers to and that has nowhere else to go is written in any case, and
counted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tiermem.errors import ConfigError
from tiermem.private_files import PrivateDirectory

DAY_S = 86400.0
FULL_PAUSE_S = 10.0
"""After a write for which there was no space, none is tried ahead of need for so long."""

BUDGET_FILE = "budget"
MIN_STEP_BYTES = 1 << 20
STEPS = 64
"""The file is ahead of what was written by up to a STEPSth of a day's bytes, and written as rarely."""

LAST_S = 1e11
"""Seconds since 1970 that a clock may say."""

_MAGIC = b"tiermemB"
_RECORD = struct.Struct("<8sqdI")

log = logging.getLogger("tiermem")


class Pause(Enum):
    """Why nothing is written ahead of need."""

    FREE_FLOOR = "less than ssd_free_floor is free on the file system"
    BUDGET = "ssd_write_budget is used up"
    DISK_FULL = "a write found no space"


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """What a store must leave: bytes free on its file system, and what is beyond a day's bytes of writes."""

    floor_bytes: int = 0
    day_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DiskStats:
    """The SSD tier's disk, in bytes.

    `used_bytes` are all of the store's files as `du` counts them, never above `cap_bytes`. `written_bytes` counts
    from when the manager was made. `budget_bytes` is a day's, None where there is none; `budget_left_bytes` is
    below 0 after writes that could not wait. `pause` says why nothing is written ahead of need, None if it is;
    `skipped_pages` were not written for such a reason.
    """

    cap_bytes: int
    used_bytes: int
    free_bytes: int
    free_floor_bytes: int
    written_bytes: int
    budget_bytes: int | None
    budget_left_bytes: int | None
    pause: str | None
    skipped_pages: int


class WriteBudget:
    """Bytes that may be written, as a bucket that holds a day's and is refilled steadily; kept across restarts.

    The file says what was left less a little more than was written since, so that a process that is killed
    leaves no more behind than there was; closing writes the exact number. A file that is damaged counts as empty.

    Parameters
    ----------
    directory: where the file is; used until `close`.
    day_bytes: of a day, at least 1.
    now_s: the clock, seconds since 1970. Where it goes back, nothing is refilled.
    """

    def __init__(
        self, directory: PrivateDirectory, day_bytes: int, now_s: Callable[[], float] = time.time
    ) -> None:
        self.day_bytes = day_bytes
        self._directory = directory
        self._now_s = now_s
        self._step = max(MIN_STEP_BYTES, day_bytes // STEPS)
        self._failed = False
        self._left, self._at_s = self._load()
        self._saved, self._saved_s = self._left, self._at_s
        self._save(self.left_bytes - self._step)

    @property
    def left_bytes(self) -> int:
        """What may be written now; below 0 after writes that could not wait."""
        now_s = self._now_s()
        refill = self._refill(now_s - self._at_s)
        if refill >= 1:
            self._left = min(self.day_bytes, self._left + int(refill))
        if refill >= 1 or now_s < self._at_s:
            self._at_s = now_s
        return self._left

    def spend(self, num_bytes: int) -> None:
        """So many bytes are being written; never refused. A debt is at most a day's bytes."""
        self._left = max(-self.day_bytes, self.left_bytes - num_bytes)
        said = min(self.day_bytes, self._saved + self._refill(self._at_s - self._saved_s))
        if not said <= self._left <= said + 2 * self._step:
            self._save(self._left - self._step)

    def close(self) -> None:
        """Keep what is left for the next one."""
        self._save(self.left_bytes)

    def _load(self) -> tuple[int, float]:
        """What was left, and when; a full bucket where there is no file."""
        now_s = self._now_s()
        try:
            data = self._directory.read(BUDGET_FILE, _RECORD.size)
        except FileNotFoundError:
            return self.day_bytes, now_s
        except ConfigError as error:
            log.warning("%s; the write budget starts empty", error)
            return 0, now_s
        parsed = _parse(data)
        if parsed is None:
            path = self._directory.path / BUDGET_FILE
            log.warning("%s: damaged; the write budget starts empty", path)
            return 0, now_s
        left, at_s = parsed
        return max(-2 * self.day_bytes, min(left, self.day_bytes)), min(at_s, now_s)

    def _refill(self, seconds: float) -> float:
        return seconds * self.day_bytes / DAY_S

    def _save(self, left: int) -> None:
        body = _RECORD.pack(_MAGIC, left, self._at_s, 0)[:-4]
        self._saved, self._saved_s = left, self._at_s
        try:
            self._directory.replace(
                BUDGET_FILE, body + struct.pack("<I", zlib.crc32(body)), durable=False
            )
        except OSError as error:
            if not self._failed:
                log.warning("the write budget cannot be kept for the next start: %s", error)
            self._failed = True


def _parse(data: bytes) -> tuple[int, float] | None:
    if len(data) != _RECORD.size:
        return None
    magic, left, at_s, crc = _RECORD.unpack(data)
    if magic != _MAGIC or crc != zlib.crc32(data[:-4]) or not 0 <= at_s <= LAST_S:
        return None
    return left, at_s


class DiskGuard:
    """Says how many pages may be written ahead of need, and counts what is written.

    Parameters
    ----------
    directory: of the store; used until `close`.
    cap_bytes: what the store may take.
    page_bytes: what a page takes on the disk.
    """

    def __init__(
        self, directory: PrivateDirectory, cap_bytes: int, page_bytes: int, limits: DiskLimits
    ) -> None:
        self._directory = directory
        self._cap_bytes = cap_bytes
        self._page_bytes = page_bytes
        self._floor_bytes = limits.floor_bytes
        day_bytes = limits.day_bytes
        self._budget = None if day_bytes is None else WriteBudget(directory, day_bytes)
        self._full_until_s = -math.inf
        self._written_bytes = 0
        self._told: Pause | None = None
        self.skipped_pages = 0

    def allow(self, num_pages: int) -> int:
        """How many of `num_pages` may be written though nobody needs it yet; the other ones are counted."""
        allowed = num_pages
        pause = self.pause
        if pause is not None:
            allowed = 0
        elif self._budget is not None:
            allowed = min(num_pages, self._budget.left_bytes // self._page_bytes)
        self.skipped_pages += num_pages - allowed
        if pause is not self._told and num_pages:
            self._tell(pause)
        return allowed

    def note_written(self, num_bytes: int) -> None:
        """So many bytes were given to the disk."""
        self._written_bytes += num_bytes
        if self._budget is not None:
            self._budget.spend(num_bytes)

    def note_full(self) -> None:
        """A write failed for want of space."""
        self._full_until_s = time.monotonic() + FULL_PAUSE_S

    @property
    def pause(self) -> Pause | None:
        """Why nothing may be written ahead of need now."""
        if time.monotonic() < self._full_until_s:
            return Pause.DISK_FULL
        if self._floor_bytes and self._free_bytes() < self._floor_bytes:
            return Pause.FREE_FLOOR
        if self._budget is not None and self._budget.left_bytes <= 0:
            return Pause.BUDGET
        return None

    def stats(self) -> DiskStats:
        """A picture of now."""
        pause, budget = self.pause, self._budget
        return DiskStats(
            cap_bytes=self._cap_bytes,
            used_bytes=self._directory.disk_bytes(),
            free_bytes=self._free_bytes(),
            free_floor_bytes=self._floor_bytes,
            written_bytes=self._written_bytes,
            budget_bytes=None if budget is None else budget.day_bytes,
            budget_left_bytes=None if budget is None else budget.left_bytes,
            pause=None if pause is None else pause.value,
            skipped_pages=self.skipped_pages,
        )

    def close(self) -> None:
        """Keep the budget for the next start; a second call does nothing."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.close()

    def _free_bytes(self) -> int:
        with contextlib.suppress(OSError):
            info = os.statvfs(self._directory.descriptor)
            return info.f_bavail * info.f_frsize
        return 0

    def _tell(self, pause: Pause | None) -> None:
        self._told = pause
        if pause is None:
            log.info("the SSD tier writes ahead of need again")
        else:
            log.warning("the SSD tier writes only what it must: %s", pause.value)
