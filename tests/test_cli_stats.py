"""`tiermem stats`: managers of other processes are seen while they live, and no longer."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cli_support import Cli, end, environment, start, start_holder

from tiermem.cli import stats_view
from tiermem.cli.manager_text import Rates, manager_lines
from tiermem.cli.snapshot import Snapshot
from tiermem.cli.table import text_width
from tiermem.snapshots import snapshot_dir
from tiermem.stats import FlowStats, SequenceStats, Stats, TierStats
from tiermem.step_record import StepRecord


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of snapshots of this test's own."""
    monkeypatch.setenv("TIERMEM_RUNTIME_DIR", str(tmp_path / "run"))
    return snapshot_dir()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a TierManager, on a store, and the directory that its snapshot is below."""
    path = tmp_path_factory.mktemp("held")
    process = start_holder(path / "store", path / "run")
    yield process, path / "run"
    end(process)


@pytest.fixture
def holder(
    held: tuple[subprocess.Popen[str], Path], runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[str]:
    """That process, to be seen by this test."""
    process, path = held
    monkeypatch.setenv("TIERMEM_RUNTIME_DIR", str(path))
    return process


def example_stats(**changes: object) -> Stats:
    """Figures of every kind."""
    tiers = tuple(
        TierStats(name, 100, 1 << 20, 40, 1, 20, 9, 15, 10, 5, 50 * i, 7, 1234567)
        for i, name in enumerate(("GPU", "RAM", "SSD"))
    )
    values: dict[str, object] = {
        "pid": 4711, "model_id": "m" * 64, "device": "NVIDIA H200", "device_kind": "cuda",
        "started_s": 1000.0, "updated_s": 1090.0, "page_tokens": 64, "tiers": tiers,
        "flows": (FlowStats("GPU", "RAM", 3 << 30, 17, 2, 45.67, 5 << 20),),
        "sequences": (SequenceStats("chat", 4096, 64), SequenceStats("", 8192, 128)),
        "steps": 12345, "in_flight": 3, "published_pages": 99, "prompt_tokens": 1000,
        "attached_tokens": 875, "failed_transfers": 0, "corrupt_pages": 0,
        "staging_device_bytes": 1 << 20, "staging_host_bytes": 2 << 20,
        "device_used_bytes": 5 << 30, "device_total_bytes": 141 << 30, "rss_bytes": 7 << 30,
        "ssd_path": "/data/store", "ssd_disk_bytes": 9 << 30, "ssd_io": "io_uring, direct",
        "attended_bytes": 6 << 30, "attended_s": 0.1, "attended_limit_gb_per_s": 128.0,
        "last_step": StepRecord(1, 8 << 30, 5 << 30, 1 << 30, 6 << 30, 0.06, 0.002, 0.1),
    }  # fmt: skip
    return Stats(**{**values, **changes})  # type: ignore[arg-type]


def snapshot(stats: Stats) -> Snapshot:
    """`stats` as another process reads it."""
    return Snapshot.of(json.loads(json.dumps(stats.to_json())))


# ---- live managers -------------------------------------------------------------------------------


def test_no_manager_is_no_error(cli: Cli) -> None:
    found = cli("stats")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("no live TierManager of this user on this machine\n")
    assert cli("stats", "--pid", 1).out == "no live TierManager in process 1\n"
    assert cli("stats", "--json").json() == {"managers": []}


def test_a_manager_of_another_process_is_seen(cli: Cli, holder: subprocess.Popen[str]) -> None:
    text = cli("stats").out
    for words in (
        f"process {holder.pid} on ",
        "held by a test",
        "96",
        "32.0 KiB",
        "RSS",
    ):
        assert words in text, words
    (manager,) = cli("stats", "--json").json()["managers"]
    assert (manager["pid"], manager["model_id"]) == (holder.pid, "held")
    assert manager["age_s"] >= 0
    tiers = {tier["tier"]: tier for tier in manager["tiers"]}
    assert tiers["GPU"]["slots"] == 4
    assert tiers["RAM"]["slots"] == 6
    assert manager["sequences"] == [{"label": "held by a test", "tokens": 96, "pages": 6}]
    assert manager["steps"] == 2
    assert cli("stats", "--json", "--pid", holder.pid).json()["managers"][0]["pid"] == holder.pid
    assert cli("stats", "--json", "--pid", holder.pid + 1).json() == {"managers": []}


def test_looking_leaves_the_manager_as_it_is(cli: Cli, holder: subprocess.Popen[str]) -> None:
    (file,) = snapshot_dir().iterdir()
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    cli("stats")
    cli("stats", "--json")
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert holder.poll() is None


def test_a_manager_that_was_closed_is_gone(cli: Cli, runtime_dir: Path) -> None:
    process = start_holder()
    assert len(cli("stats", "--json").json()["managers"]) == 1
    end(process)
    assert process.returncode == 0
    assert cli("stats", "--json").json() == {"managers": []}
    assert list(runtime_dir.iterdir()) == []


def test_a_manager_whose_process_was_killed_is_gone(cli: Cli, runtime_dir: Path) -> None:
    process = start_holder()
    process.kill()
    end(process)
    assert process.returncode == -signal.SIGKILL
    assert len(list(runtime_dir.iterdir())) == 1  # nobody could take it away
    assert cli("stats", "--json").json() == {"managers": []}
    assert list(runtime_dir.iterdir()) == []


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start(["-m", "tiermem", "stats"], stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_a_directory_of_snapshots_that_others_may_read_is_refused(
    cli: Cli, runtime_dir: Path
) -> None:
    runtime_dir.chmod(0o755)
    found = cli("stats")
    assert (found.code, found.out) == (2, "")
    assert "must be a directory of this user with mode 0700" in found.err
    runtime_dir.chmod(0o700)


# ---- watching ------------------------------------------------------------------------------------


def test_watching_draws_again_until_ctrl_c_and_leaves_the_terminal_as_it_was(
    holder: subprocess.Popen[str],
) -> None:
    main_end, process_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tiermem", "stats", "--watch", "0.1"],
        stdin=subprocess.DEVNULL,
        stdout=process_end,
        stderr=subprocess.PIPE,
        env=environment(COLUMNS="90", LINES="20"),
    )
    os.close(process_end)
    seen = b""
    while seen.count(b"\x1b[H") < 3:
        seen += read_some(main_end)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
    assert b"Ctrl-C ends it" in seen
    assert b"more lines" in seen  # 20 lines are not enough
    process.send_signal(signal.SIGINT)
    while b"\x1b[?1049l" not in seen:
        seen += read_some(main_end)
    _, err = process.communicate(timeout=60)
    os.close(main_end)
    assert (process.returncode, err) == (0, b"")
    assert b"\x1b[?25h" in seen


class Interrupts:
    """Ctrl-C comes while this is finalized, where Python drops what a signal raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_ctrl_c_at_any_time_ends_watching(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def finds_and_is_interrupted(_pid: int | None) -> list[Snapshot]:
        if len(dropped) > 2:
            raise AssertionError("goes on for ever")
        Interrupts()
        return []

    monkeypatch.setattr(stats_view, "find", finds_and_is_interrupted)
    try:
        assert stats_view.watch(0.001, None, as_json=False) == 0
        assert dropped == [KeyboardInterrupt]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "no live TierManager" in capsys.readouterr().out


def read_some(descriptor: int) -> bytes:
    ready, _, _ = select.select([descriptor], [], [], 60)
    assert ready, "nothing was drawn"
    return os.read(descriptor, 65536)


def test_watching_as_json_gives_a_document_a_line(holder: subprocess.Popen[str]) -> None:
    process = start(["-m", "tiermem", "stats", "--watch", "0.1", "--json"])
    assert process.stdout is not None
    documents = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert [document["managers"][0]["pid"] for document in documents] == [holder.pid] * 3


# ---- text ----------------------------------------------------------------------------------------


def test_the_text_tells_every_figure() -> None:
    text = "\n".join(manager_lines(snapshot(example_stats()), None, None))
    for words in (
        "process 4711 on NVIDIA H200, up 1 min 30 s", "100.0 MiB", "1,234,567", "33.3%", "66.7%",
        "GPU to RAM", "3.0 GiB", "45.7 GB/s", "5.0 MiB", "2 open, 12,288 tokens",
        "12,345 done, 3 pieces of work in flight", "99 pages", "875 of 1,000", "87.5%",
        "5.0 GiB of 141.0 GiB", "7.0 GiB resident (RSS)", "9.0 GiB on disk at /data/store",
        "io_uring, direct", "chat", "8,192", "128", "6.0 GiB by the CPU", "64.4 GB/s",
    ):  # fmt: skip
        assert words in text, words
    assert "trouble" not in text


def test_trouble_and_tiers_that_are_off_are_told() -> None:
    off = TierStats("SSD", 0, 1 << 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    stats = example_stats(
        failed_transfers=2, corrupt_pages=1, ssd_path=None, tiers=(off,), flows=(), sequences=()
    )
    text = "\n".join(manager_lines(snapshot(stats), None, None))
    assert text.endswith("2 failed transfers, 1 damaged pages")
    assert "SSD        off" in text
    assert "SSD              off" in text


def test_tokens_that_were_computed_again_are_told() -> None:
    text = "\n".join(manager_lines(snapshot(example_stats(computed_again_tokens=4096)), None, None))
    assert "0 damaged pages, 4,096 tokens computed again" in text


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    sequences = tuple(SequenceStats("漢字" * 90, 10**9, 10**7) for _ in range(30))
    lines = manager_lines(snapshot(example_stats(sequences=sequences)), width, Rates())
    assert max(map(text_width, lines)) <= width
    assert "and 22 more" in lines[-1]


def test_the_table_of_tiers_is_turned_where_it_does_not_fit() -> None:
    wide = manager_lines(snapshot(example_stats()), 140, None)
    narrow = manager_lines(snapshot(example_stats()), 80, None)
    assert wide[1].split()[:3] == ["tier", "capacity", "pages"]
    assert narrow[1].split() == ["tier", "GPU", "RAM", "SSD"]


def test_labels_cannot_drive_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;title\x07\r\nroot#"
    stats = example_stats(
        sequences=(SequenceStats(evil, 1, 1),), model_id=evil, device=evil, ssd_path=evil
    )
    text = "\n".join(manager_lines(snapshot(stats), 100, None))
    assert not any(ord(character) < 32 for character in text.replace("\n", ""))


def test_figures_of_another_version_are_no_error(cli: Cli, runtime_dir: Path) -> None:
    document = example_stats().to_json()
    del document["steps"]
    assert Snapshot.of(document).stats is None
    assert Snapshot.of({"tiers": 5}).stats is None
    assert manager_lines(Snapshot.of(document), 80, None) == [
        "process 4711: its figures come from another version of tiermem"
    ]


def test_files_that_are_no_snapshots_are_passed_over(cli: Cli, runtime_dir: Path) -> None:
    started_ms = int(psutil.Process().create_time() * 1000)
    (runtime_dir / "notes.json").write_text("{}")
    (runtime_dir / "a-b-c.json").write_text("{}")
    for number, content in enumerate(("", "[]", "{", '"text"', "\0" * 100)):
        (runtime_dir / f"{os.getpid()}-{started_ms}-{number}.json").write_text(content)
    assert cli("stats", "--json").json() == {"managers": []}
    assert (runtime_dir / "notes.json").exists()


def test_rates_are_of_the_time_between_two_snapshots() -> None:
    def at(updated_s: float, moved: int, streamed: int) -> Snapshot:
        flow = FlowStats("RAM", "GPU", moved, 1, 0, 9.0, streamed)
        return snapshot(example_stats(updated_s=updated_s, flows=(flow,)))

    rates = Rates()
    flow = FlowStats("RAM", "GPU", 0, 0, 0, 0.0, 0)
    rates.update(at(1000.0, 0, 0))
    assert rates.gb_per_s(flow) == 0
    rates.update(at(1002.0, 10**9, 3 * 10**9))
    assert rates.gb_per_s(flow) == pytest.approx(2.0)
    rates.update(at(1002.0, 10**9, 3 * 10**9))  # the same one again
    assert rates.gb_per_s(flow) == pytest.approx(2.0)
    rates.update(at(1003.0, 10**9, 3 * 10**9))
    assert rates.gb_per_s(flow) == 0
