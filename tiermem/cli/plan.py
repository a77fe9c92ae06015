"""`tiermem plan`: whether a model and its contexts fit a machine, where they lie, and how fast they decode."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tiermem.cli.options import CommandParser, Commands, add_json, int_from
from tiermem.layout import PAGE_TOKENS

NAME = "plan"

DESCRIPTION = """\
Predict how a model with long contexts runs on a machine: whether weights and K and V fit and in which tier, how
memory is split, the largest batch and context, the tokens a second of every mode, and what limits them.

The machine is one of the profiles (data-sheet or measured rates), or with `auto` this one, as `tiermem calibrate`
measured it. Nothing is loaded or allocated. What the CPU attends in RAM while the link streams is chosen so that
both end at once; the formula is shown with its numbers.

With --table many requests are predicted at once, each with the widest weights that fit: models and contexts, on a
T4 and an H200 unless others are named."""

EXAMPLES = """\
examples:
  tiermem plan --model 33b --context 128k --profile h200
  tiermem plan --model 33b --context 32k --profile t4           # does not fit: says what would
  tiermem plan --model 7b --context 16k --profile t4 --weights int4 --batch 4
  tiermem plan --model ~/models/llama --context 1m --ram 100GiB --ssd 1TiB --json
  tiermem plan --model 33b --context 128k --profile h200 --gpu 8GiB --ram 48GiB    # link and CPU beside each other
  tiermem plan --table                                          # 7b to 70b, 16k to 128k, on a T4 and an H200
  tiermem plan --table --model 33b,70b --context 128k --profile auto --gpu 4GiB,8GiB
  tiermem plan --table --save forecast.jsonl                    # for tiermem bench table, beside measured figures

Exit code: 0 whenever there is an answer, also "it does not fit"; 2 for wrong arguments."""

SIZES = {
    "gpu": "the profile's; with --table several, joined by commas, and 8GiB too if not given",
    "ram": "the profile's; with --table 90%% of what is free",
    "ssd": "the profile's",
}
_CONTEXT = re.compile(r"([0-9]{1,9})([kKmM]?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="predict what fits a machine and how fast it decodes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a shape of configs/models (7b, 8b, 13b, 33b, 33b-mha, 70b) or a directory with config.json; with "
        "--table several, joined by commas",
    )
    parser.add_argument(
        "--context",
        type=contexts,
        metavar="TOKENS",
        help="of each sequence: 32768, 32k, 1m (k is 1,024); with --table several, joined by commas",
    )
    parser.add_argument(
        "--profile",
        help="a machine of configs/machines (t4, a10, a100, h100, h200, cpu), or auto: this one (auto; with "
        "--table t4,h200)",
    )
    parser.add_argument(
        "--batch", type=int_from(1, 1 << 16), default=1, help="sequences decoded together (1)"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), help="of K and V (the model's if not given)"
    )
    parser.add_argument(
        "--weights",
        choices=("fp16", "int8", "int4"),
        default="fp16",
        help="their format (fp16); with --table the widest that is tried",
    )
    for tier in ("gpu", "ram", "ssd"):
        parser.add_argument(
            f"--{tier}", metavar="SIZE", help=f"size of the {tier.upper()} tier ({SIZES[tier]})"
        )
    parser.add_argument(
        "--page-tokens", type=int, choices=PAGE_TOKENS, default=64, help="tokens a page (64)"
    )
    parser.add_argument(
        "--ssd-path", metavar="DIR", type=Path, help="with auto: where the cold tier would be"
    )
    parser.add_argument(
        "--table", action="store_true", help="a table of many requests instead of one answer"
    )
    parser.add_argument(
        "--save", metavar="FILE", type=Path, help="with --table: write it as results of a benchmark"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    if options.table:
        from tiermem.cli import plan_table

        return plan_table.run(options)
    from tiermem.cli import plan_run

    return plan_run.run(options)


def contexts(text: str) -> tuple[int, ...]:
    """Several numbers of tokens, joined by commas."""
    return tuple(tokens(part) for part in text.split(","))


def tokens(text: str) -> int:
    """A number of tokens: "32768", "32k", "1m"."""
    match = _CONTEXT.fullmatch(text.strip())
    value = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if not 1 <= value <= 1 << 24:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} must be tokens from 1 to 16m, such as 32768, 32k or 1m"
        )
    return value
