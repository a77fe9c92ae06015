"""The directory of a store: claimed by one process, its header, its slot file and its index."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import stat
from pathlib import Path

import lmdb

from tiermem import _core
from tiermem.errors import ConfigError
from tiermem.index_image import INDEX_FILE
from tiermem.layout import PageLayout
from tiermem.private_files import PrivateDirectory
from tiermem.store_format import MAX_HEADER_BYTES, TRAILER_BYTES, check_header, pack_header

log = logging.getLogger("tiermem")

_KEEP_SIZE = 1
"""Of fallocate."""
INDEX_BYTES = 512 * 1024
INDEX_BYTES_PER_SLOT = 1024
"""Of the cap, set aside for the index: some 270 bytes a slot with its place among what is gone, three times where
each commit touches every page of the B-tree. LMDB is not let beyond it."""
SMALL_FILES_BYTES = 64 * 1024
"""Of INDEX_BYTES, for what is neither slots nor index: header, lock, write budget, and the directories."""

MAX_PID_BYTES = 20
"""In a lock file: who held the lock last. A hint for messages; flock alone decides."""
STARTED = {"lock", "header.json.new"}
"""What a process leaves that was killed before its new store had a header."""


def slots_within(layout: PageLayout, cap_bytes: int) -> int:
    """How many slots of `layout` a store that takes at most `cap_bytes` may have."""
    return (cap_bytes - INDEX_BYTES) // (stride_of(layout) + INDEX_BYTES_PER_SLOT)


def cap_of(layout: PageLayout, num_slots: int) -> int:
    """The most bytes that a store of `num_slots` slots takes, all its files together; 0 for none."""
    return num_slots and INDEX_BYTES + num_slots * (stride_of(layout) + INDEX_BYTES_PER_SLOT)


def index_bytes(num_slots: int) -> int:
    """The most bytes of the index of a store of `num_slots` slots."""
    return INDEX_BYTES - SMALL_FILES_BYTES + num_slots * INDEX_BYTES_PER_SLOT


def num_slots_there(path: Path, layout: PageLayout) -> int:
    """How many whole slots the store in the directory `path` has, 0 where there is none."""
    with contextlib.suppress(OSError):
        info = (path / "slots").lstat()
        if stat.S_ISREG(info.st_mode):
            return info.st_size // stride_of(layout)
    return 0


def stride_of(layout: PageLayout) -> int:
    """Bytes of one slot with its trailer."""
    return layout.slot_bytes + TRAILER_BYTES


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
        owner = os.pread(lock, MAX_PID_BYTES, 0)
        os.close(lock)
        hint = f" (process {owner.decode()} by its lock file)" if owner.isdigit() else ""
        raise ConfigError(
            f"another process or manager has this store open{hint}; one owns a store at a time"
        ) from None
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def check_or_write_header(
    directory: PrivateDirectory, layout: PageLayout, key_id: bytes = b""
) -> None:
    """Check the header of the store in `directory`, or write one where there is none."""
    try:
        text = directory.read("header.json", MAX_HEADER_BYTES)
    except FileNotFoundError:
        directory.replace("header.json", pack_header(layout, key_id), durable=True)
        return
    check_header(str(directory.path), text, layout, key_id)


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
    """The index in `directory`, verified before. Every commit is durable; the store's lock stands for LMDB's.

    LMDB opens its file by path and follows links; nobody else can put one into a private directory once it has
    been looked at.
    """
    directory.check_file(INDEX_FILE)
    try:
        environment = lmdb.open(
            directory.reach("."), map_size=index_bytes(num_slots), mode=0o600, lock=False
        )
    except lmdb.Error as error:
        raise ConfigError(
            f"ssd_path={str(directory.path.parent)!r}: its index is not usable ({error})"
        ) from None
    _allocate(directory, INDEX_FILE, index_bytes(num_slots))
    return environment


def _allocate(directory: PrivateDirectory, name: str, num_bytes: int) -> None:
    """Have the disk keep blocks for `num_bytes` of the file `name`, whose length stays as it is.

    Where it cannot, the file grows as it is written, and a full disk is met then.
    """
    descriptor = directory.open_file(name, os.O_RDWR)
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if function(descriptor, _KEEP_SIZE, 0, num_bytes) != 0:
            error = ctypes.get_errno()
            log.info("%s: no blocks were reserved (%s)", directory.path / name, os.strerror(error))
    finally:
        os.close(descriptor)
