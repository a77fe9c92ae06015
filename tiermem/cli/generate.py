"""`tiermem generate`: let a Hugging Face model write on, its KV cache in tiers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tiermem.cli.options import (
    CommandParser,
    Commands,
    add_json,
    int_from,
    number_from,
    text_up_to,
)

NAME = "generate"

DESCRIPTION = """\
Let a language model continue a prompt with its KV cache in tiers, and show what went where.

The text goes to stdout as it is generated, followed by a short table. Nothing is ever downloaded: the model is a
local directory as `save_pretrained` writes it (config.json, weights, tokenizer)."""

EXAMPLES = """\
examples:
  tiermem generate --model DIR --prompt-file book.txt --gpu 2MiB --ram 8MiB --ssd 1GiB
  tiermem generate --model DIR --prompt "Once upon a time" --max-new-tokens 50 --temperature 0.8 --seed 1
  tiermem generate --model DIR --prompt-file book.txt --ssd 10GiB --ssd-path cache/   # reused by the next run
  tiermem generate --model DIR --prompt-file book.txt --gpu 2MiB --verify             # compare with no tiers
  tiermem generate --model DIR --prompt-file code.py --gpu 2MiB --lookup              # several tokens a pass
  tiermem generate --random-weights 7b --prompt-tokens 16384 --gpu 2GiB --ram 16GiB   # a shape, not a text

Sizes: text with a unit ("8GiB", "512MB"), a share of what is free ("50%"), "auto", or 0 for no such tier.
Without --config and --profile, the profile of the device at hand gives what no option says.
Exit code: 0 done, 1 the run failed or --verify found a difference, 2 wrong arguments."""

PAGE_TOKENS = (16, 32, 64, 128)

LABEL = "tiermem generate"
MAX_LABEL = 200
"""Characters, as of `TierManager.open_sequence`."""

DRAFT_TOKENS = 8
MOST_DRAFT_TOKENS = 31
"""As of PromptLookup, which is not imported for `--help`."""


def add_parser(commands: Commands[CommandParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        NAME,
        help="generate text with a model whose KV cache is tiered",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    _add_input(parser)
    _add_tiers(parser)
    _add_run(parser)
    _add_sampling(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    # Read when torch's OpenMP library is loaded. By default its threads spin while they wait for each other: on
    # two cores that do something else too, the many small operations of a step then take 15 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tiermem.cli import generation

    return generation.run(options)


def _add_input(parser: CommandParser) -> None:
    group = parser.add_argument_group("model and prompt")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", metavar="DIR", type=Path, help="directory of a Hugging Face model"
    )
    model.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help='a Llama of random weights instead: a shipped shape such as "7b", or a file as in '
        "configs/models",
    )
    prompt = group.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help='a file of UTF-8 text, "-" for stdin'
    )
    prompt.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=int_from(1, 2**24),
        help="this many random token ids, for --random-weights",
    )


def _add_tiers(parser: CommandParser) -> None:
    group = parser.add_argument_group("tiers")
    group.add_argument(
        "--gpu", metavar="SIZE", help="hot tier: GPU memory, host memory without a GPU"
    )
    group.add_argument("--ram", metavar="SIZE", help="warm tier: pinned host memory")
    group.add_argument("--ssd", metavar="SIZE", help="cold tier: the most it may take on disk")
    group.add_argument(
        "--ssd-path",
        metavar="DIR",
        help="where the cold tier is and stays; without it, a private directory that is removed at "
        "the end (in TMPDIR or /var/tmp)",
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", type=Path, help=".toml or .json configuration")
    source.add_argument(
        "--profile", metavar="NAME", help="a shipped hardware profile, such as t4 or h200"
    )
    group.add_argument(
        "--label",
        metavar="LABEL",
        type=text_up_to(MAX_LABEL),
        default=LABEL,
        help=f'the session that stored pages name, for `tiermem ls --label` ("{LABEL}")',
    )
    group.add_argument(
        "--page-tokens", type=int, choices=PAGE_TOKENS, default=64, help="tokens of a page (64)"
    )


def _add_run(parser: CommandParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of weights, keys and values; auto: float32 on the CPU, the model's own on a GPU",
    )
    group.add_argument(
        "--max-new-tokens", metavar="N", type=int_from(1, 2**20), default=128, help="at most (128)"
    )
    group.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=int_from(1, 2**20),
        help="prompt tokens per pass (512 on the CPU, 2048 on a GPU)",
    )
    group.add_argument(
        "--lookup",
        metavar="N",
        nargs="?",
        type=int_from(1, MOST_DRAFT_TOKENS),
        const=DRAFT_TOKENS,
        default=0,
        help=f"draft up to N tokens ({DRAFT_TOKENS}; 1 to {MOST_DRAFT_TOKENS}) from what followed the same words "
        f"before, keep those that the model would have chosen: the same text in fewer passes (off)",
    )
    group.add_argument(
        "--attach",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse what the cold tier stored of the prompt's beginning (yes)",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="run again with transformers' own cache and compare every choice of a token",
    )
    add_json(group)


def _add_sampling(parser: CommandParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        metavar="T",
        type=number_from(0, 100),
        default=0.0,
        help="0, the default, always takes the likeliest token",
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=number_from(0.000001, 1),
        default=1.0,
        help="sample among the likeliest tokens of this total probability (1)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int_from(0, 2**63 - 1),
        default=0,
        help="of all that is random (0)",
    )
