"""`tiermem generate`: the tokens of transformers, what it prints, and the difference when there is one."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import (
    CPU,
    TIERS,
    Cli,
    one_thread,
    save_model,
    start,
    tiny_gpt2,
    tiny_llama,
    untiered,
)

from tiermem.cli import loop
from tiermem.cli.verify import Choices, Referee, Verdict
from tiermem.data import data_path
from tiermem.step import Step

REFERENCE = data_path("models/reference")
PROMPT = "".join(random.Random(5).choices("abcdefgh \n", k=300))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with one_thread():
        yield Cli(capsys)


def text_of(token_ids: list[int]) -> str:
    """The text of byte tokens; those beyond 255 are none."""
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@pytest.mark.parametrize("chunk", [1000, 299, 7])
def test_greedy_tokens_are_those_of_model_generate(cli: Cli, model_dir: Path, chunk: int) -> None:
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--max-new-tokens", 24, "--prefill-chunk", chunk,
    )  # fmt: skip
    assert found.code == 0
    document = found.json()
    expected = untiered(model_dir, PROMPT, do_sample=False, max_new_tokens=24)
    assert document["token_ids"] == expected
    assert document["text"] == text_of(expected)
    # The prompt did not fit the hot tier: pages were read from the others.
    assert document["kv_bytes"] > 4 * 32 * 1024
    assert document["stats"]["hit_rates"]["SSD"] > 0


def test_sampled_tokens_are_those_of_model_generate_after_the_same_seed(
    cli: Cli, model_dir: Path
) -> None:
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--max-new-tokens", 24, "--seed", 3, "--temperature", 1.3, "--top-p", 0.9,
    )  # fmt: skip
    torch.manual_seed(3)
    chances = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}
    assert found.json()["token_ids"] == untiered(model_dir, PROMPT, max_new_tokens=24, **chances)


def test_the_end_of_text_ends_the_text(cli: Cli, tmp_path: Path) -> None:
    model = tiny_llama()
    ids = torch.tensor([list(PROMPT.encode())])
    tokens = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    end_id = tokens[7]
    model.generation_config.eos_token_id = end_id
    save_model(model, tmp_path / "model")
    found = cli(
        "generate", "--model", tmp_path / "model", "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--max-new-tokens", 20, "--verify",
    )  # fmt: skip
    document = found.json()
    assert document["token_ids"] == tokens[: tokens.index(end_id) + 1]
    assert document["verify"]["passed"]


def test_the_summary_tells_everything(cli: Cli, model_dir: Path) -> None:
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU,
        "--max-new-tokens", 12, "--verify",
    )  # fmt: skip
    assert found.code == 0, found.err
    expected = untiered(model_dir, PROMPT, do_sample=False, max_new_tokens=12)
    text, _, summary = found.out.partition("\n\nmodel ")
    assert text == text_of(expected)
    for words in (
        "prompt       300 tokens", "new          12 tokens", "tokens/s", "KV cache     156.0 KiB, 4.9 times",
        "all 12 tokens equal those of the untiered run", "hits", "evicted", "4 of 4", "6 of 6",
        "in RAM       attended ", "SSD to GPU", "streamed", "MB/s",
    ):  # fmt: skip
        assert words in summary, words
    assert "\x1b" not in found.out
    assert found.err == ""


def test_the_json_has_every_figure(cli: Cli, model_dir: Path) -> None:
    document = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--max-new-tokens", 3, "--verify",
    ).json()  # fmt: skip
    assert (document["prompt_tokens"], document["new_tokens"]) == (300, 3)
    assert document["attached_tokens"] == 0
    assert document["dtype"] == "float32"
    assert document["model"] == str(model_dir)
    assert 0 < document["first_token_s"] <= document["total_s"]
    assert document["prefill_tokens_per_s"] == pytest.approx(300 / document["first_token_s"])
    assert document["decode_tokens_per_s"] == pytest.approx(
        2 / (document["total_s"] - document["first_token_s"])
    )
    assert document["kv_bytes"] == 303 * 512
    assert document["verify"] == {
        "passed": True, "positions": 3, "tie_logits": 0.0, "ties": 0, "differences": [],
    }  # fmt: skip
    flows = {(flow["src"], flow["dst"]): flow for flow in document["stats"]["flows"]}
    assert flows["SSD", "GPU"]["streamed_bytes"] > 0


def test_a_second_run_attaches_what_the_first_stored(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    arguments = (
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--ssd-path", tmp_path / "store", "--max-new-tokens", 10,
    )  # fmt: skip
    first, second = cli(*arguments).json(), cli(*arguments, "--verify").json()
    assert (first["attached_tokens"], second["attached_tokens"]) == (0, 288)
    assert first["token_ids"] == second["token_ids"]
    assert second["verify"]["passed"]
    assert cli(*arguments, "--no-attach").json()["attached_tokens"] == 0
    assert (tmp_path / "store" / "header.json").is_file()


def test_the_label_names_the_session_that_stored_pages(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = (
        "generate", "--model", model_dir, *TIERS, *CPU, "--json", "--ssd-path", store,
        "--max-new-tokens", 1, "--prompt",
    )  # fmt: skip
    cli(*arguments, PROMPT)
    cli(*arguments, PROMPT[::-1], "--label", "chat-7")
    named = cli("ls", store, "--pages", "--label", "chat-7", "--json").json()
    other = cli("ls", store, "--pages", "--label", "tiermem generate", "--json").json()
    every = cli("ls", store, "--pages", "--limit", 0, "--json").json()
    assert {page["session"] for page in named["pages"]} == {"chat-7"}
    assert {page["session"] for page in other["pages"]} == {"tiermem generate"}
    assert len(every["pages"]) == len(named["pages"]) + len(other["pages"])


@pytest.mark.parametrize("lookup", [(), ("--lookup",)])
def test_damage_is_repaired_and_told(
    cli: Cli, model_dir: Path, tmp_path: Path, lookup: tuple[str, ...]
) -> None:
    arguments = (
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU,
        "--ssd-path", tmp_path / "store", "--max-new-tokens", 10, *lookup,
    )  # fmt: skip
    first = cli(*arguments, "--json").json()
    assert first["computed_again_tokens"] == 0
    slots = max((tmp_path / "store").rglob("*"), key=lambda path: path.stat().st_size)
    for options in (("--json",), ()):
        with slots.open("r+b") as file:
            for start in range(0, slots.stat().st_size, 4096):
                file.seek(start)
                file.write(b"damage")
        found = cli(*arguments, *options)
        assert found.code == 0
        assert "tokens of 1 rows were computed again" in found.err
        if options:
            document = found.json()
            assert document["token_ids"] == first["token_ids"]
            assert document["attached_tokens"] == 288
            assert document["computed_again_tokens"] == 288
            assert document["stats"]["computed_again_tokens"] == 288
        else:
            assert text_of(first["token_ids"]) in found.out
            assert " damaged pages, 288 tokens computed again" in found.out


def test_the_private_directory_is_gone_afterwards(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ("generate", "--model", model_dir, *TIERS, *CPU, "--max-new-tokens", 1, "--json")
    document = cli(*arguments, "--prompt", PROMPT).json()
    assert document["stats"]["ssd_path"].startswith(str(tmp_path / "tmp" / "tiermem-"))
    monkeypatch.setattr(Step, "attend", fail)
    assert cli(*arguments, "--prompt", PROMPT).code == 1
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_private_cold_tier_takes_what_fits(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes, floor = 10 << 20, 1 << 30
    usage = shutil.disk_usage("/")._replace(total=1 << 40, free=floor + free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--ssd", "1GiB",
        "--max-new-tokens", 1, "--json",
    )  # fmt: skip
    assert found.code == 0
    assert "ssd=1GiB: only 10.0 MiB are free in " in found.err
    assert found.json()["stats"]["ssd_disk_bytes"] <= 0.9 * free_bytes


def fail(*_arguments: object, **_options: object) -> torch.Tensor:
    from tiermem.errors import TransferError

    raise TransferError("a copy failed")


def test_a_prompt_from_a_file_or_stdin_is_the_prompt(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments = ("generate", "--model", model_dir, *TIERS, *CPU, "--max-new-tokens", 4, "--json")
    expected = cli(*arguments, "--prompt", PROMPT).json()["token_ids"]
    assert cli(*arguments, "--prompt-file", file).json()["token_ids"] == expected
    with file.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert cli(*arguments, "--prompt-file", "-").json()["token_ids"] == expected


def test_other_dtypes_and_random_shapes_run(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    arguments = ("generate", *TIERS, *CPU, "--max-new-tokens", 4, "--json")
    for dtype in ("float16", "bfloat16"):
        document = cli(
            *arguments, "--model", model_dir, "--prompt", PROMPT, "--dtype", dtype
        ).json()
        assert document["dtype"] == dtype
        assert document["kv_bytes"] == 304 * 256
    shape = tmp_path / "tiny.toml"
    shape.write_text(
        'name = "tiny"\nnum_layers = 2\nhidden_size = 64\nnum_heads = 4\nnum_kv_heads = 2\n'
        'head_dim = 16\nintermediate_size = 96\nvocab_size = 500\ndtype = "float16"\n'
        '[tiers]\ngpu = "1MiB"\nram = "1MiB"\nssd = 0\n'
    )
    random_run = (*arguments, "--random-weights", shape, "--prompt-tokens", 200, "--verify")
    document = cli(*random_run).json()
    assert (document["prompt_tokens"], document["new_tokens"]) == (200, 4)
    assert document["text"] is None
    assert document["verify"]["passed"]
    assert cli(*random_run).json()["token_ids"] == document["token_ids"]
    shown = cli(*(item for item in random_run if item != "--json"))
    assert shown.out.startswith(" ".join(map(str, document["token_ids"])))


def test_a_configuration_file_gives_what_no_option_says(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiers.toml"
    file.write_text(
        f'gpu = "40KiB"\nram = "64KiB"\nssd = "4MiB"\nssd_path = "{tmp_path}/store"\ndevice = "cpu"\n'
    )
    document = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, "--config", file, "--gpu", "32KiB",
        "--page-tokens", 16, "--max-new-tokens", 2, "--json",
    ).json()  # fmt: skip
    tiers = {tier["tier"]: tier["slots"] for tier in document["stats"]["tiers"]}
    assert (tiers["GPU"], tiers["RAM"]) == (4, 8)
    assert document["stats"]["ssd_path"] == f"{tmp_path}/store"


# ---- comparing -----------------------------------------------------------------------------------


def test_a_wrong_token_is_found_and_shown(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.generate

    def wrong(*arguments: Any) -> loop.Generated:
        made = right(*arguments)
        token_ids = list(made.token_ids)
        token_ids[5] = (token_ids[5] + 1) % 256
        return replace(made, token_ids=tuple(token_ids))

    monkeypatch.setattr(loop, "generate", wrong)
    arguments = (
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU,
        "--max-new-tokens", 8, "--verify",
    )  # fmt: skip
    shown = cli(*arguments)
    assert shown.code == 1
    assert "verified     NO: new token 6 is " in shown.out
    document = cli(*arguments, "--json").json()
    assert not document["verify"]["passed"]
    found = document["verify"]["differences"][0]
    assert found["position"] == 5
    assert found["tiered"] == (found["untiered"] + 1) % 256


def test_attention_that_is_off_is_found(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Step.attend

    def off(self: Step, *arguments: Any, **options: Any) -> torch.Tensor:
        return right(self, *arguments, **options).roll(1, dims=-1)

    monkeypatch.setattr(Step, "attend", off)
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU,
        "--max-new-tokens", 8, "--verify",
    )  # fmt: skip
    assert found.code == 1
    assert "verified     NO: " in found.out


def referee_gap(tiered_logits: list[float], untiered_logits: list[float]) -> float | None:
    """The gap that the referee notes when one choice is made from these logits; None for no difference."""
    choices = Choices()
    tiered, scores = torch.tensor([tiered_logits]), torch.tensor([untiered_logits])
    no_ids = torch.empty((1, 0), dtype=torch.int64)
    assert choices(no_ids, tiered) is tiered
    chosen = int(tiered.argmax())
    referee = Referee([chosen], choices)
    assert int(referee(no_ids, scores).argmax()) == chosen
    assert referee.positions == 1
    return referee.differences[0].gap if referee.differences else None


def test_a_tie_in_either_run_counts_as_one() -> None:
    assert referee_gap([1.0, 2.0, 0.0], [1.0, 1.5, 0.0]) is None
    assert referee_gap([1.0, 2.0, 0.0], [2.0, 1.9995, 0.0]) == pytest.approx(5e-4, abs=1e-6)
    assert referee_gap([1.9995, 2.0, 0.0], [3.0, 2.0, 0.0]) == pytest.approx(5e-4, abs=1e-6)
    # The tiered run was undecided, but between other tokens.
    assert referee_gap([1.9995, 2.0, 0.0], [0.0, 2.0, 3.0]) == pytest.approx(1.0)


def test_ties_pass_only_where_rounding_may_decide() -> None:
    choices = Choices()
    choices.best, choices.second, choices.gaps = [1], [0], [1e-4]
    referee = Referee([1], choices)
    referee(torch.empty((1, 0)), torch.tensor([[2.0, 1.0]]))
    differences = tuple(referee.differences)
    assert Verdict(1, 1e-3, differences).errors == ()
    assert Verdict(1, 1e-3, differences).ties == differences
    assert Verdict(1, 0.0, differences).errors == differences


# ---- from outside --------------------------------------------------------------------------------


def test_ctrl_c_closes_everything(model_dir: Path, tmp_path: Path) -> None:
    process = start(
        ["-m", "tiermem", "generate", "--model", str(model_dir), "--prompt", PROMPT, *TIERS, *CPU,
         "--max-new-tokens", "3000"],
        variables={"TMPDIR": str(tmp_path), "TIERMEM_RUNTIME_DIR": str(tmp_path / "run")},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)  # text comes while more is being generated
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "tiermem: interrupted\n")
    assert not list(tmp_path.glob("tiermem*"))
    assert not list((tmp_path / "run" / "tiermem").iterdir())


def test_a_signal_in_the_middle_of_a_step_closes_everything(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    right = Step.attend
    calls = 0

    def ended(self: Step, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self, *arguments, **options)

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TIERMEM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(Step, "attend", ended)
    found = cli("generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU)
    assert (found.code, found.err) == (143, "tiermem: ended by SIGTERM\n")
    assert calls == 7
    assert not list(tmp_path.glob("tiermem*"))
    assert not list((tmp_path / "run" / "tiermem").iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_reference_model_writes_the_same_with_and_without_tiers(cli: Cli) -> None:
    prompt = (data_path("examples/long_prompt.txt")).read_bytes()[:1500].decode(errors="ignore")
    found = cli(
        "generate", "--model", REFERENCE, "--prompt", prompt, *CPU, "--gpu", "1MiB",
        "--ram", "2MiB", "--ssd", "64MiB", "--max-new-tokens", 12, "--verify", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    document = found.json()
    assert document["verify"]["passed"]
    assert document["text"].isprintable() or "\n" in document["text"]
    expected = untiered(REFERENCE, prompt, do_sample=False, max_new_tokens=12)
    assert document["token_ids"] == expected


def test_more_positions_than_a_model_has(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    learned = save_model(tiny_gpt2(), tmp_path / "gpt2")
    arguments = ("generate", *CPU, "--gpu", "4MiB", "--ram", "0", "--prompt", "y" * 120)
    refused = cli(*arguments, "--model", learned, "--max-new-tokens", 9)
    assert refused.code == 2
    assert "the model was made for 128" in refused.err
    assert cli(*arguments, "--model", learned, "--max-new-tokens", 8, "--verify").code == 0
    model = tiny_llama()
    model.config.max_position_embeddings = 100
    rotary = save_model(model, tmp_path / "llama")
    noted = cli(*arguments, "--model", rotary, "--max-new-tokens", 2)
    assert noted.code == 0
    assert "the model was made for 100, so what it writes may make little sense" in noted.err
