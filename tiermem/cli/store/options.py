"""Options that the commands on a store share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tiermem.cli.options import CommandParser

SALT_BYTES = 8
"""Of a salt's fingerprint; as of `store_names`, which is not imported for `--help`."""
MOST_SECONDS = 100 * 366 * 86400
_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(s|min|h|d|w)")
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


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


def fingerprint_prefix(text: str) -> str:
    """A type of option: the beginning of a salt's fingerprint; zeros for "none"."""
    digits = "0" * 2 * SALT_BYTES if text == "none" else text.lower()
    if not 4 <= len(digits) <= 2 * SALT_BYTES or not set(digits) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} must be 4 to 16 hexadecimal digits, the beginning of a salt's fingerprint as "
            f"`tiermem ls` shows it, or none"
        )
    return digits


def seconds(text: str) -> float:
    """A type of option: a time with its unit."""
    match = _TIME.fullmatch(text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not 0 <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} must be a time with a unit, such as 45s, 30min, 12h, 7d or 4w"
        )
    return value
