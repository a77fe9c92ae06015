"""App: the command `tiermem`; its parser, its exit codes, and how errors and signals end it.

Exit codes: 0 done, 1 the run failed, 2 wrong arguments or configuration, 128 + n ended by signal n.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from tiermem import __version__
from tiermem.cli import bench, calibrate, doctor, generate, plan, stats
from tiermem.cli.options import CommandParser
from tiermem.cli.store import du, explain, gc, ls, show, verify
from tiermem.errors import ConfigError, TierMemError

FAILED = 1
MISUSED = 2
ENDING = (signal.SIGTERM, signal.SIGHUP)

COMMANDS = (generate, stats, doctor, calibrate, plan, bench, ls, show, explain, verify, du, gc)

DESCRIPTION = """\
A KV cache larger than the GPU: exact, tiered over GPU memory, pinned RAM and SSD."""

EXAMPLES = """\
examples:
  tiermem doctor                                     what this machine has, and what tiermem would use
  tiermem calibrate                                  how fast it is; kept for all other commands
  tiermem plan --model 33b --context 128k            whether it fits this machine, and how fast it decodes
  tiermem generate --model DIR --prompt-file F --gpu 2MiB --ram 8MiB --ssd 1GiB
  tiermem stats --watch                              what every live TierManager is doing
  tiermem ls cache/                                  what an SSD store holds; show, explain, verify, du, gc: more

`tiermem COMMAND --help` tells more."""


class Terminated(BaseException):
    """A signal asks the process to end; passes through like KeyboardInterrupt, so that everything is closed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (those of the process if not given) ask for; returns the exit code."""
    _prepare_output()
    try:
        with _signals_end_the_run():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except Terminated as end:
        return _fail(f"ended by {signal.Signals(end.number).name}", 128 + end.number)
    except BrokenPipeError:
        return _output_gone()
    except ConfigError as error:
        return _fail(str(error), MISUSED)
    except (TierMemError, OSError) as error:
        return _fail(str(error), FAILED)


def build_parser() -> CommandParser:
    """The parser of the whole command line."""
    parser = CommandParser(prog="tiermem", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"tiermem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # help and version were printed
        return end.code if isinstance(end.code, int) else 0
    command = {command.NAME: command for command in COMMANDS}.get(options.command)
    if command is None:
        names = ", ".join(command.NAME for command in COMMANDS)
        raise ConfigError(f"no command given: must be one of {names}; see tiermem --help")
    code: int = command.run(options)
    return code


def _prepare_output() -> None:
    """A character that the locale's encoding lacks is replaced rather than fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _signals_end_the_run() -> Iterator[None]:
    """Signals that would kill the process raise Terminated instead; one that is ignored stays ignored."""
    taken = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def _fail(message: str, code: int) -> int:
    text = " ".join(message.split()) or "failed"
    try:
        print(f"tiermem: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _output_gone()
    return code


def _output_gone() -> int:
    """Whoever read the output has left: end quietly, also when Python flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream without a descriptor of its own
            os.dup2(null, stream.fileno())
    os.close(null)
    return 128 + signal.SIGPIPE
