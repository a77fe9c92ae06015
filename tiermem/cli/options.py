"""Options: what the commands' parsers share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from tiermem.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """A parser that keeps line breaks in its texts, takes no abbreviations and raises ConfigError."""

    def __init__(
        self,
        prog: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
        **others: object,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **others,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


Commands = argparse._SubParsersAction  # the type has no public name
"""What `add_subparsers` returns."""


def add_json(parser: argparse._ActionsContainer) -> None:
    """`--json`, which every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else"
    )


def int_from(low: int, high: int) -> Callable[[str], int]:
    """A type of option: an int from `low` to `high`, both included."""

    def parse(text: str) -> int:
        wanted = f"must be an int from {low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} {wanted}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} {wanted}")
        return value

    return parse


def text_up_to(most_chars: int) -> Callable[[str], str]:
    """A type of option: text of at most `most_chars` characters."""

    def parse(text: str) -> str:
        if len(text) > most_chars:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r}... has {len(text)} characters, must be at most {most_chars}"
            )
        return text

    return parse


def number_from(low: float, high: float) -> Callable[[str], float]:
    """A type of option: a number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        wanted = f"must be a number from {low:g} to {high:g}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} {wanted}") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{value:g} {wanted}")
        return value

    return parse
