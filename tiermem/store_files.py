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
from tiermem.private_files import PrivateDirectory
from tiermem.store_format import MAX_HEADER_BYTES, check_header, pack_header

INDEX_FILE = "data.mdb"
INDEX_BYTES = 256 * 1024
INDEX_BYTES_PER_SLOT = 512
"""Of the cap, set aside for LMDB: its own pages, and two copies of a B-tree page while it changes."""

STARTED = {"lock", "header.json.new"}
"""What a process leaves that was killed before its new store had a header."""


def claim(path: Path) -> tuple[PrivateDirectory, int]:
    """Make the directory where there is none and lock it; the directory and the descriptor that holds the lock.

    Raises
    ------
    ConfigError: not a private directory of this user, neither empty nor a store, or owned by another process.
    """
    try:
        directory = PrivateDirectory.make(path)
        try:
            return directory, _lock(directory)
        except BaseException:
            directory.close()
            raise
    except (OSError, ConfigError) as error:
        raise ConfigError(f"ssd_path={str(path)!r}: not usable as a store ({error})") from error


def _lock(directory: PrivateDirectory) -> int:
    names = set(directory.names())
    if "header.json" not in names and not names <= STARTED:
        raise ConfigError("neither empty nor a tiermem store (no header.json); choose another one")
    directory.make_private()
    lock = directory.open_file("lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            "another process or manager has this store open; one owns a store at a time"
        ) from None
    return lock


def check_or_write_header(directory: PrivateDirectory, layout: PageLayout) -> None:
    """Check the header of the store in `directory`, or write one where there is none."""
    try:
        text = directory.read("header.json", MAX_HEADER_BYTES)
    except FileNotFoundError:
        directory.replace("header.json", pack_header(layout), durable=True)
        return
    check_header(str(directory.path), text, layout)


def open_slots(directory: PrivateDirectory, num_bytes: int) -> _core.BlockFile:
    """The slot file, cut or grown to `num_bytes`."""
    directory.check_file("slots")
    try:
        file = _core.BlockFile(directory.reach("slots"), num_bytes, _core.OpenMode.CREATE)
        if file.size_bytes > num_bytes:
            file.resize(num_bytes)
    except OSError as error:
        free = shutil.disk_usage(directory.reach(".")).free
        raise ConfigError(
            f"ssd: {num_bytes} bytes for the slots of {str(directory.path)!r} cannot be had "
            f"({error.strerror}); {free} bytes are free there"
        ) from error
    return file


def open_index(directory: PrivateDirectory, num_slots: int) -> lmdb.Environment:
    """The index in `directory`. Every commit is durable; the store's own lock stands for LMDB's.

    LMDB opens its file by path and follows links; nobody else can put one into a private directory once it has
    been looked at.
    """
    directory.check_file(INDEX_FILE)
    try:
        return lmdb.open(
            directory.reach("."),
            map_size=INDEX_BYTES + 4 * INDEX_BYTES_PER_SLOT * num_slots,
            mode=0o600,
            lock=False,
        )
    except lmdb.Error as error:
        raise ConfigError(
            f"ssd_path={str(directory.path.parent)!r}: its index is not usable ({error})"
        ) from None
