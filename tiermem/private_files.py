"""Private files: directories and files of this user alone, reached without following symbolic links.

A directory is opened once and checked through its descriptor; everything in it is reached from that
descriptor, so that renaming directories or planting links meanwhile leads nowhere. What only lacks privacy (its
mode) is repaired; what somebody else owns, could have changed, or shares by another link is refused.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tiermem.errors import ConfigError

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_OTHERS = 0o077
_OTHERS_WRITE = 0o022
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK: opening a pipe that somebody put there must not wait for its other end."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

log = logging.getLogger("tiermem")


class PrivateDirectory:
    """An open directory of this user, and the files in it. Closed by `close`.

    Errors name `path`. Names are of entries of the directory itself, never with a slash.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def make(cls, path: Path) -> PrivateDirectory:
        """The directory at `path`, made with mode 0700 where it is absent, as are those above it.

        One that is there is opened as by `open`; `make_private` is to follow.
        """
        _make(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> PrivateDirectory:
        """The directory at `path`, with the mode it has.

        Raises
        ------
        ConfigError: a symbolic link, not a directory, or of another user.
        OSError: it cannot be made or opened.
        """
        return cls._owned(_open_directory(str(path), None, path), path)

    @classmethod
    def _owned(cls, descriptor: int, path: Path) -> PrivateDirectory:
        try:
            _check_owner(os.fstat(descriptor), path)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, path)

    def make_private(self) -> None:
        """Give the directory mode 0700 where others may read it, or write to it while it is empty.

        Raises
        ------
        ConfigError: others can write to what is in it, or the file system knows no permissions.
        """
        mode = stat.S_IMODE(os.fstat(self.descriptor).st_mode)
        if mode & _OTHERS_WRITE and self.names():
            raise ConfigError(
                f"{self.path}: has mode {mode:04o}, others can write to it, so that what is in it cannot be "
                f"trusted; if you trust it, `chmod 0700` it, else choose another directory"
            )
        if mode & _OTHERS:
            _make_private(self.descriptor, DIRECTORY_MODE, self.path)

    @property
    def descriptor(self) -> int:
        """Of the open directory, for calls with `dir_fd`; stays this object's."""
        assert self._descriptor >= 0
        return self._descriptor

    def close(self) -> None:
        """Let go of the directory; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def reach(self, name: str) -> str:
        """A path to `name` that leads into this very directory, whatever its own path leads to by now."""
        through = f"/proc/self/fd/{self.descriptor}"
        return f"{through}/{name}" if Path(through).is_dir() else str(self.path / name)

    def names(self) -> list[str]:
        """What is in it, sorted."""
        return _names(self.descriptor)

    def size_of(self, name: str) -> int:
        """Length of the file `name` in bytes; 0 where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_size
        return 0

    def subdirectory(self, name: str) -> PrivateDirectory:
        """The directory `name` in this one, made if absent, and private; as `open` and `make_private`."""
        path = self.path / name
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=self.descriptor)
        inner = self._owned(_open_directory(name, self.descriptor, path), path)
        try:
            inner.make_private()
        except BaseException:
            inner.close()
            raise
        return inner

    def open_file(self, name: str, flags: int) -> int:
        """A descriptor of the regular file `name`; with O_CREAT in `flags` it is made with mode 0600.

        One that others may use is made private. Raises ConfigError for a link, anything but a regular file,
        another user's file, and one with a second name elsewhere; OSError as the system.
        """
        path = self.path / name
        try:
            descriptor = os.open(name, flags | _SAFE, FILE_MODE, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise ConfigError(f"{path}: must be a regular file, not {_kind(error)}") from None
            raise
        try:
            _check_file(descriptor, path)
            os.set_blocking(descriptor, True)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def check_file(self, name: str) -> bool:
        """Whether there is a file `name`; raises as `open_file` where it is not to be trusted."""
        try:
            os.close(self.open_file(name, os.O_RDONLY))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, most_bytes: int) -> bytes:
        """What the file `name` holds; ConfigError if that is more than `most_bytes`; else as `open_file`."""
        with os.fdopen(self.open_file(name, os.O_RDONLY), "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ConfigError(f"{self.path / name}: larger than {most_bytes} bytes")
        return data

    def replace(self, name: str, data: bytes, *, durable: bool) -> None:
        """Make `data` what the file `name` holds; readers see the old bytes or the new ones, whole.

        Parameters
        ----------
        durable: return when it would survive a loss of power.

        Raises
        ------
        OSError: it cannot be written; the file is as it was.
        """
        new = f"{name}.new"
        self.remove(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            with os.fdopen(self.open_file(new, flags), "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(new, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            self.remove(new)
            raise
        if durable:
            os.fsync(self.descriptor)

    def remove(self, name: str) -> None:
        """There is no file `name` any more; a link is removed, not what it names."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def disk_bytes(self) -> int:
        """What the directory and everything in it takes on the disk, as `du` counts it."""
        return sum(_disk_bytes(self.descriptor))


def _names(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


def _disk_bytes(descriptor: int) -> Iterator[int]:
    yield os.fstat(descriptor).st_blocks * 512
    for name in _names(descriptor):
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode):
                yield info.st_blocks * 512
                continue
            inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
            try:
                yield from _disk_bytes(inner)
            finally:
                os.close(inner)


def _make(path: Path) -> None:
    """Make `path` and what is missing above it, each 0700: a umask takes away only."""
    missing = []
    place = path.absolute()
    while not os.path.lexists(place):
        missing.append(place)
        place = place.parent
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made meanwhile by another process
            place.mkdir(DIRECTORY_MODE)


def _open_directory(name: str, dir_fd: int | None, path: Path) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            if path.is_symlink():
                raise ConfigError(
                    f"{path}: is a symbolic link, which is not followed; give {path.resolve()}"
                ) from None
            raise ConfigError(f"{path}: is not a directory") from None
        raise


def _check_file(descriptor: int, path: Path) -> None:
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{path}: must be a regular file")
    _check_owner(info, path)
    if info.st_nlink > 1:
        raise ConfigError(
            f"{path}: has {info.st_nlink} names (hard links), must have one: "
            f"whoever has another could change it"
        )
    if info.st_mode & _OTHERS:
        _make_private(descriptor, FILE_MODE, path)


def _check_owner(info: os.stat_result, path: Path) -> None:
    if info.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to user {info.st_uid}, must belong to the one that this process runs as, "
            f"{os.geteuid()}"
        )


def _make_private(descriptor: int, mode: int, path: Path) -> None:
    before = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.fchmod(descriptor, mode)
    if os.fstat(descriptor).st_mode & _OTHERS:
        raise ConfigError(
            f"{path}: has mode {before:04o}, and its file system keeps it; "
            f"must be on one that knows permissions"
        )
    log.warning("%s: had mode %04o, made private (%04o)", path, before, mode)


def _kind(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symbolic link"
    return "a directory" if error.errno == errno.EISDIR else "a pipe or device"
