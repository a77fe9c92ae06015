"""`tiermem du`: what an SSD store takes on the disk."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json
from tiermem.cli.store.options import add_store

NAME = "du"

DESCRIPTION = """\
Show what an SSD store takes on the disk and for what: pages, free slots, the index, and what was set aside.

The sum is what `du -s` counts. Nothing of the store is changed or locked."""

EXAMPLES = """\
examples:
  tiermem du cache/
  tiermem du cache/ --json

A store takes its room when it is made, up to its cap, so that writing to it cannot fail for want of room: free
slots are counted. `tiermem gc STORE` gives them back."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="show what an SSD store takes on the disk",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import du_run

    return du_run.run(options)
