"""`tiermem gc`: take pages out of an SSD store and give their room back."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json
from tiermem.cli.store.options import add_store, fingerprint_prefix, seconds

NAME = "gc"

DESCRIPTION = """\
Take pages out of an SSD store that is not in use, and give their room back to the file system.

Without further options: what cannot be found anyway, what was set aside or left behind, and free slots. With them,
also the pages that fit all of --unused-for, --model, --salt-fingerprint and --session, and those used least
recently beyond --cap. A page that others which stay are found through stays too."""

EXAMPLES = """\
examples:
  tiermem gc cache/ --dry-run                    # what would go, and how much room that is
  tiermem gc cache/ --unused-for 7d
  tiermem gc cache/ --cap 50GiB                  # the pages used last stay
  tiermem gc cache/ --model 3f2a9c01             # a model id, or how one or its fingerprint begins
  tiermem gc cache/ --salt-fingerprint cda27c6e  # of one tenant, as `tiermem ls` shows it; "none" for no salt
  tiermem gc cache/ --session chat-7             # what this session stored first and no other one needs
  tiermem gc cache/ --json

The room that a store keeps free for itself is given back as well: a process that opens it takes it again as it
writes, up to its own cap.
Exit code: 0 done, 1 it failed, 2 wrong arguments, no store, or one that is in use."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="take pages out of an SSD store and give their room back",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    parser.add_argument("--cap", metavar="SIZE", help="what the store may take on the disk")
    parser.add_argument(
        "--unused-for",
        metavar="TIME",
        type=seconds,
        help="pages that were last used so long ago: 30min, 12h, 7d, 4w",
    )
    parser.add_argument("--model", metavar="ID", help="pages of this model")
    parser.add_argument(
        "--salt-fingerprint",
        metavar="HEX",
        type=fingerprint_prefix,
        help="pages of the salt whose fingerprint begins so",
    )
    parser.add_argument("--session", metavar="LABEL", help="pages that this session stored")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only tell")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import gc_run

    return gc_run.run(options)
