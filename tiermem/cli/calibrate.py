"""`tiermem calibrate`: measures this machine, and keeps the figures for managers, doctor, stats and plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli.options import CommandParser, Commands, add_json

NAME = "calibrate"

DESCRIPTION = """\
Measure how fast this machine is: link to the GPU, GPU and host memory, disk, ways to copy, attention, a step; and
how fast the CPU attends over pages in RAM, alone and while the link streams others.

Takes less than a minute on a quiet machine; anything else that runs makes the figures too low. They are
kept in a private file (in TIERMEM_CACHE_DIR, else XDG_CACHE_HOME/tiermem, else ~/.cache/tiermem) and used for 30
days, by this version of tiermem, on this machine and GPU alone: a TierManager chooses by them how it copies and
what the CPU attends, `tiermem doctor` and `tiermem stats` show rates as a share of them, `tiermem plan` predicts
from them."""

EXAMPLES = """\
examples:
  tiermem calibrate
  tiermem calibrate --ssd-path /mnt/nvme/cache    # the disk there; the directory need not exist yet
  tiermem calibrate --show                        # what was measured last, without measuring
  tiermem calibrate --quick --json
  tiermem calibrate --forget

Exit code: 0; 1 if something could not be measured; 2 for wrong arguments."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="measure this machine and keep the figures",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='"auto" (the first GPU, or the CPU), "cpu", "cuda" or "cuda:N"',
    )
    parser.add_argument(
        "--ssd-path",
        metavar="DIR",
        type=Path,
        help="where the cold tier would be (where private ones go if not given)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller buffers, fewer repeats: less exact"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show", action="store_true", help="show the kept figures instead of measuring"
    )
    instead.add_argument(
        "--forget", action="store_true", help="remove the kept figures instead of measuring"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli import calibration_run

    if options.forget:
        return calibration_run.forget_kept(options.device, options.json)
    if options.show:
        return calibration_run.show_kept(options.device, options.json)
    return calibration_run.measure_and_keep(
        options.device, options.ssd_path, quick=options.quick, as_json=options.json
    )
