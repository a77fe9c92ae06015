"""Coverage-guided fuzzing of every parser, with atheris: `make fuzz MINUTES=…`.

Without atheris it says so and ends well: `make torture KIND=parse` tries the same parsers without coverage.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MISSING = (
    "make fuzz: atheris is not installed (pip install 'tiermem[fuzz]'); "
    "`make torture KIND=parse` needs nothing\n"
)
MAX_INPUT_BYTES = 1 << 16


def main() -> int:
    """Fuzz each parser for its share of the time, in a process of its own; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parsers together")
    parser.add_argument("--parser", action="append", help="only this (repeatable)")
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.stdout.write(MISSING)
        return 0
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if options.one is not None:
        fuzz_one(options.one, corpus, options.minutes)
        return 0
    from torture.parsers import parsers

    names = options.parser or list(parsers())
    failed = []
    for name in names:
        share = ["--minutes", str(options.minutes / len(names)), "--corpus", str(corpus)]
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "torture.fuzz", "--one", name, *share]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    sys.stdout.write(f"failed: {', '.join(failed)}\n" if failed else "no parser failed\n")
    return 1 if failed else 0


def fuzz_one(name: str, corpus: Path, minutes: float) -> None:
    """Fuzz one parser; ends this process."""
    import atheris

    with atheris.instrument_imports(include=["tiermem"]):
        from torture.parsers import parsers, try_input

    logging.getLogger("tiermem").setLevel(logging.CRITICAL)
    parser = parsers()[name]
    own = corpus / name.replace(" ", "-")
    own.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(parser.seeds):
        (own / f"seed-{number}").write_bytes(data)
    where = Path(tempfile.mkdtemp(prefix="fuzz-work-"))
    os.environ["TIERMEM_RUNTIME_DIR"] = str(where)
    limits = [f"-max_total_time={max(1, round(minutes * 60))}", f"-max_len={MAX_INPUT_BYTES}"]
    quiet = ["-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={corpus}/"]
    atheris.Setup(
        [sys.argv[0], *limits, *quiet, str(own)],
        lambda data: try_input(name, parser, data, where),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
