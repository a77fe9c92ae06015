"""`tiermem stats`: what every live TierManager of this user on this machine is doing."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json, number_from

NAME = "stats"

DESCRIPTION = """\
Show every live TierManager of this user on this machine: its tiers, the bytes it moved, its sequences.

Reads the figures that each manager writes by itself; no manager is disturbed, asked or made to wait."""

EXAMPLES = """\
examples:
  tiermem stats                  once
  tiermem stats --watch          again every second, until Ctrl-C
  tiermem stats --watch 0.2      five times a second
  tiermem stats --json --pid 4711

what the columns mean:
  used       slots that hold a page or are being filled: filling + clean + duplicate + dirty + pinned + open
  clean      can be dropped at once: a copy lies in a lower tier, or nobody refers to the page any more
  duplicate  the lowest copy of a page that is in a hotter tier too; can be dropped as well
  dirty      the only copy of a sealed page: must be written to a lower tier before it can be dropped, and
             stays in the lowest tier as long as a sequence refers to it
  pinned     held by a step or a transfer that is in flight
  open       still being written to
  hits       of the stored pages that steps needed, the share that was found here
  demoted    pages copied from this tier to a lower one, ahead of need or at need
  moved      whole pages that were copied to stay, and slices of pages that were streamed for one step
  of limit   the rate while busy, as a share of what `tiermem calibrate` measured on this route"""

DEFAULT_INTERVAL_S = 1.0


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="show every live TierManager on this machine",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=number_from(0.1, 3600),
        const=DEFAULT_INTERVAL_S,
        help="show it again every SECONDS (1 if not given), until Ctrl-C; "
        "with --json, one document a line",
    )
    parser.add_argument("--pid", type=int, help="only the managers of this process")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli import stats_view

    if options.watch is not None:
        return stats_view.watch(options.watch, options.pid, options.json)
    stats_view.show(options.pid, options.json)
    return 0
