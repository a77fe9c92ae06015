"""The fault suite from the command line: `make torture`, or `PYTHONPATH=tests python -m torture`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from torture.cases import KINDS
from torture.process import warm_up
from torture.runner import Runner
from torture.summary import SHOWN, finding_text, shower, table

MINUTES = 20.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--minutes", type=float, help="start no case after so long (default 20)")
    parser.add_argument("--cases", type=int, help="so many cases of each kind instead")
    parser.add_argument("--kills", type=int, help="start no case after so many kills")
    parser.add_argument("--seed", type=int, help="of all cases; a new one is made and told without")
    parser.add_argument(
        "--kind", action="append", choices=list(KINDS), help="only this (repeatable)"
    )
    parser.add_argument("--case", type=int, help="only the one case with this seed, of one --kind")
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--directory", type=Path, help="where stores are made (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument("--save", type=Path, help="write the summary as JSON to this file")
    options = parser.parse_args(arguments)
    if options.case is not None and len(options.kind or ()) != 1:
        parser.error("--case needs one --kind")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run; 1 if anything happened that must not."""
    options = parse(arguments)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    warm_up()
    ends = (options.minutes, options.cases, options.kills)
    runner = Runner(
        options.kind or list(KINDS),
        seed,
        options.jobs,
        minutes=MINUTES if ends == (None, None, None) else options.minutes,
        num_cases=options.cases,
        kills=options.kills,
        only=None if options.case is None else (options.kind[0], options.case),
        directory=options.directory,
    )
    sys.stderr.write(f"seed {seed}: again with `make torture SEED={seed}`\n")
    start_s = time.monotonic()
    try:
        runner.run(shower())
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what was seen until now:\n")
    seconds = time.monotonic() - start_s
    result = {"seed": seed, "seconds": seconds, **runner.total.to_table()}
    if options.save is not None:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    else:
        sys.stdout.write(f"\n{table(runner.total, seconds)}\n")
        for finding in runner.total.findings[:SHOWN]:
            sys.stdout.write(f"{finding_text(finding)}\n")
    return 1 if runner.total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
