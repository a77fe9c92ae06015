"""Private files: what is made private, what is refused, and that no link leads out of a directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_manager import config
from test_store import store_some
from world import LAYOUT

from tiermem import ConfigError, TierManager, private_files
from tiermem.private_files import PrivateDirectory

SECRET = b"of somebody else"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[PrivateDirectory]:
    opened = PrivateDirectory.make(tmp_path / "a" / "b")
    yield opened
    opened.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_what_is_made_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        directory = PrivateDirectory.make(tmp_path / "a" / "b")
        directory.subdirectory("inner").close()
        directory.replace("file", b"x", durable=True)
        os.close(directory.open_file("other", os.O_RDWR | os.O_CREAT))
        directory.close()
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert mode(tmp_path / "a") == 0o700


def test_replacing_is_whole_and_leaves_nothing_beside_it(
    directory: PrivateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.replace("file", b"old", durable=False)

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private_files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        directory.replace("file", b"new", durable=True)
    assert directory.names() == ["file"]
    assert directory.read("file", 3) == b"old"
    with pytest.raises(ConfigError, match="larger than 2 bytes"):
        directory.read("file", 2)


def test_an_existing_file_that_others_can_read_is_made_private(
    directory: PrivateDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory.path / "file"
    path.write_bytes(b"x")
    path.chmod(0o644)
    assert directory.read("file", 10) == b"x"
    assert mode(path) == 0o600
    assert "had mode 0644, made private (0600)" in caplog.text


def test_no_link_is_followed(directory: PrivateDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    link = directory.path / "link"
    link.symlink_to(outside)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(ConfigError, match="not a symbolic link"):
            directory.open_file("link", flags)
    with pytest.raises(ConfigError, match="regular file"):
        directory.check_file("link")
    (directory.path / "file.new").symlink_to(outside)  # where `replace` writes first
    directory.replace("file", b"mine", durable=False)
    directory.replace("link", b"mine", durable=False)
    assert outside.read_bytes() == SECRET
    assert not link.is_symlink()
    inner = tmp_path / "inner"
    inner.mkdir()
    (directory.path / "inner").symlink_to(inner)
    with pytest.raises(ConfigError, match=r"symbolic link, which is not followed; give .*inner"):
        directory.subdirectory("inner")


def test_a_second_name_of_a_file_is_refused(directory: PrivateDirectory, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(SECRET)
    os.link(tmp_path / "outside", directory.path / "hard")
    with pytest.raises(ConfigError, match="2 names"):
        directory.read("hard", 100)


def test_what_is_no_file_is_refused_without_waiting(directory: PrivateDirectory) -> None:
    os.mkfifo(directory.path / "pipe", 0o600)
    (directory.path / "dir").mkdir()
    for name in ("pipe", "dir"):
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY):
            with pytest.raises(ConfigError, match="must be a regular file"):
                directory.open_file(name, flags)
    with pytest.raises(ConfigError, match="is not a directory"):
        directory.subdirectory("pipe")
    assert not directory.check_file("nothing")


def test_a_directory_that_is_renamed_meanwhile_is_still_the_one(
    directory: PrivateDirectory, tmp_path: Path
) -> None:
    """What was checked is what is used: a path that leads elsewhere by now is not looked at again."""
    directory.path.rename(tmp_path / "moved")
    outside = tmp_path / "outside"
    outside.mkdir()
    directory.path.symlink_to(outside)
    directory.replace("file", b"x", durable=False)
    Path(directory.reach("by path")).write_bytes(b"y")
    assert list(outside.iterdir()) == []
    assert directory.names() == ["by path", "file"]
    assert (tmp_path / "moved" / "file").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_refused(
    directory: PrivateDirectory, tmp_path: Path
) -> None:
    directory.replace("file", b"x", durable=False)
    os.chown(directory.path / "file", 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345, must belong to"):
        directory.read("file", 10)
    os.chown(directory.path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        PrivateDirectory.open(directory.path)


def test_disk_bytes_are_those_of_du(directory: PrivateDirectory) -> None:
    directory.replace("file", bytes(100_000), durable=True)
    inner = directory.subdirectory("inner")
    inner.replace("file", bytes(50_000), durable=True)
    (directory.path / "link").symlink_to("/")
    inner.close()
    paths = [directory.path, *directory.path.rglob("*")]
    assert directory.disk_bytes() == sum(path.lstat().st_blocks * 512 for path in paths)


# ---- a store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "header.json", "slots", "index", "index/data.mdb"])
def test_no_link_in_a_store_is_followed(tmp_path: Path, name: str) -> None:
    store_some(tmp_path / "s")
    outside = tmp_path / "outside"
    place = tmp_path / "s" / name
    place.rename(outside)
    place.symlink_to(outside)
    before = {p: p.read_bytes() for p in [outside, *outside.rglob("*")] if p.is_file()}
    with pytest.raises(ConfigError, match="symbolic link"):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s"))
    assert {p: p.read_bytes() for p in before} == before


def test_a_store_behind_a_link_is_refused_with_the_place_to_give(tmp_path: Path) -> None:
    store_some(tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with pytest.raises(ConfigError, match=f"give {tmp_path / 's'}"):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "link"))


def test_a_store_that_others_could_read_is_made_private_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_some(tmp_path / "s")
    for path in [tmp_path / "s", *(tmp_path / "s").rglob("*")]:
        path.chmod(path.stat().st_mode | 0o055)
    store_some(tmp_path / "s")
    for path in [tmp_path / "s", *(tmp_path / "s").rglob("*")]:
        assert mode(path) & 0o077 == 0, path
    assert "made private" in caplog.text


@pytest.mark.parametrize("name", [".", "index"])
def test_a_store_that_others_could_change_is_refused(tmp_path: Path, name: str) -> None:
    store_some(tmp_path / "s")
    (tmp_path / "s" / name).chmod(0o770)
    with pytest.raises(
        ConfigError, match="others can write to it, so that what is in it cannot be"
    ):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "s"))


def test_an_empty_directory_is_made_private_and_one_that_is_no_store_stays_as_it_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o775)
    store_some(tmp_path / "s")
    assert mode(tmp_path / "s") == 0o700
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o755)
    (tmp_path / "home" / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match="neither empty nor a tiermem store"):
        TierManager(LAYOUT, config(8, 8, 20, tmp_path / "home"))
    assert mode(tmp_path / "home") == 0o755
