"""`tiermem plan`: answers for machines that are not there, and for this one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli_support import Cli

from tiermem import calibration
from tiermem.calibration import Calibration
from tiermem.machine import Machine
from tiermem.rates import Rates

T4 = ("plan", "--model", "33b", "--context", "32k", "--profile", "t4")
H200 = ("plan", "--model", "33b", "--context", "128k", "--profile", "h200")
HERE = ("plan", "--model", "7b", "--context", "64", "--profile", "auto", "--ram", "0", "--ssd", "0")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], no_gpu: None) -> Cli:
    return Cli(capsys)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine without its GPU, and with no calibration but one that the test makes."""
    monkeypatch.setenv("TIERMEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiermem.device.report.DeviceReport.usable_gpus", lambda _report: ())


def test_a_t4_does_not_hold_33b(cli: Cli) -> None:
    found = cli(*T4, "--json")
    document = found.json()
    assert (found.code, found.err) == (0, "")
    assert document["fits"] is False
    assert document["weights_tier"] == "ssd"
    assert document["tokens_per_s"] == 0
    assert document["limit"] == "capacity"
    assert document["modes"] == []
    fits = {item["name"]: item["fits"] for item in document["weight_formats"]}
    assert fits == {"fp16": False, "int8": False, "int4": False, "3 bits": True, "2 bits": True}


def test_the_text_says_what_would_fit_a_t4(cli: Cli) -> None:
    text = " ".join(cli(*T4).out.split())
    for words in (
        "does not fit: 33b in fp16, 32,768 tokens on NVIDIA T4", "66.7 GB", "int4 18.0 GB",
        "3 bits would fit: 13.9 GB", "3.2 bits a weight",
    ):  # fmt: skip
        assert words in text, words
    assert "tokens/s" not in text
    assert "first token" not in text
    for weights in ("int8", "int4"):
        assert "does not fit" in cli(*T4, "--weights", weights).out


def test_an_h200_holds_33b_with_128k(cli: Cli) -> None:
    found = cli(*H200, "--json")
    document = found.json()
    assert found.code == 0
    assert document["fits"] is True
    assert document["weights_tier"] == "gpu"
    assert document["kv_tier"] == "gpu"
    assert document["limit"] == "hbm"
    assert 30 < document["tokens_per_s"] < 44
    assert document["kv_bytes"] == 33_285_996_544
    assert document["kv_bytes_per_token"] == 253_952
    assert [tier["name"] for tier in document["tiers"]] == ["gpu", "ram", "ssd"]
    assert document["machine"]["rates_from"] == "profile h200"
    assert document["modes"][0]["mode"] == "resident"


def test_the_text_has_the_sums(cli: Cli) -> None:
    text = cli(*H200).out
    for words in (
        "fits: 33b in fp16, 131,072 tokens on NVIDIA H200", "weights in GPU memory", "253,952 bytes",
        "33.3 GB", "most sequences of 131,072", "how a step of", "66.2 GB at", "62 layers x",
        "limited by reading device memory",
    ):  # fmt: skip
        assert words in text, words
    streaming = cli(*H200, "--gpu", "8GiB", "--ram", "16GiB").out
    for words in (
        "streamed + CPU",
        "fixed set and streaming",
        "LRU and streaming",
        "link, meanwhile",
        "disk, before",
    ):
        assert words in streaming, words


def test_a_request_that_the_cpu_shares_shows_how(cli: Cli) -> None:
    text = " ".join(cli(*H200, "--gpu", "8GiB", "--ram", "48GiB").out.split())
    for words in (
        "limited by the link and the CPU, which end at once", "streamed + CPU",
        "f = (X / B_link - T_gpu - L T_h) / (X / B_link + X / B_cpu) = 0.56",
        "B_link 53.3 GB/s and B_cpu 79.4 GB/s", "L T_h 62 x 30 µs", "CPU, meanwhile:",
        "split of X = 24.7 GB in RAM alone",
    ):  # fmt: skip
        assert words in text, words
    document = cli(*H200, "--gpu", "8GiB", "--ram", "48GiB", "--json").json()
    assert document["limit"] == "link and cpu"
    shared, fixed, lru = document["modes"]
    assert [mode["mode"] for mode in (shared, fixed, lru)] == [
        "streamed + CPU", "fixed set and streaming", "LRU and streaming",
    ]  # fmt: skip
    assert document["tokens_per_s"] == shared["tokens_per_s"]
    assert shared["attended_bytes"] == round(shared["cpu_share"] * shared["streamed_bytes"])
    assert shared["cpu_s"] == pytest.approx(shared["link_s"])
    assert shared["hand_over_s"] == pytest.approx(62 * 30e-6)
    assert (fixed["cpu_s"], fixed["cpu_share"], fixed["attended_bytes"]) == (0, 0, 0)
    assert document["machine"]["estimated_rates"] == []


def test_pages_on_the_ssd_are_in_the_sums(cli: Cli) -> None:
    text = " ".join(cli(*H200, "--gpu", "8GiB", "--ram", "16GiB").out.split())
    assert "Y = 7.5 GB on the SSD" in text
    assert "f = ((X + Y) / B_link" in text


def test_options_change_the_answer(cli: Cli) -> None:
    base = cli(*H200, "--json").json()
    two = cli(*H200, "--batch", "2", "--json").json()
    assert two["kv_bytes"] == 2 * base["kv_bytes"]
    small = cli(*H200, "--page-tokens", "16", "--json").json()
    assert small["page_bytes"] * 4 == base["page_bytes"]
    light = cli(*H200, "--weights", "int4", "--json").json()
    assert light["weights_bytes"] < base["weights_bytes"] / 3
    assert light["tokens_per_s"] > base["tokens_per_s"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--model", "34b"), "model='34b'"),
        (("--context", "0"), "must be tokens"),
        (("--context", "long"), "must be tokens"),
        (("--context", "17m"), "must be tokens"),
        (("--profile", "v100"), "profile='v100'"),
        (("--batch", "0"), "must be an int from 1"),
        (("--dtype", "float32"), "float32"),
        (("--dtype", "bfloat16"), "NVIDIA T4 has none"),
        (("--weights", "int3"), "int3"),
        (("--gpu", "8"), "gpu='8'"),
        (("--gpu", "0"), "gpu=0"),
        (("--page-tokens", "48"), "48"),
    ],
)
def test_wrong_arguments_are_refused(cli: Cli, changed: tuple[str, str], words: str) -> None:
    found = cli(*T4, *changed)
    assert (found.code, found.out) == (2, "")
    assert words in found.err


def test_a_model_and_a_context_are_needed(cli: Cli) -> None:
    for missing, given in (("model", ("--context", "32k")), ("context", ("--model", "33b"))):
        found = cli("plan", *given)
        assert found.code == 2
        assert f"--{missing}: is needed, unless --table" in found.err


def test_auto_uses_the_profile_that_matches_and_says_so(cli: Cli) -> None:
    document = cli(*HERE, "--json").json()
    assert document["machine"]["profile"] == "cpu"
    assert document["machine"]["rates_from"].startswith(
        "profile cpu; no calibration of this machine"
    )


def test_auto_uses_the_calibration_of_this_machine(cli: Cli) -> None:
    rates = Rates(hbm_read=7e9, linear_read=3.5e9)
    calibration.save(Calibration(Machine.here(None), time.time() - 3600, False, rates))
    machine = cli(*HERE, "--json").json()["machine"]
    assert machine["rates_from"] == "the calibration of this machine, 1 h 0 min old"
    assert (machine["rates"]["hbm_read"], machine["rates"]["linear_read"]) == (7e9, 3.5e9)
    assert machine["rates"]["disk_read"] == 1e9  # not measured: the profile's


def test_auto_says_why_a_calibration_is_not_used(cli: Cli) -> None:
    path = calibration.save(Calibration(Machine.here(None), time.time(), False, Rates()))
    path.write_text("{")
    text = cli(*HERE, "--json").json()["machine"]["rates_from"]
    assert "is not used: not well formed" in text


@pytest.mark.parametrize("profile", ["a10", "a100", "h100", "cpu"])
def test_every_machine_has_an_answer(cli: Cli, profile: str) -> None:
    found = cli("plan", "--model", "7b", "--context", "2k", "--profile", profile, "--json")
    assert found.code == 0
    assert found.json()["tokens_per_s"] > 0 or not found.json()["fits"]


# ---- many requests at once ------------------------------------------------------------------------


def test_the_table_has_every_shape_on_both_machines(cli: Cli) -> None:
    found = cli("plan", "--table")
    assert (found.code, found.err) == (0, "")
    lines = [line.split() for line in found.out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("t4", "h200")]
    assert {(line[0], line[1]) for line in rows} == {
        (machine, model) for machine in ("t4", "h200") for model in ("7b", "13b", "33b", "70b")
    }
    assert {line[2] for line in rows} == {"16,384", "32,768", "65,536", "131,072"}
    assert "tokens/s predicted" in found.out
    assert "of t4: rates of the CPU's attention are estimates" in found.out
    assert "the link and the CPU, which end at once" in found.out
    assert "does not fit" in found.out


def test_a_table_of_what_is_named(cli: Cli) -> None:
    document = cli(
        "plan", "--table", "--model", "33b,70b", "--context", "64k,128k", "--profile", "h200",
        "--gpu", "4GiB,profile", "--weights", "int8", "--ram", "64GiB", "--json",
    ).json()  # fmt: skip
    rows = document["rows"]
    assert [(row["gpu"], row["model"], row["context"]) for row in rows] == [
        (gpu, model, context)
        for gpu in ("4GiB", "profile")
        for model in ("33b", "70b")
        for context in (65536, 131072)
    ]
    assert {row["weights"] for row in rows} == {"int8"}
    assert all(row["fits"] and row["predicted_tokens_per_s"] > 0 for row in rows)
    assert rows[0]["mode"] == "streamed + CPU"
    assert 0 < rows[0]["cpu_share"] < 1
    alone = cli(
        "plan", "--model", "33b", "--context", "64k", "--profile", "h200", "--gpu", "4GiB",
        "--weights", "int8", "--ram", "64GiB", "--json",
    ).json()  # fmt: skip
    assert rows[0]["predicted_tokens_per_s"] == alone["tokens_per_s"]


def test_a_table_of_this_machine(cli: Cli) -> None:
    (row,) = cli(
        "plan", "--table", "--model", "7b", "--context", "64", "--profile", "auto", "--gpu",
        "profile", "--ram", "0", "--json",
    ).json()["rows"]  # fmt: skip
    assert (row["machine"], row["context"]) == ("auto", 64)


def test_a_table_is_saved_as_results(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "forecast.jsonl"
    assert cli("plan", "--table", "--model", "33b", "--save", path).code == 0
    lines = path.read_text().splitlines()
    assert all('"benchmark": "forecast", "name": "predicted' in line for line in lines)
    assert cli("bench", "table", path).out.startswith("## forecast\n\nTokens/s predicted for")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--table", "--model", "33b,34b"), "model='34b'"),
        (("--table", "--context", "32k,"), "must be tokens"),
        (("--table", "--profile", "t4,v100"), "profile='v100'"),
        (("--table", "--gpu", "8GiB,50%"), "gpu='50%'"),
        (("--table", "--gpu", "8GiB,"), "gpu=''"),
        (("--table", "--dtype", "float16"), "--dtype: is for one forecast"),
        (("--table", "--ssd", "0"), "--ssd: is for one forecast"),
        (("--table", "--save", "/nowhere/x"), "no directory"),
        (("--model", "33b", "--context", "16k,32k"), "several need --table"),
        (("--model", "33b", "--context", "16k", "--save", "x"), "needs --table"),
    ],
)
def test_what_a_table_cannot_be(cli: Cli, given: tuple[str, ...], words: str) -> None:
    found = cli("plan", *given)
    assert (found.code, found.out) == (2, "")
    assert words in found.err
