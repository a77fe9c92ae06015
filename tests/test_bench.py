"""`tiermem bench`: every line is complete, wrong bytes and numbers are found, runs are compared."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Cli, one_thread, start

from tiermem.attention.host import HostBackend
from tiermem.bench import disk, environment, pool
from tiermem.bench.compare import compare
from tiermem.bench.result import (
    Better,
    Ceiling,
    Figures,
    Result,
    Subject,
    measured,
    not_measured,
)
from tiermem.bench.result_file import SavedResult, read_results, write_results
from tiermem.bench.suite import BENCHMARKS, question
from tiermem.cli import bench_view
from tiermem.cli.bench import QUESTIONS
from tiermem.device.cpu import CpuDevice
from tiermem.store import ColdStore

QUICK = ("--quick", "--device", "cpu")
ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "gpu": None, "os": "Linux", "tiermem": "0.1.0"}
LINE = {
    "benchmark", "name", "parameters", "unit", "better", "median", "p5", "p95", "repeats",
    "percent_of_ceiling", "ceiling", "ceiling_name", "target_percent", "budget",
    "percent_of_budget", "skipped", "note", "commit", "environment",
}  # fmt: skip


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with one_thread():
        yield Cli(capsys)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def rate(name: str, *values: float) -> Result:
    subject = Subject("copy", name, {"piece_bytes": 4096}, "GB/s")
    return measured(subject, values, Ceiling("most", 100.0))


def save(path: Path, results: Sequence[Result], commit: str = "0123456789abcdef") -> Path:
    write_results(path, [SavedResult(result, ENVIRONMENT, commit) for result in results])
    return path


# ---- every benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_line_has_a_share_of_a_ceiling_or_the_reason_for_none(
    cli: Cli, name: str, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    saved = tmp_path / "results.jsonl"
    ran = cli("bench", name, *QUICK, "--json", "--ssd-path", place, "--save", saved)
    assert (ran.code, ran.err) == (0, "")
    found = lines(ran.out)
    assert len(found) >= 2
    assert lines(saved.read_text()) == found
    for line in found:
        assert set(line) == LINE
        assert line["benchmark"] == name
        assert line["commit"]
        assert line["environment"]["cores"] == len(os.sched_getaffinity(0))
        assert (line["percent_of_ceiling"] is None) != (line["skipped"] is None), line
        if line["median"] is not None:
            assert 0 < line["p5"] <= line["median"] <= line["p95"]
            assert line["repeats"] >= 1
    assert any(line["median"] is not None for line in found)
    assert list(place.iterdir()) == []


def test_every_benchmark_asks_one_question_and_all_of_them_can_be_named() -> None:
    assert [*BENCHMARKS, "all"] == list(QUESTIONS)
    for name in BENCHMARKS:
        assert question(name).endswith("?")
        assert "\n" not in question(name)


def test_people_get_tables(cli: Cli) -> None:
    ran = cli("bench", "pool", *QUICK)
    assert ran.code == 0
    for words in ("machine", "commit", "start-up", "pool 64MiB", "of ceiling", "skipped",
                  "needs a GPU: cudaHostAlloc"):  # fmt: skip
        assert words in ran.out, words


# ---- results that are wrong -----------------------------------------------------------------------


def test_a_byte_that_did_not_arrive_fails_the_benchmark(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = CpuDevice.copy
    calls = 0

    def damaging(device: CpuDevice, *arguments: Any) -> None:
        nonlocal calls
        copy(device, *arguments)
        calls += 1
        target = int(arguments[1][len(arguments[1]) // 2])
        ctypes.c_uint8.from_address(target).value ^= 1

    monkeypatch.setattr(CpuDevice, "copy", damaging)
    ran = cli("bench", "copy", *QUICK, "--save", tmp_path / "f")
    assert calls > 0
    assert ran.code == 1
    assert "1 of 1024 looked at did not arrive as they were" in ran.err
    assert not (tmp_path / "f").exists()


def test_pages_that_come_back_to_the_wrong_places_fail_the_benchmark(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = ColdStore.read
    # every page is intact, as its checksum says, but not where it belongs
    monkeypatch.setattr(
        ColdStore, "read", lambda store, slots, at: read(store, slots, at[::-1].copy())
    )
    ran = cli("bench", "disk", *QUICK, "--ssd-path", tmp_path)
    assert ran.code == 1
    assert "words read back differ from those written" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["attend", "store"])
def test_a_number_that_is_wrong_fails_the_benchmark(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    right = getattr(HostBackend, method)

    def attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*arguments, **options)
        out[-1, -1] *= 1.02
        return out, lse

    def store(*arguments: Any) -> None:
        *before, places = arguments
        right(*before, places.flip(0))

    monkeypatch.setattr(HostBackend, method, attend if method == "attend" else store)
    ran = cli("bench", "kernel", *QUICK)
    assert ran.code == 1
    assert ("differs from the reference" if method == "attend" else "tokens differ") in ran.err


# ---- machines that lack something -----------------------------------------------------------------


def test_without_room_on_the_disk_nothing_is_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    monkeypatch.setattr(disk, "measure_disk", lambda *_, **__: pytest.fail("wrote"))
    monkeypatch.setattr(disk, "DiskCeiling", lambda *_: pytest.fail("wrote"))
    ran = cli("bench", "disk", *QUICK, "--ssd-path", tmp_path)
    assert ran.code == 2
    assert "10485760 bytes are free" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_without_memory_for_the_pool_it_is_skipped(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "host_free_bytes", lambda: 1 << 30)
    ran = cli("bench", "pool", *QUICK, "--json")
    assert ran.code == 0
    assert all("1073741824 are free" in line["skipped"] for line in lines(ran.out))


def test_a_gpu_that_is_not_there_is_refused(cli: Cli) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = cli("bench", "copy", "--quick", "--device", "cuda")
    assert ran.code == 2
    assert "no GPU is usable" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench",), "WHAT"),
        (("bench", "everything"), "everything"),
        (("bench", "pool", "--tolerance", "ten"), "must be a share such as 10% or 0.1"),
        (("bench", "pool", "--tolerance", "8GiB"), "must be a share"),
        (("bench", "pool", *QUICK, "--pool-size", "half"), "--pool-size='half'"),
        (("bench", "pool", *QUICK, "--pool-size", "50%"), "at least 4KiB"),
        (("bench", "pool", *QUICK, "--save", "/"), "no regular file"),
        (("bench", "pool", *QUICK, "--save", "/nowhere/at/all"), "there is no directory"),
        (("bench", "pool", *QUICK, "--compare", "/nowhere"), "cannot be read"),
        (("bench", "disk", *QUICK, "--ssd-path", "/nowhere"), "there is no such directory"),
        (("bench", "table", "/nowhere"), "cannot be read"),
        (("bench", "plot", "/nowhere"), "cannot be read"),
    ],
)
def test_arguments_that_cannot_be(cli: Cli, arguments: Sequence[str], words: str) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert words in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no results"),
        ("{\n", "line 1: not JSON"),
        ("[]\n", "no result of a benchmark"),
        ('{"environment": {}}\n', "parameters=None"),
        ('{"environment": {}, "parameters": {}, "better": "best"}\n', "must be higher or lower"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_result_file(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(text.encode("latin-1"))
    ran = cli("bench", "table", path)
    assert ran.code == 2
    assert words in ran.err


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Interrupted while pages are read back: directory, temporary and saved files are gone."""
    place, saved = str(tmp_path), str(tmp_path / "saved")
    process = start(
        ["-m", "tiermem", "bench", "all", *QUICK, "--json", "--ssd-path", place, "--save", saved]
    )
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["benchmark"] != "disk":
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert err == "tiermem: interrupted\n"
    assert list(tmp_path.iterdir()) == []


# ---- results --------------------------------------------------------------------------------------


def test_shares_of_ceilings_and_budgets() -> None:
    high = rate("a", 50.0, 60.0, 40.0)
    assert (high.percent_of_ceiling, high.percent_of_budget) == (50.0, None)
    low = measured(
        Subject("step", "b", {}, "us", Better.LOWER, target_percent=50), [4.0], Ceiling("c", 1.0)
    )
    assert (low.percent_of_ceiling, low.meets_aim) == (25.0, False)
    for better, value, met in (
        (Better.LOWER, 90.0, True),
        (Better.LOWER, 110.0, False),
        (Better.HIGHER, 110.0, True),
        (Better.HIGHER, 90.0, False),
    ):
        budgeted = measured(Subject("s", "n", {}, "us", better, budget=100.0), [value], "why")
        assert (budgeted.percent_of_budget, budgeted.meets_aim) == (pytest.approx(value), met)
    assert not_measured(high.subject, "no GPU").percent_of_ceiling is None


def test_a_result_has_a_ceiling_or_a_reason() -> None:
    subject = Subject("copy", "n", {}, "GB/s")
    figures = Figures(1.0, 1.0, 1.0, 1)
    for wrong in (
        (figures, None, None),
        (figures, Ceiling("c", 1.0), "reason"),
        (None, Ceiling("c", 1.0), None),
    ):
        with pytest.raises(ValueError, match="copy n"):
            Result(subject, *wrong)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [
        rate("a", 1.0, 2.0, 4.0),
        not_measured(Subject("disk", "b", {"way": "read", "n": 3}, "GB/s"), "no disk"),
        measured(
            Subject("step", "c", {}, "us", Better.LOWER, budget=3.0), [0.1, 0.2], "no ceiling"
        ),
    ]
    path = save(tmp_path / "f", results, "abc+changes")
    back = read_results(path)
    assert [item.result for item in back] == results
    assert {item.commit for item in back} == {"abc+changes"}
    assert back[0].environment == ENVIRONMENT


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "f", [rate("a", 1.0)])
    before = path.read_bytes()
    endless = replace(rate("a", 1.0), ceiling=Ceiling("most", float("inf")))
    with pytest.raises(ValueError, match="JSON compliant"):
        save(path, [endless])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- comparing ------------------------------------------------------------------------------------


def test_ratios_and_what_is_missing() -> None:
    slow = measured(Subject("step", "t", {}, "us", Better.LOWER), [12.0], "none")
    fast = measured(Subject("step", "t", {}, "us", Better.LOWER), [10.0], "none")
    other = replace(slow, subject=replace(slow.subject, benchmark="kernel"))
    found = compare(
        [rate("a", 80.0), rate("new", 1.0), slow], [rate("a", 100.0), rate("old", 1.0), fast, other]
    )
    assert [ratio.ratio for ratio in found.ratios] == pytest.approx([0.8, 1.2])
    assert found.missing_now == ("copy old piece_bytes=4096",)
    assert found.missing_then == ("copy new piece_bytes=4096",)
    assert [ratio.key for ratio in found.worse(0.19)] == ["copy a piece_bytes=4096", "step t"]
    assert found.worse(0.21) == []
    better = compare([fast], [slow])
    assert better.worse(0.0) == []


def run_with(monkeypatch: pytest.MonkeyPatch, *results: Result) -> None:
    monkeypatch.setattr(bench_view, "run_suite", lambda *_: iter(results))


def test_a_worse_run_exits_with_1(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = save(tmp_path / "f", [rate("a", 100.0), rate("old", 5.0)])
    run_with(monkeypatch, rate("a", 89.0))
    ran = cli("bench", "copy", *QUICK, "--compare", before)
    assert ran.code == 1
    for words in ("0.890", "worse", "only then: copy old piece_bytes=4096"):
        assert words in ran.out, words
    assert "1 of 1 figures are worse" in ran.err
    assert "another machine: a CPU" in ran.err
    assert cli("bench", "copy", *QUICK, "--compare", before, "--tolerance", "12%").code == 0
    quiet = cli("bench", "copy", *QUICK, "--compare", before, "--tolerance", "0.05", "--json")
    assert quiet.code == 1
    assert len(lines(quiet.out)) == 1
    assert "0.890" in quiet.err


# ---- the environment ------------------------------------------------------------------------------


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERMEM_COMMIT", raising=False)
    root = Path(environment.tiermem.__file__).parent.parent
    asked = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        assert environment.commit().removesuffix("+changes") == asked.stdout.strip()
    monkeypatch.setenv("TIERMEM_COMMIT", "feed")
    assert environment.commit() == "feed"
    monkeypatch.delenv("TIERMEM_COMMIT")
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    assert environment.commit() == f"version {environment.tiermem.__version__}"


def test_the_driver_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "version"
    monkeypatch.setattr(environment, "DRIVER_FILE", path)
    assert environment.driver_version() is None
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    assert environment.driver_version() == "580.95.05"


# ---- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_on_a_gpu(cli: Cli, name: str, tmp_path: Path) -> None:
    ran = cli("bench", name, "--quick", "--device", "cuda", "--json", "--ssd-path", tmp_path)
    assert ran.code == 0, ran.err
    found = lines(ran.out)
    assert all(line["environment"]["gpu"] for line in found)
    assert not any("needs a GPU" in (line["skipped"] or "") for line in found)
