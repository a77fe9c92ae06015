"""Bounds on every parsed byte: damaged, hostile and foreign files are refused, and that is all."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from test_cli_stats import example_stats
from test_manager import config, grow
from world import LAYOUT

from tiermem import ConfigError, TierConfig, TierManager
from tiermem.cli.manager_text import manager_lines
from tiermem.cli.snapshot import Snapshot
from tiermem.configfile import parse_json, read_table
from tiermem.disk_budget import DiskStats
from tiermem.private_files import PrivateDirectory
from tiermem.snapshots import MAX_SNAPSHOT_BYTES, Publisher, live_snapshots, snapshot_dir

HOSTILE = [
    b"", b"{", b"null", b"[]", b"1e999", b"NaN", b'"text"', b"\xff\xfe", b"\x00" * 100, b"[" * 200_000,
    b'{"a":' * 100_000, b"9" * 100_000, b'{"pid": -Infinity}', b'{"a": 1, "a": 2}',
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 1.5, 1e308, 2**63, 10**4000, -(2**70), "", "x" * 5000, "\x1b[2J", [], {}, [[]], {"a": 1},
]  # fmt: skip


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of snapshots of this test's own."""
    monkeypatch.setenv("TIERMEM_RUNTIME_DIR", str(tmp_path))
    return snapshot_dir()


def own_name() -> str:
    return f"{os.getpid()}-{int(psutil.Process().create_time() * 1000)}-999.json"


def leaves(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The place of every value within a document, the document itself left out."""
    children: list[tuple[object, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def changed(document: object, path: tuple[object, ...], value: object) -> object:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def mutations(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """`data` with bits flipped, cut, doubled, and with pieces of itself elsewhere."""
    for _ in range(count):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            start = rng.randrange(len(bad) or 1)
            bad = bad or bytearray(data)
            match rng.randrange(5):
                case 0:
                    bad[start] ^= 1 << rng.randrange(8)
                case 1:
                    del bad[start : start + rng.randrange(1, 40)]
                case 2:
                    bad[start:start] = bad[rng.randrange(len(bad)) :][: rng.randrange(40)]
                case 3:
                    bad[start : start + 1] = rng.choice(
                        [b"9" * 30, b"e999", b"-", b"[", b'"', b"null"]
                    )
                case 4:
                    bad = bad[: start + 1]
        yield bytes(bad)


# ---- stats files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_snapshot_is_passed_over(runtime_dir: Path, data: bytes) -> None:
    (runtime_dir / own_name()).write_bytes(data)
    assert live_snapshots() == []


def test_what_is_no_private_file_is_passed_over(runtime_dir: Path, tmp_path: Path) -> None:
    path = runtime_dir / own_name()
    (tmp_path / "secret").write_text('{"pid": 1}')
    path.symlink_to(tmp_path / "secret")
    assert live_snapshots() == []
    path.unlink()
    os.link(tmp_path / "secret", path)
    assert live_snapshots() == []
    path.unlink()
    os.mkfifo(path)
    assert live_snapshots() == []
    path.unlink()
    path.mkdir()
    assert live_snapshots() == []
    path.rmdir()
    path.write_bytes(b" " * MAX_SNAPSHOT_BYTES + b"{}")
    assert live_snapshots() == []
    path.write_bytes(b" " * (MAX_SNAPSHOT_BYTES - 2) + b"{}")
    assert live_snapshots() == [{}]


def test_any_value_in_a_snapshot_is_shown_or_another_version() -> None:
    stats = example_stats(
        disk=DiskStats(1 << 30, 1 << 29, 1 << 40, 1 << 30, 77, 1 << 20, -5, "full", 3)
    )
    document = json.loads(json.dumps(stats.to_json()))
    assert Snapshot.of(document).stats == stats
    refused = 0
    places = list(leaves(document))
    for place in places:
        for value in VALUES:
            snapshot = Snapshot.of(changed(document, place, value))  # type: ignore[arg-type]
            refused += snapshot.stats is None
            assert snapshot.age_s >= 0
            text = "\n".join(manager_lines(snapshot, 60, None))
            assert "\x1b" not in text
    assert refused > len(places)


def test_a_manager_goes_on_where_its_stats_cannot_be_written(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with TierManager(LAYOUT, config()) as manager:
        grow(manager, manager.open_sequence(), [1, 2, 3])

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(PrivateDirectory, "replace", fail)
        monkeypatch.setattr(Publisher, "refresh", lambda self, stats: self.publish(stats))
        grow(manager, manager.open_sequence(), [1, 2, 3])
        manager.poll()
        assert caplog.text.count("stats cannot be written") == 1
    assert list(runtime_dir.iterdir()) == []


# ---- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".toml"])
@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_configuration_is_refused_by_name(
    tmp_path: Path, suffix: str, data: bytes
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(data)
    if data == b"" and suffix == ".toml":
        assert read_table(path) == {}
        return
    with pytest.raises(ConfigError, match=r"bad\.(json|toml): "):
        TierConfig.load(path)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_any_mutated_configuration_is_one_or_a_config_error(tmp_path: Path, suffix: str) -> None:
    good = {
        ".json": b'{"gpu": "2MiB", "ram": 0.5, "io_timeout_s": 5, "staging_pages": 7, "ssd": 0}',
        ".toml": b'gpu = "2MiB"\nram = 0.5\nio_timeout_s = 5\nstaging_pages = 7\nssd = 0\n',
    }[suffix]
    path = tmp_path / f"c{suffix}"
    accepted = 0
    for data in mutations(good, random.Random(2), 500):
        path.write_bytes(data)
        try:
            loaded = TierConfig.load(path)
        except ConfigError:
            continue
        accepted += 1
        assert TierConfig.from_table(loaded.to_table()) == loaded
    assert accepted > 5


@pytest.mark.parametrize("key", ["ssd_write_budget", "ssd_free_floor", "gpu", "io_timeout_s"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "c.json"
    for text in (
        "1e999",
        "NaN",
        "-Infinity",
        "9" * 5000,
        "-1",
        "[1]",
        "true",
        '"1e9GiB"',
        '"nan%"',
    ):
        path.write_text(f'{{"{key}": {text}}}')
        with pytest.raises(ConfigError):
            TierConfig.load(path)


def test_json_is_strict() -> None:
    for text in ('{"a": 1, "a": 1}', "NaN", "[-Infinity]", '{"a": {"b": 1, "b": 2}}'):
        with pytest.raises(ConfigError):
            parse_json(text)
    assert parse_json('{"a": [1.5e10, -3, null, true, "x"]}') == {
        "a": [1.5e10, -3, None, True, "x"]
    }


# ---- nobody listens --------------------------------------------------------------------------------


def test_a_manager_listens_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket is so much as made: not by opening, stepping, flushing, looking from outside or closing."""
    made: list[object] = []
    real: Callable[..., None] = socket.socket.__init__

    def note(self: socket.socket, *args: object, **kwargs: object) -> None:
        made.append(args)
        real(self, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "__init__", note)
    before = sockets()
    with TierManager(LAYOUT, config(4, 4, 20, tmp_path / "s")) as manager:
        grow(manager, manager.open_sequence(), list(range(50)))
        manager.flush()
        live_snapshots()
        assert sockets() == before
    assert made == []


def sockets() -> set[int]:
    """Inodes of this process's sockets."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            info = entry.stat()
        except OSError:
            continue
        if stat.S_ISSOCK(info.st_mode):
            found.add(info.st_ino)
    return found
