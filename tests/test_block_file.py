"""Files: what opening, growing and syncing them leaves behind, also when it fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from io_support import (
    FILE_BYTES,
    PAGE,
    path_fixture,  # noqa: F401
)

from tiermem._core import BlockFile, FaultOps, FileCall, OpenMode


def test_a_new_file_is_private_and_allocated(path: Path) -> None:
    with BlockFile(path, FILE_BYTES + 1, OpenMode.CREATE) as file:
        assert file.path == str(path) and file.size_bytes == FILE_BYTES + 1
        assert file.allocated_bytes == path.stat().st_blocks * 512 >= FILE_BYTES + 1
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_size == FILE_BYTES + 1
        file.sync()


def flags_of_descriptors(path: Path) -> list[int]:
    """Flags of this process's descriptors of a file, as the kernel tells them."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink() and descriptor.resolve() == path.resolve():
            lines = (Path("/proc/self/fdinfo") / descriptor.name).read_text().splitlines()
            found += [int(line.split()[1], 8) for line in lines if line.startswith("flags:")]
    return found


def test_descriptors_block_and_are_not_inherited(path: Path) -> None:
    with BlockFile(path, PAGE, OpenMode.CREATE) as file:
        flags = flags_of_descriptors(path)
        assert len(flags) == 1 + file.is_direct
        assert all(each & os.O_CLOEXEC and not each & os.O_NONBLOCK for each in flags)
    assert not flags_of_descriptors(path)


def takes_direct_io(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_direct_where_the_file_system_allows_it(path: Path) -> None:
    with BlockFile(path, PAGE, OpenMode.CREATE) as file:
        assert file.is_direct == takes_direct_io(path)
    with BlockFile("/proc/self/status", 0, OpenMode.READ_ONLY) as refused:
        assert not refused.is_direct


@pytest.mark.parametrize("name", ["slots", b"slots", "sl\udcffots"])
def test_any_path(tmp_path: Path, name: str | bytes) -> None:
    where = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    with BlockFile(where, PAGE, OpenMode.CREATE) as file:
        assert os.fsencode(file.path) == where
        assert os.stat(where).st_size == PAGE  # noqa: PTH116 -- bytes are no Path


def test_an_existing_file_keeps_its_bytes(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE) as file:
        assert file.size_bytes == FILE_BYTES
    assert path.read_bytes() == b"x" * 5000 + bytes(FILE_BYTES - 5000)
    with BlockFile(path, PAGE, OpenMode.CREATE) as file:
        assert file.size_bytes == FILE_BYTES
    with BlockFile(path, 0, OpenMode.EXISTING) as file:
        assert file.size_bytes == FILE_BYTES


def test_resize_grows_and_shrinks(path: Path) -> None:
    with BlockFile(path, 2 * PAGE, OpenMode.CREATE) as file:
        file.resize(64 * PAGE)
        assert file.size_bytes == path.stat().st_size == 64 * PAGE <= file.allocated_bytes
        file.resize(PAGE)
        assert file.size_bytes == path.stat().st_size == PAGE
        for size_bytes in (0, -1):
            with pytest.raises(ValueError, match=f"size_bytes={size_bytes}"):
                file.resize(size_bytes)


@pytest.mark.parametrize("mode", [OpenMode.READ_ONLY, OpenMode.EXISTING])
def test_files_that_must_be_there(path: Path, mode: OpenMode) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        BlockFile(path, 0, mode)
    assert caught.value.filename == str(path)
    path.write_bytes(bytes(PAGE))
    with pytest.raises(OSError, match=f"has {PAGE} bytes, needs {PAGE + 1}") as short:
        BlockFile(path, PAGE + 1, mode)
    assert short.value.errno == errno.ENODATA
    assert path.stat().st_size == PAGE


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(bytes(PAGE))
    link.symlink_to(target)
    os.mkfifo(pipe)
    for mode in OpenMode:
        for where, error in ((link, errno.ELOOP), (pipe, errno.EINVAL)):
            with pytest.raises(OSError, match=where.name) as caught:
                BlockFile(where, PAGE, mode)
            assert (caught.value.errno, caught.value.filename) == (error, str(where))
    for mode in (OpenMode.EXISTING, OpenMode.CREATE):
        with pytest.raises(IsADirectoryError):
            BlockFile(tmp_path, PAGE, mode)
    with pytest.raises(OSError, match="not a regular file"):
        BlockFile(tmp_path, 0, OpenMode.READ_ONLY)
    with pytest.raises(OSError, match="not a regular file"):
        BlockFile("/dev/full", 0, OpenMode.EXISTING)
    with pytest.raises(ValueError, match="size_bytes=0"):
        BlockFile(tmp_path / "new", 0, OpenMode.CREATE)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(path: Path) -> None:
    huge = 1 << 55
    with pytest.raises(OSError, match="are free") as caught:
        BlockFile(path, huge, OpenMode.CREATE)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert not path.exists()
    path.write_bytes(b"kept" * 1000)
    with pytest.raises(OSError, match="are free"):
        BlockFile(path, huge, OpenMode.CREATE)
    assert path.read_bytes() == b"kept" * 1000


def test_a_disk_that_fills_up_meanwhile_leaves_the_file_as_it_was(path: Path) -> None:
    faults = FaultOps()
    faults.fail(FileCall.ALLOCATE, first=1, error=errno.ENOSPC, count=3)
    with pytest.raises(OSError, match="cannot grow from 0 to") as caught:
        BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()
    path.write_bytes(b"kept")
    with pytest.raises(OSError, match="cannot grow from 4 to"):
        BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults)
    with BlockFile(path, 4, OpenMode.EXISTING, faults=faults) as file:
        with pytest.raises(OSError, match="cannot grow from 4 to"):
            file.resize(FILE_BYTES)
        assert file.size_bytes == 4
    assert path.read_bytes() == b"kept"


def test_without_fallocate_zeros_are_written(path: Path) -> None:
    faults = FaultOps()
    faults.fail(FileCall.ALLOCATE, first=1, error=errno.EOPNOTSUPP, count=100)
    faults.shorten(FileCall.WRITE, first=1, num_bytes=1000)
    faults.fail(FileCall.WRITE, first=2, error=errno.EINTR)
    path.write_bytes(b"kept")
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults) as file:
        assert file.allocated_bytes >= FILE_BYTES
    assert path.read_bytes() == b"kept" + bytes(FILE_BYTES - 4)
    faults.fail(FileCall.WRITE, first=faults.num_calls(FileCall.WRITE) + 3, error=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        BlockFile(path, 4 * FILE_BYTES, OpenMode.CREATE, faults=faults)
    assert path.stat().st_size == FILE_BYTES


def test_a_failed_sync_is_told(path: Path) -> None:
    faults = FaultOps()
    faults.fail(FileCall.SYNC, first=1, error=errno.EINTR)
    faults.fail(FileCall.SYNC, first=3, error=errno.EIO)
    with BlockFile(path, PAGE, OpenMode.CREATE, faults=faults) as file:
        file.sync()
        with pytest.raises(OSError, match="cannot sync"):
            file.sync()


def test_faults_that_cannot_be_planned() -> None:
    faults = FaultOps()
    with pytest.raises(ValueError, match="counted from 1"):
        faults.hold(FileCall.READ, first=0)
    with pytest.raises(ValueError, match="error=0"):
        faults.fail(FileCall.READ, first=1, error=0)
    with pytest.raises(ValueError, match="shortened"):
        faults.shorten(FileCall.SYNC, first=1, num_bytes=1)
