"""`tiermem bench long-context`: one request whose K and V are larger than the GPU's share of memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiermem.cli.bench_options import add_results
from tiermem.cli.options import CommandParser, Commands, int_from
from tiermem.layout import PAGE_TOKENS

NAME = "long-context"
BASELINES = ("resident", "streaming", "offloaded")
"""Also what is run when --baselines is not given."""
NONE = "none"
DTYPES = ("float16", "bfloat16")

SUMMARY = "one request larger than the GPU's share of memory, against what the machine allows"
DESCRIPTION = """\
Decode one request whose K and V do not fit --gpu, and compare it with what the machine could do in the same run:
bytes that are not resident over the link, or, where the CPU has a share, over plain RAM reads and the link beside
each other.

--model builds random weights of a shape on the device, or reads a model directory. --synthetic-kv fills the cache
with random K and V through the steps that a prefill would take, without computing them. Several values make a
sweep; each of its cases can also be run by itself, and the files joined.

Every run is checked: K and V are what was stored, a step's output is that of float64, and all runs of a request
give the same logits. What cannot fit is refused before anything is built, with the sizes that are needed."""

EXAMPLES = """\
examples:
  tiermem bench long-context --quick                  tiny shapes, seconds: a preview
  tiermem bench long-context --model 33b --context 128k --gpu 8GiB --synthetic-kv --cpu-share 0,0.65
  tiermem bench long-context --model 33b --context 16k,32k,64k,128k --gpu 2GiB,4GiB,8GiB,16GiB \\
      --synthetic-kv --baselines none --save sweep.jsonl
  tiermem bench long-context --model 33b --context 128k --gpu 8GiB --save sweep.jsonl --resume
  tiermem bench long-context --model 33b --context 128k --dtype bfloat16 --pass-tokens 4,8 --synthetic-kv
  tiermem bench long-context --join a.jsonl b.jsonl --save sweep.jsonl
  tiermem bench long-context --model 7b,13b,33b,70b --context 32k --gpu 4GiB --predict
  tiermem bench plot sweep.jsonl                      tokens/s over the hot budget, one line a context

Baselines, all in the same run: resident is tiermem with everything in device memory; streaming has a hot tier so
small that nothing stays, which is what a cache under LRU comes to, since it finds nothing of a cyclic scan;
offloaded is transformers' offloaded cache. One that cannot run here is skipped with the reason.

Exit code: 0 done; 1 a result was wrong, or worse than --tolerance allows; 2 wrong arguments, or no room."""


def add_parser(kinds: Commands[CommandParser]) -> None:
    """Declare the benchmark."""
    parser = kinds.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--model", metavar="NAMES", help="shapes of configs/models, or model directories"
    )
    parser.add_argument(
        "--context", metavar="TOKENS", help="32768, 32k; several with commas (128k)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights, K and V on a GPU (as the model has it)"
    )
    parser.add_argument("--gpu", metavar="SIZES", help="hot tier; several with commas (8GiB)")
    parser.add_argument("--ram", metavar="SIZE", help="warm tier (as much as all K and V)")
    parser.add_argument("--ssd", metavar="SIZE", default="0", help="cold tier (0)")
    parser.add_argument("--ssd-path", metavar="DIR", type=Path, help="where the cold tier is")
    parser.add_argument(
        "--cpu-share",
        metavar="SHARES",
        default="measured",
        help="of what is in RAM, attended there by the CPU: 0 to 1, auto (as configured), or measured "
        "(the CPU's part of what both can read in this run); several with commas (measured)",
    )
    parser.add_argument(
        "--cpu-threads", type=int_from(1, 4096), help="that attend (all that may be used)"
    )
    parser.add_argument(
        "--synthetic-kv", action="store_true", help="random K and V instead of a prefill"
    )
    parser.add_argument("--new-tokens", type=int_from(1, 1 << 16), help="timed ones of a case (32)")
    parser.add_argument(
        "--offloaded-tokens",
        type=int_from(1, 1 << 16),
        default=3,
        help="timed ones of transformers' offloaded cache (3)",
    )
    parser.add_argument(
        "--prefill-chunk", type=int_from(1, 1 << 20), default=2048, help="tokens of a call (2048)"
    )
    parser.add_argument("--page-tokens", type=int, choices=PAGE_TOKENS, help="tokens a page (128)")
    parser.add_argument(
        "--pass-tokens",
        metavar="COUNTS",
        help="also time passes of so many new tokens, 2 to 32; several with commas",
    )
    parser.add_argument(
        "--baselines",
        metavar="NAMES",
        default=",".join(BASELINES),
        help=f"of {', '.join(BASELINES)}, with commas, or {NONE} (all)",
    )
    parser.add_argument(
        "--predict", action="store_true", help="what plan expects of T4 and H200, too"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, short contexts: a preview, not figures"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what --save has, and run what it lacks"
    )
    parser.add_argument(
        "--join", metavar="FILE", type=Path, nargs="+", help="run nothing: join these results"
    )
    add_results(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    from tiermem.cli import long_context_run

    return long_context_run.run(options)
