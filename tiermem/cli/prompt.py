"""Prompt: the text that generate starts from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tiermem.errors import ConfigError

MAX_PROMPT_BYTES = 2**30


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt of the command line, its file or stdin; None where random token ids are asked for.

    Raises
    ------
    ConfigError: it is empty, not UTF-8, too large or cannot be read; or random ids and a model's directory.
    """
    if options.prompt_tokens is not None:
        if options.model is not None:
            raise ConfigError("--prompt-tokens: needs --random-weights; give a model a --prompt")
        return None
    if options.random_weights is not None:
        raise ConfigError(
            "--random-weights: needs --prompt-tokens, since random weights have no tokenizer"
        )
    if options.prompt is not None:
        return checked_prompt("--prompt", options.prompt)
    return read_prompt_file(options.prompt_file)


def read_prompt_file(path: Path) -> str:
    """The text of a file, or of stdin for "-". Raises ConfigError as `read_prompt`."""
    return checked_prompt(f"--prompt-file {path}", _read(path))


def _read(path: Path) -> str:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--prompt-file {path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError(f"--prompt-file {path}: must be at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {path}: not UTF-8 text: {error}") from error


def checked_prompt(name: str, text: str) -> str:
    """`text`, if it is a prompt; `name` is for errors. Raises ConfigError as `read_prompt`."""
    if not text:
        raise ConfigError(f"{name}: the prompt is empty; it must have at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise ConfigError(f"{name}: not UTF-8 text") from None
    return text
