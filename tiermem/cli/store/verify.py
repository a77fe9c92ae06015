"""`tiermem verify`: whether an SSD store is in order, bit by bit."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json
from tiermem.cli.store.options import add_store

NAME = "verify"

DESCRIPTION = """\
Check an SSD store: its header, its index, and the checksums of every page that the index names.

Works on a store in use too: what a process wrote to meanwhile is looked at again, and is no damage. Without
--repair nothing is changed or locked."""

EXAMPLES = """\
examples:
  tiermem verify cache/             # reads all of it, as fast as the disk
  tiermem verify cache/ --quick     # the index, and 4 KiB of each page: not the keys and values themselves
  tiermem verify cache/ --repair    # sets damaged pages aside; the store must not be in use
  tiermem verify cache/ --json

A damaged page is never served: whoever reads it finds out, and computes it again. --repair takes its entry out
of the index, notes it as quarantined, and clears the 4 KiB that name it; its keys and values stay where they are
until the room is used again. Pages that could only be found through it go with it.

Not looked at, since nothing depends on it: slots that no entry names, what fills a page up to a multiple of 4 KiB
where its size is none, and room within the pages of the index that holds no record.
Exit code: 0 all is well, 1 something is damaged (also when it was repaired), 2 no store, or wrong arguments."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="check every page of an SSD store",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do not read keys and values, only what is said of them",
    )
    parser.add_argument("--repair", action="store_true", help="set damaged pages aside")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import verify_run

    return verify_run.run(options)
