"""`tiermem generate --lookup`: the same tokens in fewer passes, and what was accepted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import CPU, TIERS, Cli, one_thread, save_model, tiny_llama, untiered

from tiermem.cli import generate
from tiermem.cli.summary import acceptance_text
from tiermem.cli.verify import Choices, Difference, Referee, Verdict
from tiermem.data import data_path
from tiermem.integrations.transformers import Acceptance, lookup

REFERENCE = data_path("models/reference")
PROMPT = "def add(a, b):\n    return a + b\n\n" * 9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with one_thread():
        yield Cli(capsys)


def check_figures(document: dict[str, Any], most: int) -> None:
    """What is told of drafts adds up."""
    found = document["lookup"]
    assert found["new_tokens"] == document["new_tokens"] - 1
    assert found["tokens_per_pass"] == pytest.approx(found["new_tokens"] / found["passes"])
    assert 0 <= found["accepted_tokens"] <= found["drafted_tokens"] <= most * found["passes"]
    assert found["passes"] + found["accepted_tokens"] - found["new_tokens"] in {0, 1}
    if found["drafted_tokens"]:
        assert found["acceptance"] == found["accepted_tokens"] / found["drafted_tokens"]


@pytest.mark.parametrize("arguments", [("--lookup",), ("--lookup", 1), ("--lookup", 31)])
def test_greedy_tokens_are_those_of_model_generate(
    cli: Cli, model_dir: Path, arguments: tuple[object, ...]
) -> None:
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json",
        "--max-new-tokens", 24, "--prefill-chunk", 100, "--verify", *arguments,
    )  # fmt: skip
    assert found.code == 0, found.err
    document = found.json()
    assert document["token_ids"] == untiered(model_dir, PROMPT, do_sample=False, max_new_tokens=24)
    assert document["verify"]["passed"]
    assert document["verify"]["positions"] == 24
    check_figures(document, int(str(arguments[-1])) if len(arguments) == 2 else 8)


def test_sampled_tokens_are_those_of_model_generate_after_the_same_seed(
    cli: Cli, model_dir: Path
) -> None:
    found = cli(
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json", "--lookup",
        "--max-new-tokens", 24, "--seed", 3, "--temperature", 0.7, "--top-p", 0.9,
    )  # fmt: skip
    torch.manual_seed(3)
    chances = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert found.json()["token_ids"] == untiered(model_dir, PROMPT, max_new_tokens=24, **chances)


def test_without_lookup_nothing_is_said_of_it(cli: Cli, model_dir: Path) -> None:
    arguments = (
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--max-new-tokens", 3,
    )  # fmt: skip
    assert cli(*arguments, "--json").json()["lookup"] is None
    assert "\nlookup " not in cli(*arguments).out
    shown = cli(*arguments, "--lookup", 4).out
    assert "\nlookup       " in shown
    assert " tokens a pass, " in shown


def test_one_token_needs_no_pass_after_the_prompt(cli: Cli, model_dir: Path) -> None:
    arguments = (
        "generate", "--model", model_dir, "--prompt", "ab", *TIERS, *CPU, "--max-new-tokens", 1,
        "--lookup",
    )  # fmt: skip
    document = cli(*arguments, "--json").json()
    assert document["lookup"] == {
        "passes": 0, "new_tokens": 0, "drafted_tokens": 0, "accepted_tokens": 0,
        "acceptance": None, "tokens_per_pass": None,
    }  # fmt: skip
    assert "lookup       no pass after the prompt's" in cli(*arguments).out


def test_a_second_run_attaches_what_the_first_stored(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    arguments = (
        "generate", "--model", model_dir, "--prompt", PROMPT, *TIERS, *CPU, "--json", "--lookup",
        "--ssd-path", tmp_path / "store", "--max-new-tokens", 20,
    )  # fmt: skip
    first, second = cli(*arguments).json(), cli(*arguments, "--verify").json()
    assert (first["attached_tokens"], second["attached_tokens"]) == (0, 288)
    assert first["token_ids"] == second["token_ids"]
    assert second["verify"]["passed"]


@pytest.mark.parametrize("value", ["0", "32", "-1", "many", "1.5"])
def test_drafts_have_1_to_31_tokens(cli: Cli, model_dir: Path, value: str) -> None:
    refused = cli("generate", "--model", model_dir, "--prompt", "x", *CPU, f"--lookup={value}")
    assert refused.code == 2
    assert "--lookup" in refused.err
    assert "must be an int from 1 to 31" in refused.err


def test_the_command_line_knows_the_sizes_of_drafts() -> None:
    assert generate.DRAFT_TOKENS == lookup.DEFAULT_DRAFT_TOKENS
    assert generate.MOST_DRAFT_TOKENS == lookup.MOST_DRAFT_TOKENS


def test_random_weights_accept_next_to_nothing(cli: Cli, tmp_path: Path) -> None:
    shape = tmp_path / "tiny.toml"
    shape.write_text(
        'name = "tiny"\nnum_layers = 2\nhidden_size = 64\nnum_heads = 4\nnum_kv_heads = 2\n'
        'head_dim = 16\nintermediate_size = 96\nvocab_size = 500\ndtype = "float32"\n'
        '[tiers]\ngpu = "64KiB"\nram = "96KiB"\nssd = 0\n'
    )
    arguments = (
        "generate", "--random-weights", shape, "--prompt-tokens", 400, "--max-new-tokens", 30,
        "--page-tokens", 16, *CPU, "--gpu", "64KiB", "--ram", "1MiB", "--json",
    )  # fmt: skip
    document = cli(*arguments, "--lookup", "--verify").json()
    assert document["verify"]["passed"]
    assert document["token_ids"] == cli(*arguments).json()["token_ids"]
    check_figures(document, 8)
    assert document["lookup"]["drafted_tokens"] > 20
    assert document["lookup"]["acceptance"] < 0.1


def test_a_tie_says_how_far_apart_the_logits_were() -> None:
    assert acceptance_text(Acceptance(1000, 2500, 4000, 1500)) == (
        "2.50 tokens a pass, 1,000 passes; 1,500 of 4,000 drafted tokens accepted"
    )
    half = Difference(0, 5, 6, gap=0.01, rounding=0.0156)
    assert Verdict(9, 1e-3, (half,)).ties == (half,)
    assert Verdict(9, 0.0, (half,)).errors == (half,)
    far = Difference(0, 5, 6, gap=0.02, rounding=0.0156)
    assert Verdict(9, 1e-3, (half, far)).errors == (far,)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2**-19), (torch.float16, 2**-6), (torch.bfloat16, 0.125)]
)  # fmt: skip
def test_one_rounding_of_a_logit(dtype: torch.dtype, rounding: float) -> None:
    choices = Choices()
    choices.best, choices.second, choices.gaps = [1], [0], [0.25]
    referee = Referee([1], choices, dtype)
    referee(torch.empty((1, 0)), torch.tensor([[16.0, 15.75]]))
    assert referee.differences == [Difference(0, 1, 0, 0.25, rounding)]


# ---- the reference model -------------------------------------------------------------------------------


@pytest.mark.slow
def test_300_tokens_with_an_eighth_of_the_cache_hot(cli: Cli) -> None:
    """900 tokens of 8 KiB; the hot tier holds 7 pages of 16 of them."""
    prompt = data_path("examples/long_prompt.txt").read_bytes()[:600].decode(errors="ignore")
    new_tokens = 300
    expected = untiered(REFERENCE, prompt, do_sample=False, max_new_tokens=new_tokens)
    assert len(expected) == new_tokens
    arguments = (
        "generate", "--model", REFERENCE, "--prompt", prompt, *CPU, "--page-tokens", 16,
        "--gpu", "900KiB", "--ram", "3MiB", "--ssd", "64MiB", "--max-new-tokens", new_tokens,
        "--json",
    )  # fmt: skip
    passes = {}
    for name, drafts in (("plain", ()), ("drafted", ("--lookup",))):
        document = cli(*arguments, *drafts).json()
        assert document["token_ids"] == expected, name
        hot = document["stats"]["tiers"][0]
        assert document["kv_bytes"] >= 8 * hot["slots"] * hot["page_bytes"]
        assert document["stats"]["hit_rates"]["SSD"] > 0
        passes[name] = document["lookup"]["passes"] if drafts else new_tokens - 1
    assert passes["drafted"] < passes["plain"] / 2


def test_a_prompt_that_repeats_itself_is_drafted_nearly_whole(cli: Cli) -> None:
    prompt = "".join(f"    value = table[key]  # {i % 3}\n" for i in range(20))
    arguments = (
        "generate", "--model", REFERENCE, "--prompt", prompt, *CPU, "--page-tokens", 16,
        "--gpu", "900KiB", "--ram", "8MiB", "--ssd", 0, "--max-new-tokens", 100, "--json",
    )  # fmt: skip
    document = cli(*arguments, "--lookup", 31, "--verify").json()
    assert document["verify"]["passed"]
    check_figures(document, 31)
    assert document["lookup"]["tokens_per_pass"] > 8, document["lookup"]
    assert document["lookup"]["acceptance"] > 0.7, document["lookup"]
