"""How the command starts: help for everything, and nothing heavy imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_support import Cli, environment

import tiermem

HEAVY = {"torch", "transformers", "numpy", "triton", "lmdb", "cuda", "safetensors", "tokenizers"}

LIST_MODULES = """
import sys
from tiermem.cli import main
code = main(sys.argv[1:])
print("modules", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["generate", "--help"], ["stats"], ["stats", "--json"], ["doctor", "-h"],
     ["calibrate", "--help"], ["plan", "--model", "33b", "--context", "32k", "--profile", "t4"],
     ["plan", "--table"], ["ls", "-h"], ["explain", "-h"], ["verify", "-h"]],
)  # fmt: skip
def test_what_answers_at_once_imports_nothing_heavy(arguments: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout
    modules = set(found.stderr.split())
    assert "argparse" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "stats",
        "doctor",
        "calibrate",
        "plan",
        "ls",
        "show",
        "explain",
        "verify",
        "du",
        "gc",
    ],
)
def test_every_command_has_help_with_examples(cli: Cli, command: str) -> None:
    found = cli(command, "--help")
    assert (found.code, found.err) == (0, "")
    assert f"usage: tiermem {command}" in found.out
    assert f"examples:\n  tiermem {command}" in found.out
    assert "--json" in found.out
    assert command in cli("--help").out


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    found = cli("--version")
    assert (found.code, found.out) == (0, f"tiermem {tiermem.__version__}\n")
