"""Options that the commands on a store share."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli.options import CommandParser


def add_store(parser: CommandParser) -> None:
    """The directory of the store."""
    parser.add_argument(
        "store",
        metavar="STORE",
        type=Path,
        help="directory of an SSD store, as given to ssd_path or --ssd-path",
    )


def key_prefix(text: str) -> str:
    """A type of option: the beginning of a page's key."""
    digits = text.lower()
    if not 4 <= len(digits) <= 64 or not set(digits) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(
            f"{text[:70]!r} must be 4 to 64 hexadecimal digits, the beginning of a page's key as "
            f"`tiermem ls` shows it"
        )
    return digits
