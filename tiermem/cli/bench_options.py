"""Bench options: what every benchmark does with its results."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.units import Size, SizeKind

DEFAULT_TOLERANCE = 0.10


def add_results(parser: argparse._ActionsContainer) -> None:
    """`--save`, `--compare`, `--tolerance` and `--json`."""
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--compare", metavar="FILE", type=Path, help="compare with saved results")
    parser.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=_share,
        default=DEFAULT_TOLERANCE,
        help="how much worse than --compare a figure may be (10%%)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON a result and nothing else"
    )


def _share(text: str) -> float:
    """A share of 1, as 10% or 0.1."""
    wanted = "must be a share such as 10% or 0.1, from 0.0001% to 100%"
    try:
        size = Size.parse(float(text) if text.replace(".", "", 1).isdigit() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} {wanted}") from None
    if size.kind is not SizeKind.FRACTION:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} {wanted}")
    return size.fraction
