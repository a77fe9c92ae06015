"""`tiermem bench long-context`: complete rows, wrong numbers found, what cannot fit refused, pieces joined."""

from __future__ import annotations

import io
import json
import operator
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Cli, environment, one_thread, save_model, tiny_llama

import tiermem
from tiermem.attention.host import HostBackend
from tiermem.bench.long_context import NAME, checks, decoding, measurement
from tiermem.bench.long_context.decoding import Decoded
from tiermem.cli import long_context_model, main
from tiermem.manager import TierManager
from tiermem.pools import Tier

SMALL = ("bench", "long-context", "--quick", "--device", "cpu", "--new-tokens", "2")
ONE = (*SMALL, "--context", "192", "--gpu", "96KiB", "--cpu-share", "0.5", "--baselines", "none")
KV = "--synthetic-kv"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with one_thread():
        yield Cli(capsys)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def medians(found: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row["median"] for row in found if row["name"] == name]


# ---- complete runs --------------------------------------------------------------------------------

ASKED = (*ONE[:-2], KV)
OVER = "over streaming where nothing stays"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a run of one case with all baselines saves, and what it says meanwhile."""
    path = tmp_path_factory.mktemp("one") / "one.jsonl"
    out, err = io.StringIO(), io.StringIO()
    with one_thread(), redirect_stdout(out), redirect_stderr(err):
        assert main([*ASKED, "--json", "--save", str(path)]) == 0, err.getvalue()
    assert out.getvalue() == path.read_text()
    return path.read_text(), err.getvalue()


@pytest.fixture
def saved(one: tuple[str, str], tmp_path: Path) -> Path:
    """A file with the results of that run."""
    path = tmp_path / "one.jsonl"
    path.write_text(one[0])
    return path


def test_a_run_has_a_row_for_every_part_of_a_step_and_every_baseline(
    one: tuple[str, str], saved: Path
) -> None:
    assert "tiny, 192 tokens: gpu 96KiB, CPU share 0.5" in one[1]
    assert "left" in one[1]
    found = rows(saved)
    for row in found:
        assert row["benchmark"] == NAME
        assert (row["percent_of_ceiling"] is None) != (row["skipped"] is None)
        assert row["budget"] is None or row["name"].startswith("difference")
    names = {row["name"]: row for row in found}
    assert names["transformers' offloaded cache"]["skipped"] == "needs a GPU"
    for name in ("everything in device memory", "streaming, nothing stays", "decode"):
        assert names[name]["median"] > 0
        assert names[name]["repeats"] == 2
    assert names["step: all other work, by itself"]["median"] > 0
    assert names["difference of attention from float64"]["median"] < 1e-5
    assert len(medians(found, "difference of logits")) == 2
    rates = names["decode"]["median"], names["streaming, nothing stays"]["median"]
    assert names[OVER]["median"] == pytest.approx(rates[0] / rates[1])


def test_bytes_of_a_step_are_whole_pages_that_add_up(saved: Path) -> None:
    """12 pages of 16 KiB are full, at most 6 of them hot; of the others the CPU has half."""
    found = rows(saved)
    parts = ("a step: not resident", "a step: streamed", "a step: attended by the CPU")
    everything, streamed, attended = (round(1e9 * medians(found, part)[0]) for part in parts)
    assert everything == streamed + attended
    assert 6 * 16384 <= everything <= 8 * 16384
    assert streamed % 16384 == attended % 16384 == 0
    assert abs(streamed - attended) <= 16384
    assert 1e9 * medians(found, "K and V in GPU")[0] <= 96 << 10


def test_a_finished_run_that_is_resumed_builds_nothing(
    cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(saved)
    monkeypatch.setattr(long_context_model, "random_model", lambda *_: pytest.fail("built"))
    ran = cli(*ASKED, "--save", saved, "--resume")
    assert ran.code == 0, ran.err
    key = operator.itemgetter("name", "median")
    assert sorted(map(key, rows(saved)), key=str) == sorted(map(key, before), key=str)


def test_a_run_that_was_cut_off_goes_on(cli: Cli, saved: Path) -> None:
    before = rows(saved)
    ran = cli(*ASKED, "--save", saved, "--resume", "--cpu-share", "0.5,1")
    assert ran.code == 0, ran.err
    after = rows(saved)
    assert set(medians(before, "decode")) < set(medians(after, "decode"))
    assert len(medians(after, "decode")) == len(medians(after, OVER)) == 2
    assert len(medians(after, "machine: link")) == 1


def test_pieces_are_joined_and_compared(cli: Cli, saved: Path, tmp_path: Path) -> None:
    """Cases and baselines from two files give the ratio that neither has."""
    pieces = [tmp_path / "cases.jsonl", tmp_path / "baselines.jsonl"]
    lines = saved.read_text().splitlines()
    for path, is_case in zip(pieces, (True, False), strict=True):
        chosen = [line for line in lines if ('"gpu_bytes"' in line) == is_case]
        path.write_text("\n".join(line for line in chosen if '"over ' not in line))
    together = tmp_path / "all.jsonl"
    ran = cli("bench", "long-context", "--join", *pieces, "--save", together, "--compare", saved)
    assert ran.code == 0, ran.err
    assert medians(rows(together), OVER) == medians(rows(saved), OVER)
    assert "1.000" in ran.out


def test_a_model_directory_is_prefilled_and_shown_to_people(cli: Cli, tmp_path: Path) -> None:
    path = save_model(tiny_llama(), tmp_path / "model")
    ran = cli(
        *SMALL, "--model", path, "--context", "200", "--gpu", "64KiB,80KiB", "--cpu-share", "auto",
        "--baselines", "streaming", "--ram", "1MiB", "--prefill-chunk", "64",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for words in (
        "gpu 64KiB", "gpu 80KiB", "a cyclic scan finds nothing", "other work", "over streaming",
        "machine: link", "checked: difference of logits", "not resident", "kv prefill",
    ):  # fmt: skip
        assert words in ran.out, words


def test_a_cold_tier_of_one_run_is_not_found_by_the_next(cli: Cli, tmp_path: Path) -> None:
    """Else the second case would find the pages of the first one on the SSD."""
    place, saved = tmp_path / "cold", tmp_path / "f"
    place.mkdir()
    ran = cli(
        *SMALL, "--context", "192", "--gpu", "96KiB", "--ram", "64KiB", "--ssd", "4MiB", "--ssd-path",
        place, "--cpu-share", "0.5,1", "--baselines", "none", KV, "--save", saved,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = rows(saved)
    assert min(medians(found, "a step: attended by the CPU")) > 0
    assert [row["ceiling"] for row in found if row["name"] == "decode"] == [None, None]
    assert min(medians(found, "K and V in SSD")) > 0
    assert list(place.iterdir()) == []


def test_passes_of_several_tokens_are_timed_beside_those_of_one(cli: Cli, tmp_path: Path) -> None:
    saved = tmp_path / "f"
    ran = cli(
        "bench", "long-context", "--quick", "--context", "256", "--gpu", "96KiB", "--cpu-share", "0.5",
        "--baselines", "none", "--pass-tokens", "4,8", "--save", saved,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = [row for row in rows(saved) if row["name"].startswith("pass of several tokens")]
    assert [row["parameters"]["new_tokens"] for row in found] == [4, 8]
    assert all(row["unit"] == "x" and row["median"] > 0 and row["repeats"] == 8 for row in found)
    assert "new tokens 8" in ran.out


# ---- results that are wrong -----------------------------------------------------------------------


def test_a_wrong_part_of_attention_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HostBackend.merge

    def merge(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*arguments)
        out[-1, -1, 0] += 0.01
        return out, lse

    monkeypatch.setattr(HostBackend, "merge", merge)
    ran = cli(*ONE, KV)
    assert ran.code == 1
    assert "differs from float64" in ran.err


def test_a_byte_of_a_page_that_changed_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over wrong bytes is right, so only looking at the bytes finds it."""
    right = checks.check_attention

    def damage(manager: TierManager, *others: Any) -> float:
        worst = right(manager, *others)
        manager._core.mover.sums.verifies = False  # which would find it before
        manager._core.pools[Tier.RAM].memory.tensor[2::16384] ^= 1
        return worst

    monkeypatch.setattr(measurement, "check_attention", damage)
    ran = cli(*ONE, KV)
    assert ran.code == 1
    assert "tokens from 0 on are not what was stored" in ran.err


def test_logits_of_another_run_fail(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = decoding.decode
    runs: list[Decoded] = []

    def decode(*arguments: Any, **others: Any) -> Decoded:
        done = right(*arguments, **others)
        runs.append(done)
        # all other work, everything resident, then the case
        return Decoded(done.seconds, done.logits * 1.01) if len(runs) == 3 else done

    monkeypatch.setattr(measurement, "decode", decode)
    saved = tmp_path / "f"
    ran = cli(*ONE[:-1], "resident", KV, "--save", saved)
    assert ran.code == 1
    assert "gpu 96KiB, CPU share 0.5 against everything in device memory: logits differ" in ran.err
    # what was measured before is kept
    assert medians(rows(saved), "everything in device memory")
    assert not medians(rows(saved), "difference of logits")


# ---- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model: missing"),
        (("--model", "34b"), "model='34b'"),
        (("--model", "33b", "--gpu", "32MiB"), "must be at least 310MiB"),
        (
            ("--model", "33b", "--gpu", "8GiB", "--ram", "4GiB"),
            "more than gpu=8GiB, ram=4GiB and ssd=0 hold; give ram at least",
        ),
        (("--model", "33b", "--ram", "4GiB", "--ssd", "1TiB"), "needs --ssd-path"),
        (("--quick", "--ssd", "1MiB", "--ssd-path", "/nowhere"), "there is no such directory"),
        (("--model", "70b"), "predicted only: weights take"),
        (("--quick", "--ram", "100TiB"), "are free; a smaller ram needs ssd"),
        (("--quick", "--context", "200", KV), "must be a multiple of page_tokens=16"),
        (("--quick", "--pass-tokens", "4,1"), "--pass-tokens 1: must be 2 to 32"),
        (("--quick", "--pass-tokens", "33"), "--pass-tokens 33: must be 2 to 32"),
        (("--quick", "--context", "12k,"), "--context"),
        (("--quick", "--context", "none"), "must be tokens from 1 to 16m"),
        (("--quick", "--gpu", "50%"), "must be a size in bytes"),
        (("--quick", "--dtype", "bfloat16"), "--dtype bfloat16: needs a GPU"),
        (("--quick", "--cpu-share", "2"), "must be 0 to 1, auto or measured"),
        (("--quick", "--baselines", "lru"), "must be of resident, streaming, offloaded, or none"),
        (("--quick", "--resume"), "needs --save"),
        (("--join", "/nowhere"), "cannot be read"),
        (("--quick", "--save", "/nowhere/f"), "there is no directory"),
        (("--quick", "--compare", "/nowhere"), "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], words: str
) -> None:
    monkeypatch.setattr(long_context_model, "random_model", lambda *_: pytest.fail("built"))
    ran = cli("bench", "long-context", "--device", "cpu", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert ran.out == ""


def test_files_of_other_benchmarks_cannot_be_joined(cli: Cli) -> None:
    other = Path(tiermem.__file__).parent.parent / "benchmarks/results/h200.jsonl"
    ran = cli("bench", "long-context", "--join", other)
    assert ran.code == 2
    assert "have no results of long-context" in ran.err


# ---- predictions, and how it starts ---------------------------------------------------------------


def test_models_that_do_not_fit_are_predicted_only(cli: Cli) -> None:
    ran = cli(
        "bench", "long-context", "--device", "cpu", "--model", "7b,13b,33b,70b", "--context", "32k",
        "--gpu", "4GiB", "--predict", "--ram", "200GiB",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    lines = [line for line in ran.out.splitlines() if line.endswith("predicted only")]
    assert [line.partition(",")[0] for line in lines] == ["7b", "13b", "33b", "70b"]
    assert ["does not fit" in line for line in lines] == [False, False, True, True]
    assert "do not fit NVIDIA T4" in ran.out


def test_the_script_is_the_command() -> None:
    script = Path(tiermem.__file__).parent.parent / "benchmarks/long_context.py"
    found = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "usage: tiermem bench long-context" in found.stdout
    assert "examples:\n  tiermem bench long-context --quick" in found.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("fill", [(), (KV,)])
def test_it_runs_on_a_gpu(cli: Cli, tmp_path: Path, fill: tuple[str, ...]) -> None:
    saved = tmp_path / "f"
    ran = cli(
        "bench", "long-context", "--quick", "--device", "cuda", "--context", "1024",
        "--gpu", "128KiB,1MiB", "--cpu-share", "0,0.5,measured", *fill, "--save", saved,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = rows(saved)
    assert all(row["environment"]["gpu"] for row in found)
    assert not any(row["skipped"] == "needs a GPU" for row in found)
    assert len(medians(found, "machine: link, beside RAM reads")) == 1
    assert min(medians(found, "over transformers' offloaded cache")) > 0
