"""Snapshots: each live manager's stats in a small private file, for whoever looks from outside.

A manager writes its own file at most every `REFRESH_S` seconds, when it is used; readers only read, so looking
disturbs nobody. Files of processes that are gone are removed by the next reader.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil

from tiermem.configfile import parse_json
from tiermem.errors import ConfigError
from tiermem.private_files import PrivateDirectory
from tiermem.stats import Stats

REFRESH_S = 0.5
MAX_SNAPSHOT_BYTES = 4 * 1024 * 1024
_NAME = re.compile(r"(?P<pid>[0-9]{1,7})-(?P<started_ms>[0-9]{1,16})-[0-9]+")
_numbers = itertools.count()

log = logging.getLogger("tiermem")


def snapshot_dir() -> Path:
    """The directory of this user's snapshots, 0700; made if absent.

    Raises
    ------
    ConfigError: it is there, but not a private directory of this user.
    """
    base = os.environ.get("TIERMEM_RUNTIME_DIR") or os.environ.get("XDG_RUNTIME_DIR")
    path = (
        Path(base) / "tiermem" if base else Path(tempfile.gettempdir()) / f"tiermem-{os.getuid()}"
    )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(f"{path}: must be a directory of this user with mode 0700")
    return path


class Publisher:
    """One manager's file: <pid>-<start of the process>-<number>.json."""

    def __init__(self) -> None:
        started = int(psutil.Process().create_time() * 1000)
        self._path = snapshot_dir() / f"{os.getpid()}-{started}-{next(_numbers)}.json"
        self._next_s = 0.0
        self._failed = False

    def refresh(self, stats: Callable[[], Stats]) -> None:
        """Write the file anew if the last one is older than `REFRESH_S`."""
        if time.monotonic() >= self._next_s:
            self.publish(stats)

    def publish(self, stats: Callable[[], Stats]) -> None:
        """Write the file anew; readers see the old one or the new one, whole. Why it cannot be is logged once."""
        self._next_s = time.monotonic() + REFRESH_S
        text = json.dumps(stats().to_json())
        try:
            with closing(PrivateDirectory.open(self._path.parent)) as directory:
                directory.replace(self._path.name, text.encode(), durable=False)
        except (OSError, ConfigError) as error:  # that nobody can look must not stop a manager
            if not self._failed:
                log.warning("%s: stats cannot be written: %s", self._path, error)
            self._failed = True

    def withdraw(self) -> None:
        """The manager is closed."""
        self._path.unlink(missing_ok=True)


def live_snapshots() -> list[dict[str, object]]:
    """The latest stats of every live manager of this user, oldest process first."""
    with closing(PrivateDirectory.open(snapshot_dir())) as directory:
        found = (_read(directory, name) for name in directory.names())
        return [document for document in found if document is not None]


def _read(directory: PrivateDirectory, file_name: str) -> dict[str, object] | None:
    """What a live manager left there; None for anything else. What a dead one left is removed."""
    name = _NAME.fullmatch(file_name.removesuffix(".json"))
    if name is None or not file_name.endswith(".json"):
        return None
    if not _is_running(int(name["pid"]), int(name["started_ms"])):
        directory.remove(file_name)
        return None
    try:
        document = parse_json(directory.read(file_name, MAX_SNAPSHOT_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # withdrawn meanwhile, or not a snapshot
    return document if isinstance(document, dict) else None


def _is_running(pid: int, started_ms: int) -> bool:
    try:
        return abs(int(psutil.Process(pid).create_time() * 1000) - started_ms) < 1000
    except psutil.NoSuchProcess:
        return False
