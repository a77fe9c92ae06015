"""The directory of a store: claimed by one process, its header, its slot file and its index."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import lmdb

from tiermem import _core
from tiermem.errors import ConfigError
from tiermem.layout import PageLayout
from tiermem.store_format import MAX_HEADER_BYTES, check_header, pack_header

INDEX_BYTES = 256 * 1024
INDEX_BYTES_PER_SLOT = 512
"""Of the cap, set aside for LMDB: its own pages, and two copies of a B-tree page while it changes."""


def claim(path: Path) -> int:
    """Make the directory where there is none and lock it; the descriptor that holds the lock."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and "header.json" not in names and names != {"lock"}:
            raise ConfigError(
                f"ssd_path={str(path)!r}: neither empty nor a tiermem store (no header.json); "
                f"choose another directory"
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path / "lock", flags, 0o600)
    except OSError as error:
        raise ConfigError(f"ssd_path={str(path)!r}: not usable as a store ({error})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"ssd_path={str(path)!r}: another process or manager has this store open; "
            f"one owns a store at a time"
        ) from None
    return lock


def check_or_write_header(path: Path, layout: PageLayout) -> None:
    header = path / "header.json"
    try:
        text = _read_bounded(header)
    except FileNotFoundError:
        new = path / "header.json.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
            file.write(pack_header(layout))
            file.flush()
            os.fsync(file.fileno())
        new.rename(header)
        return
    check_header(str(path), text, layout)


def _read_bounded(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read(MAX_HEADER_BYTES)


def open_slots(path: Path, num_bytes: int) -> _core.BlockFile:
    """The slot file, cut or grown to the cap."""
    try:
        file = _core.BlockFile(path, num_bytes, _core.OpenMode.CREATE)
        if file.size_bytes > num_bytes:
            file.resize(num_bytes)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise ConfigError(
            f"ssd: {num_bytes} bytes for the slots of {str(path.parent)!r} cannot be had "
            f"({error.strerror}); {free} bytes are free there"
        ) from error
    return file


def open_index(path: Path, num_slots: int) -> lmdb.Environment:
    """The index. Without LMDB's own sync: `sync` orders payload before entries."""
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        return lmdb.open(
            str(path),
            map_size=INDEX_BYTES + 4 * INDEX_BYTES_PER_SLOT * num_slots,
            mode=0o600,
            sync=False,
            max_readers=16,
        )
    except lmdb.Error as error:
        raise ConfigError(
            f"ssd_path={str(path.parent)!r}: its index is not usable ({error})"
        ) from None
