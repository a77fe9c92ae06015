"""`tiermem show`: all that is known of one page of an SSD store, or of its chain."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json
from tiermem.cli.store.options import add_store, key_prefix

NAME = "show"

DESCRIPTION = """\
Show all that is known of one page: what it is called, whose it is, where it lies, when it was written and used,
what its checksums are, and whether its bytes are those that were written: they are read and compared.

Nothing of the store is changed or locked; a process that has it in use is not disturbed."""

EXAMPLES = """\
examples:
  tiermem show cache/ cce583f757fe            # the page whose key begins so, as `tiermem ls` shows keys
  tiermem show cache/ cce583f757fe --chain    # and every page of its chain up to it
  tiermem show cache/ cce583f757fe --json     # with the checksum of every layer

Exit code: 0 the page is intact, 1 it is damaged, 2 there is no such page."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="show all that is known of one page or chain",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    parser.add_argument(
        "key",
        metavar="KEY",
        type=key_prefix,
        help="the beginning of the page's key, 4 digits or more",
    )
    parser.add_argument("--chain", action="store_true", help="list the pages before it too")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import show_run

    return show_run.run(options)
