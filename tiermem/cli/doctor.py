"""`tiermem doctor`: what this machine has, and what tiermem would use of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli.options import CommandParser, Commands, add_json

NAME = "doctor"

DESCRIPTION = """\
Show what this machine has, what tiermem would use of it and why, what is in the way, and how fast `tiermem
calibrate` measured it to be.

Makes a CUDA context on each GPU for a moment, and a small file where the cold tier would be; both are gone
afterwards."""

EXAMPLES = """\
examples:
  tiermem doctor
  tiermem doctor --ssd-path /mnt/nvme/cache    # would this do for the cold tier? It need not exist yet
  tiermem doctor --json

Exit code: 0, also with warnings; 1 if the --ssd-path given cannot be used."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="show what this machine has and what tiermem would use",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--ssd-path",
        metavar="DIR",
        type=Path,
        help="a directory to check for the cold tier (that for private ones if not given)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli import checkup

    return checkup.run(options.ssd_path, options.json)
