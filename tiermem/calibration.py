"""Calibration: what was measured on this machine, in a small private file that is used until it is out of date.

One file a machine and GPU: <cache>/calibration-<GPU>.json. A file that is damaged, out of date, or of another
machine or version is passed over with a message; nothing of it is used.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tiermem.configfile import parse_json
from tiermem.device.copy_rates import CopyRates
from tiermem.disk_rates import DiskRates
from tiermem.errors import ConfigError
from tiermem.fields import check_int, check_keys, check_number, check_text, refuse
from tiermem.machine import Machine
from tiermem.rates import Rates
from tiermem.version import VERSION

FORMAT = 2
"""A file of an older one lacks rates that are needed now: it is out of date."""
MAX_FILE_BYTES = 1 << 20
VALID_DAYS = 30
DAY_S = 86400.0
CLOCK_SLACK_S = DAY_S
"""A file may come from so far in the future: clocks are set right now and then."""
MAX_DISKS = 64
GIGA = 1e9
TIME_RANGE = (0.0, 1e11)
"""Seconds since the epoch."""
FIX = "run `tiermem calibrate`"
_KEYS = ("format", "tiermem", "machine", "made_s", "quick", "rates", "disks", "copies")

log = logging.getLogger("tiermem")


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """What was measured in a directory, and when, seconds since the epoch.

    device_id: of the file system, as the kernel numbers it.
    """

    path: str
    device_id: int
    made_s: float
    rates: DiskRates

    @classmethod
    def at(cls, path: Path, made_s: float, rates: DiskRates) -> DiskPlace:
        """What was measured at `path`, which need not exist any more."""
        return cls(str(path.absolute()), _device_id(path) or 0, made_s, rates)

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> DiskPlace:
        """The place whose `to_table` gave `table`; ConfigError for a value that cannot be."""
        check_keys(table, ("path", "device_id", "made_s", "rates"))
        return cls(
            path=check_text("path", table.get("path"), 4096),
            device_id=check_int("device_id", table.get("device_id"), 0, 2**64),
            made_s=check_number("made_s", table.get("made_s"), *TIME_RANGE),
            rates=DiskRates.from_dict(table.get("rates")),
        )

    def to_table(self) -> dict[str, object]:
        """Names and plain values."""
        return {
            "path": self.path,
            "device_id": self.device_id,
            "made_s": self.made_s,
            "rates": self.rates.to_dict(),
        }

    @property
    def read(self) -> float:
        """Bytes/s of the best direct reads of large blocks."""
        return self.rates.read_ceiling_gbs * GIGA

    @property
    def write(self) -> float:
        """Bytes/s of the best direct writes of large blocks."""
        return self.rates.write_ceiling_gbs * GIGA


@dataclass(frozen=True, slots=True)
class Calibration:
    """The figures of one machine. made_s: seconds since the epoch. quick: measured with less care.

    disks: one for each place that was measured within the last 30 days, the latest first.
    copies: what each way of copying reached; None where there is one way only.
    """

    machine: Machine
    made_s: float
    quick: bool
    rates: Rates
    disks: tuple[DiskPlace, ...] = ()
    copies: CopyRates | None = None

    @property
    def expires_s(self) -> float:
        """When it is out of date, seconds since the epoch."""
        return self.made_s + VALID_DAYS * DAY_S

    def disk_at(self, path: Path) -> DiskPlace | None:
        """What was measured at `path`, or else on the file system that it is on."""
        device_id = _device_id(path)
        here = [place for place in self.disks if place.device_id == device_id]
        exact = [place for place in here if place.path == str(path.absolute())]
        return next(iter(exact or here), None)

    def with_disks_of(self, before: Calibration | None) -> Calibration:
        """This one with the other places of an earlier one."""
        if before is None:
            return self
        ours = {place.path for place in self.disks}
        others = [place for place in before.disks if place.path not in ours]
        return replace(self, disks=(*self.disks, *others)[:MAX_DISKS])

    def to_table(self) -> dict[str, object]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "tiermem": VERSION,
            "machine": self.machine.to_table(),
            "made_s": self.made_s,
            "quick": self.quick,
            "rates": self.rates.to_table(),
            "disks": [place.to_table() for place in self.disks],
            "copies": None if self.copies is None else self.copies.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """What was looked for: the calibration, or why a file that is there is not used."""

    path: Path | None
    calibration: Calibration | None = None
    problem: str | None = None

    def to_table(self) -> dict[str, object]:
        """Names and plain values; `calibration` is what the file holds."""
        made = self.calibration
        return {
            "path": None if self.path is None else str(self.path),
            "calibration": None if made is None else made.to_table(),
            "expires_s": None if made is None else made.expires_s,
            "problem": self.problem,
        }


def cache_dir() -> Path:
    """The directory of this user's calibrations; it need not exist.

    Raises
    ------
    ConfigError: there is no home directory to put it in.
    """
    own = os.environ.get("TIERMEM_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "tiermem"
    except RuntimeError:
        raise ConfigError("no home directory: set TIERMEM_CACHE_DIR") from None


def make_cache_dir() -> Path:
    """`cache_dir()`, 0700 if it was absent.

    Raises
    ------
    ConfigError: it is not a directory that only this user can write to. OSError: it cannot be made.
    """
    directory = cache_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_directory(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{directory}: cannot be written to; set TIERMEM_CACHE_DIR")
    return directory


def load(machine: Machine, now_s: float | None = None) -> Found:
    """The calibration of `machine`; never raises on account of what a file holds."""
    try:
        directory = cache_dir()
    except ConfigError as error:
        return Found(None, problem=str(error))
    path = directory / f"calibration-{machine.key}.json"
    now_s = time.time() if now_s is None else now_s
    try:
        _check_directory(directory)
        calibration = _parse(_read(path))
        _check_applies(calibration, machine, now_s)
    except FileNotFoundError:
        return Found(path)
    except OSError as error:
        return Found(path, problem=_ignored(path, f"it cannot be read: {error.strerror}"))
    except ConfigError as error:
        return Found(path, problem=_ignored(path, str(error)))
    fresh = [disk for disk in calibration.disks if now_s - disk.made_s <= VALID_DAYS * DAY_S]
    return Found(path, replace(calibration, disks=tuple(fresh)))


def load_logged(machine: Machine) -> Calibration | None:
    """The calibration of `machine`; why a file is not used is logged, once a process."""
    found = load(machine)
    if found.problem is not None:
        _warn_once(found.problem)
    return found.calibration


def save(calibration: Calibration) -> Path:
    """Write the file, 0600, in a directory of this user; readers see the old file or the new one, whole.

    Raises
    ------
    ConfigError, OSError: as `make_cache_dir`, or the file cannot be written.
    """
    directory = make_cache_dir()
    path = directory / f"calibration-{calibration.machine.key}.json"
    text = json.dumps(calibration.to_table(), indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(
        prefix=".calibration-", dir=directory
    )  # 0600, opened by no link
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def forget(machine: Machine) -> Path | None:
    """Remove the file of `machine`; its path, or None where there was none.

    Raises
    ------
    ConfigError, OSError: as `save`.
    """
    directory = cache_dir()
    path = directory / f"calibration-{machine.key}.json"
    if not os.path.lexists(path):
        return None
    _check_directory(directory)
    path.unlink()
    return path


# ---- the file --------------------------------------------------------------------------------------


def _check_directory(path: Path) -> None:
    """A directory that nobody else can write to, not a link to one."""
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ConfigError(f"{path}: must be a directory that only this user can write to")


def _read(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
            raise ConfigError("not a regular file that only this user can write to")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None


def _parse(text: str) -> Calibration:
    try:
        document = parse_json(text)
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError("not well formed") from None
    table = _table("the file", document)
    made_in = table.get("format")
    if type(made_in) is int and 1 <= made_in < FORMAT:
        raise ConfigError(f"out of date: of format {made_in}, this is {FORMAT}")
    if made_in != FORMAT:
        raise refuse("format", made_in, f"{FORMAT}")
    if table.get("tiermem") != VERSION:
        made_by = check_text("tiermem", table.get("tiermem"), 100)
        raise ConfigError(f"made by tiermem {made_by}, this is {VERSION}")
    check_keys(table, _KEYS)
    copies = table.get("copies")
    return Calibration(
        machine=Machine.from_table(_table("machine", table.get("machine"))),
        made_s=check_number("made_s", table.get("made_s"), *TIME_RANGE),
        quick=table.get("quick") is True,
        rates=Rates.from_table(_table("rates", table.get("rates"))),
        disks=_disks(table.get("disks")),
        copies=None if copies is None else CopyRates.from_dict(_table("copies", copies)),
    )


def _disks(value: object) -> tuple[DiskPlace, ...]:
    if not isinstance(value, list) or len(value) > MAX_DISKS:
        raise refuse("disks", value, f"a list of at most {MAX_DISKS} places")
    return tuple(DiskPlace.from_table(_table("disks", item)) for item in value)


def _table(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise refuse(key, value, "a table of keys and values")
    return value


def _check_applies(calibration: Calibration, machine: Machine, now_s: float) -> None:
    difference = machine.difference(calibration.machine)
    if difference is not None:
        raise ConfigError(f"made on another machine: {difference}")
    if calibration.made_s > now_s + CLOCK_SLACK_S:
        raise ConfigError("made in the future: a clock was wrong")
    if now_s > calibration.expires_s:
        days = (now_s - calibration.made_s) / DAY_S
        raise ConfigError(f"{days:.0f} days old, good for {VALID_DAYS}")


def _ignored(path: Path, reason: str) -> str:
    return f"the calibration {path} is not used: {reason}; {FIX}"


@cache
def _warn_once(problem: str) -> None:
    log.warning("%s", problem)


def _device_id(path: Path) -> int | None:
    """Of the file system that `path` is on, or would be."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        return place.stat().st_dev
    except OSError:
        return None
