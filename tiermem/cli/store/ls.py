"""`tiermem ls`: what an SSD store holds."""

from __future__ import annotations

import argparse

from tiermem.cli.options import CommandParser, Commands, add_json, int_from
from tiermem.cli.store.options import add_store

NAME = "ls"

DESCRIPTION = """\
List what an SSD store holds: its chains of pages, each a stored prompt, or its sessions, or single pages.

Prompts that begin alike share pages: these are shown once, with what follows them below. Nothing of the store is
changed or locked; a process that has it in use is not disturbed."""

EXAMPLES = """\
examples:
  tiermem ls cache/                          # the 20 chains used last, as a tree
  tiermem ls cache/ --sort size --limit 5
  tiermem ls cache/ --sessions               # the same pages by the session that stored them first
  tiermem ls cache/ --pages --label chat-7   # single pages of one session
  tiermem ls cache/ --limit 0 --json         # everything

what the columns mean:
  chain, page  the beginning of the key of its last page: `tiermem show STORE KEY` tells all of it
  tokens       which tokens of the prompt the pages hold, from the first up to but without the last
  age          since the newest of its pages was written
  used         since one of its pages was last read for a prompt, or written; a process that has the store in
               use writes this down from time to time, and when it closes the store
  hits         how often the page of it that was found most often was found for a prompt
  size         on the disk, with each page's trailer
All pages listed are on the SSD; what a running process has of them in faster tiers, `tiermem stats` tells."""

DEFAULT_LIMIT = 20
MOST_LINES = 1 << 30
SORTS = ("used", "age", "size", "hits")


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="list what an SSD store holds",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    view = parser.add_mutually_exclusive_group()
    view.add_argument(
        "--chains", dest="view", action="store_const", const="chains", help="by stored prompt"
    )
    view.add_argument(
        "--sessions", dest="view", action="store_const", const="sessions", help="by session"
    )
    view.add_argument(
        "--pages", dest="view", action="store_const", const="pages", help="page by page"
    )
    parser.set_defaults(view="chains")
    parser.add_argument("--label", metavar="LABEL", help="only pages that this session stored")
    parser.add_argument(
        "--sort",
        choices=SORTS,
        default="used",
        help="latest use, newest, largest or most often found first (used)",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=int_from(0, MOST_LINES),
        default=DEFAULT_LIMIT,
        help=f"show the first N only, 0 for all ({DEFAULT_LIMIT})",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import listing_view

    return listing_view.run(options)
