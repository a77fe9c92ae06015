"""What the command line refuses: one line on stderr, the right exit code, nothing on stdout, no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import CPU, TIERS, Cli, end, one_thread, save_model, start_holder, tiny_llama
from tiny_models import tiny_model

from tiermem.cli import generation
from tiermem.data import data_path
from tiermem.errors import CorruptPageError, OutOfPagesError, TierMemError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with one_thread():
        yield Cli(capsys)


def refuse(cli: Cli, code: int, words: str, *arguments: object) -> None:
    found = cli(*arguments)
    assert found.code == code, found.err
    assert found.out == ""
    assert words in found.err
    assert found.err.startswith("tiermem: ")
    assert found.err.count("\n") == 1
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no command given: must be one of generate, stats, doctor", ""),
        ("invalid choice: 'swap'", "swap"),
        ("unrecognized arguments: --jso", "stats --jso"),
        ("'x' must be a number from 0.1 to 3600", "stats --watch x"),
        ("0 must be a number from 0.1 to 3600", "stats --watch 0"),
        ("invalid int value: 'x'", "stats --pid x"),
        ("one of the arguments --model --random-weights is required", "generate --prompt x"),
        ("one of the arguments --prompt --prompt-file", "generate --model MODEL"),
        ("not allowed with argument", "generate --model MODEL --prompt x --prompt-file y"),
        ("the prompt is empty", "generate --model MODEL --prompt="),
        ("has 201 characters, must be at most 200", f"generate --prompt x --label {'x' * 201}"),
        ("the prompt is empty", "generate --model MODEL --prompt-file EMPTY"),
        ("No such file", "generate --model MODEL --prompt-file EMPTY.txt"),
        ("Is a directory", "generate --model MODEL --prompt-file MODEL"),
        ("not UTF-8 text", "generate --model MODEL --prompt-file MODEL/model.safetensors"),
        ("--prompt-tokens: needs --random-weights", "generate --model MODEL --prompt-tokens 5"),
        ("--random-weights: needs --prompt-tokens", "generate --random-weights 7b --prompt x"),
        ("must be one of 13b, 33b-mha, 33b, 70b, 7b", "generate --random-weights 7 --prompt-tokens 5"),
        ("no such directory", "generate --model EMPTY --prompt x"),
        ("unit 'MX' is not one of", "generate --model MODEL --prompt x --gpu 2MX"),
        ("gpu='2': has no unit", "generate --model MODEL --prompt x --gpu 2"),
        ("ram='-1MiB': must be", "generate --model MODEL --prompt x --ram=-1MiB"),
        ("gpu=0: must be above 0", "generate --model MODEL --prompt x --gpu 0"),
        ("ssd='1.5': has no unit", "generate --model MODEL --prompt x --ssd 1.5"),
        ("device='tpu': must be", "generate --model MODEL --prompt x --device tpu"),
        ("must be one of a10, a100, cpu", "generate --model MODEL --prompt x --profile t5"),
        ("EMPTY.toml: no such file", "generate --model MODEL --prompt x --config EMPTY.toml"),
        ("0 must be an int from 1", "generate --model MODEL --prompt x --max-new-tokens 0"),
        ("'1.5' must be an int", "generate --model MODEL --prompt x --max-new-tokens 1.5"),
        ("0 must be an int from 1", "generate --model MODEL --prompt x --prefill-chunk 0"),
        ("invalid choice: 17", "generate --model MODEL --prompt x --page-tokens 17"),
        ("-1 must be a number from 0", "generate --model MODEL --prompt x --temperature=-1"),
        ("nan", "generate --model MODEL --prompt x --temperature nan"),
        ("0 must be a number", "generate --model MODEL --prompt x --top-p 0"),
        ("-1 must be an int from 0", "generate --model MODEL --prompt x --seed=-1"),
        ("--verify: compares greedy", "generate --model MODEL --prompt x --verify --temperature 1"),
    ],
)  # fmt: skip
def test_what_can_be_seen_at_once_is_refused_before_anything_is_loaded(
    cli: Cli,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    arguments: str,
) -> None:
    def nothing_is_loaded(*_arguments: object) -> None:
        raise AssertionError("it was about to load the model")

    monkeypatch.setattr(generation, "_generate", nothing_is_loaded)
    (tmp_path / "empty").touch()
    given = [
        item.replace("MODEL", str(model_dir)).replace("EMPTY", str(tmp_path / "empty"))
        for item in arguments.split()
    ]
    refuse(cli, 2, words.replace("EMPTY", str(tmp_path / "empty")), *given)


def test_a_prompt_that_all_tiers_cannot_hold_is_refused_before_it_is_computed(
    cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_is_computed(*_arguments: object) -> None:
        raise AssertionError("it was about to compute the prompt")

    monkeypatch.setattr("tiermem.cli.loop.generate", nothing_is_computed)
    tiers = (*TIERS[:-1], "0", *CPU)
    arguments = ("generate", "--model", model_dir, "--prompt", "a" * 100, *tiers)
    words = "100 tokens of prompt and 500 new ones: their keys and values take"
    refuse(cli, 2, words, *arguments, "--max-new-tokens", 500)


def test_text_that_is_no_text_is_refused(cli: Cli, model_dir: Path) -> None:
    refuse(cli, 2, "--prompt: not UTF-8", "generate", "--model", model_dir, "--prompt", "a\udcffb")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no weights in it"),
        ("tokenizer.json", "no tokenizer in it"),
    ],
)
def test_a_model_directory_that_lacks_something_is_refused(
    cli: Cli, model_dir: Path, tmp_path: Path, missing: str, words: str
) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (copy / missing).unlink()
    refuse(cli, 2, words, "generate", "--model", copy, "--prompt", "x", *CPU)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no-such-model"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\x00"),
    ],
)
def test_a_damaged_model_directory_is_refused(
    cli: Cli, model_dir: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (copy / name).write_bytes(content)
    refuse(cli, 2, str(copy), "generate", "--model", copy, "--prompt", "x", *CPU)


def test_weights_that_are_missing_are_not_made_up(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model_dir, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    words = "1 weights are missing, such as model.layers.1.mlp.up_proj.weight"
    refuse(cli, 2, words, "generate", "--model", copy, "--prompt", "x", *CPU)


def test_a_tokenizer_of_another_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    other = save_model(tiny_model("llama"), tmp_path / "other")
    words = "token id 243, the model has embeddings for 0 to 130"
    refuse(cli, 2, words, "generate", "--model", other, "--prompt", "a\U000fffff", *CPU)


def test_a_model_that_cannot_be_served_is_refused(cli: Cli, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, state_size=4)
    other = save_model(MambaForCausalLM(config), tmp_path / "other")
    words = "TieredCache does not support MambaForCausalLM"
    refuse(cli, 2, words, "generate", "--model", other, "--prompt", "x", *CPU, *TIERS)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("gpu=1KiB: 1024 bytes hold no page of 8192", ("--gpu", "1KiB")),
        ("gpu=1PiB", ("--gpu", "1024TiB")),
        ("bytes of memory are free", ("--ram", "1024TiB")),
        ("one page and its index take at least", ("--ssd", "1KiB")),
        ("bytes are free for", ("--ssd", "1024TiB", "--ssd-path", "STORE")),
        ("Not a directory", ("--ssd-path", "FILE/store")),
        ("neither empty nor a tiermem store", ("--ssd-path", "FULL")),
        ("no GPU is usable", ("--device", "cuda:0")),
    ],
)
def test_tiers_that_cannot_be_had_are_refused(
    cli: Cli, model_dir: Path, tmp_path: Path, words: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    names = {"STORE": "store", "FILE/store": "file/store", "FULL": "full"}
    given = [str(tmp_path / names[item]) if item in names else item for item in options]
    arguments = ("generate", "--model", model_dir, "--prompt", "x", *CPU, *TIERS, *given)
    if words == "no GPU is usable" and gpu_is_usable():
        pytest.skip("there is a GPU")
    refuse(cli, 2, words.replace("1PiB", "1024TiB"), *arguments)


def gpu_is_usable() -> bool:
    from tiermem.device.discovery import survey

    return survey().problem is None


def test_a_store_that_another_process_has_open_is_refused(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = ("generate", "--model", model_dir, "--prompt", "x", *CPU, *TIERS, "--ssd-path")
    holder = start_holder(store)
    try:
        refuse(cli, 2, "another process or manager has this store open", *arguments, store)
    finally:
        end(holder)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (OutOfPagesError, ("no slot can be freed",)),
        (CorruptPageError, ("damaged", (7,))),
        (TierMemError, ("anything\nin two lines",)),
        (OSError, (28, "No space left on device")),
    ],
)
def test_a_run_that_fails_ends_with_one(
    cli: Cli,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    arguments: tuple[Any, ...],
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise kind(*arguments)

    monkeypatch.setattr("tiermem.step.Step.attend", fail)
    words = " ".join(str(kind(*arguments)).split())
    refuse(cli, 1, words, "generate", "--model", model_dir, "--prompt", "x", *CPU, *TIERS)


def test_the_shipped_data_is_where_the_examples_say() -> None:
    assert (data_path("models/reference") / "model.safetensors").is_file()
