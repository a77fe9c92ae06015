"""`tiermem bench`: what tiermem does on this machine, as shares of what the machine could do."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli import long_context
from tiermem.cli.bench_options import add_results
from tiermem.cli.options import CommandParser, Commands

NAME = "bench"

DESCRIPTION = """\
Measure tiermem on this machine, and in the same run what the machine could do at most.

Every result is checked after it was timed: bytes arrived as they were, numbers equal a reference. What a machine
has no part for is skipped, with the reason."""

EXAMPLES = """\
examples:
  tiermem bench all --save now.jsonl                  everything; a few minutes
  tiermem bench copy --quick                          a preview
  tiermem bench checksums --save sums.jsonl           what it costs to find damaged bytes
  tiermem bench all --compare then.jsonl              exit code 1 if something became 10% worse
  tiermem bench long-context --model 33b --context 128k --gpu 8GiB --synthetic-kv
                                                      one request larger than the GPU; not part of all
  tiermem bench plot now.jsonl --out plots            a figure of the saved results
  tiermem bench table now.jsonl --into README.md      tables between <!-- bench:NAME --> and <!-- /bench -->

Exit code: 0 done; 1 a result was wrong, or worse than --tolerance allows; 2 wrong arguments."""

MEASURING_EXAMPLES = """\
examples:
  tiermem bench {name} --quick --device cpu            a preview, without a GPU
  tiermem bench {name} --ssd-path /mnt/nvme --save now.jsonl
  tiermem bench {name} --compare now.jsonl             exit code 1 if something became 10% worse"""

QUESTIONS = {
    "copy": "batches of pages between RAM and GPU, against one large copy",
    "disk": "pages to and from the cold tier, against raw direct I/O",
    "kernel": "attention over paged KV, against reading it once and torch's attention",
    "step": "host time of a step, and operations of the page table",
    "pool": "start-up of the warm pool, against cudaHostAlloc",
    "prediction": "decode steps, against what `tiermem plan` predicts",
    "checksums": "steps, copies, reads and writes, against the same without checksums",
    "all": "all of these",
}
PLOT = "plot"
TABLE = "table"


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="measure tiermem and the machine it runs on",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(
        dest="benchmark", metavar="WHAT", required=True, title="what to measure or to show"
    )
    for name, text in QUESTIONS.items():
        _add_measuring(kinds, name, text)
    long_context.add_parser(kinds)
    _add_plot(kinds)
    _add_table(kinds)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli import bench_view

    if options.benchmark == long_context.NAME:
        return long_context.run(options)
    if options.benchmark == PLOT:
        return bench_view.plot(options.files, options.out)
    if options.benchmark == TABLE:
        return bench_view.table(options.files, options.into, options.check)
    return bench_view.measure(options)


def _add_measuring(kinds: Commands[CommandParser], name: str, text: str) -> None:
    parser = kinds.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=MEASURING_EXAMPLES.format(name=name),
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few repeats: a preview, not figures"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--ssd-path",
        metavar="DIR",
        type=Path,
        help="where disk and checksums write (the place of private cold tiers if not given)",
    )
    parser.add_argument(
        "--pool-size", metavar="SIZE", help="of the pools whose start-up is timed (8GiB)"
    )
    add_results(parser)


def _add_plot(kinds: Commands[CommandParser]) -> None:
    text = "draw saved results, one figure a file"
    parser = kinds.add_parser(PLOT, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="results of --save")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where the figures go (beside the files if not given)",
    )


def _add_table(kinds: Commands[CommandParser]) -> None:
    text = "tables of saved results in Markdown"
    parser = kinds.add_parser(TABLE, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="results of --save")
    parser.add_argument(
        "--into",
        metavar="FILE",
        type=Path,
        help="replace what is between <!-- bench:NAME --> and <!-- /bench --> in this file",
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if --into is out of date"
    )
