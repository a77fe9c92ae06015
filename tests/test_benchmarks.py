"""The comparisons with peers: their quick versions run, give complete lines, and find wrong tokens and logits."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cli_support import one_thread

import tiermem

BENCHMARKS = Path(tiermem.__file__).parent.parent / "benchmarks"
PEERS = ("gpt2_decode", "resident_33b")


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with one_thread():
        yield
    for name in (*PEERS, "common", "contiguous_cache"):
        sys.modules.pop(name, None)


def script(name: str) -> tuple[ModuleType, ModuleType]:
    """The comparison and what it shares with others."""
    return importlib.import_module(name), importlib.import_module("common")


def run(name: str, *arguments: str) -> int:
    peer, common = script(name)
    code: int = common.main(peer.__doc__, peer.compare, ["--quick", *arguments])
    return code


@pytest.mark.parametrize("name", PEERS)
def test_every_line_has_a_share_of_a_ceiling_or_the_reason_for_none(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "results.jsonl"
    assert run(name, "--device", "cpu", "--json", "--save", str(saved)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in saved.read_text().splitlines()] == found
    assert len(found) >= 5
    for line in found:
        assert line["benchmark"] == name
        assert line["median"] > 0
        assert (line["percent_of_ceiling"] is None) != (line["skipped"] is None)
    assert sum(line["unit"] == "x" for line in found) >= 1


def test_a_token_that_is_not_the_likeliest_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, common = script("gpt2_decode")

    def wrong(*arguments: object) -> tuple[list[int], list[float]]:
        tokens, seconds = common.decode_loop(*arguments)
        return [*tokens[:-1], (tokens[-1] + 1) % 257], seconds

    monkeypatch.setattr(peer, "WAYS", {"loop": wrong})
    assert run("gpt2_decode", "--device", "cpu") == 1
    assert "short of the largest" in capsys.readouterr().err


def test_logits_that_differ_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, _ = script("resident_33b")
    right = peer._tiered

    def wrong(*arguments: object) -> tuple[list[float], torch.Tensor]:
        seconds, logits = right(*arguments)
        return seconds, logits.roll(1, dims=0)

    monkeypatch.setattr(peer, "_tiered", wrong)
    assert run("resident_33b", "--device", "cpu") == 1
    assert "tiermem: logits differ" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", PEERS)
def test_comparisons_run_on_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--device", "cuda", "--json") == 0
    assert all(
        json.loads(line)["environment"]["gpu"] for line in capsys.readouterr().out.splitlines()
    )
