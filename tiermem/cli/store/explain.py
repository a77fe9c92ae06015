"""`tiermem explain`: how much of a prompt an SSD store has, and why not more."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli.options import CommandParser, Commands, add_json
from tiermem.cli.store.options import add_store

NAME = "explain"

DESCRIPTION = """\
Tell how far a prompt is stored, and why it stops there: never stored, evicted and when, found damaged, stored for
another salt, model or shard, or the last page is simply not full.

With --model the prompt is turned into tokens, and the model's own pages are looked for; it is loaded for that,
since its name is made of its weights. With token ids alone, pages of every model in the store are looked for.
Nothing of the store is changed or locked."""

EXAMPLES = """\
examples:
  tiermem explain cache/ --model DIR --prompt-file book.txt
  tiermem explain cache/ --model DIR --prompt "Once upon a time" --salt tenant-7
  tiermem explain cache/ --token-ids-file ids.txt                   # ids apart by spaces, commas or lines
  tiermem explain cache/ --token-ids-file ids.txt --model-id my-model-v1
  tiermem explain cache/ --model DIR --prompt-file book.txt --json

Exit code: 0 whenever there is an answer; 2 for wrong arguments."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="tell how much of a prompt a store has, and why not more",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_store(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help='a file of UTF-8 text, "-" for stdin'
    )
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument(
        "--token-ids-file", metavar="FILE", type=Path, help="a file of token ids instead of a text"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", metavar="DIR", type=Path, help="directory of the Hugging Face model"
    )
    model.add_argument(
        "--model-id", metavar="ID", help="as given to TierManager, for token ids without a model"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the model's weights, keys and values (auto: that of the store)",
    )
    parser.add_argument(
        "--salt", metavar="TEXT", default="", help="as given to open_sequence, as UTF-8 text (none)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", default="0/1", help="of the model, such as 0/2 (0/1: all of it)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli.store import explain_run

    return explain_run.run(options)
