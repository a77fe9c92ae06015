"""Bench view: runs benchmarks, shows, saves and compares their results, draws plots and tables."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tiermem.bench.compare import Comparison, compare
from tiermem.bench.environment import commit, describe
from tiermem.bench.markdown import fill_markers, markdown_tables
from tiermem.bench.plot import draw
from tiermem.bench.result import Result, line_of
from tiermem.bench.result_file import SavedResult, check_writable, read_results, write_results
from tiermem.bench.run import Run, Scale, open_ceilings
from tiermem.bench.suite import ALL, BENCHMARKS, run_suite
from tiermem.cli.bench_text import comparison_lines, environment_lines, result_lines
from tiermem.cli.disk_probe import nearest_directory
from tiermem.cli.notes import Progress, note
from tiermem.cli.screen import terminal_width
from tiermem.cli.tier_options import private_base
from tiermem.device.discovery import open_device
from tiermem.errors import ConfigError
from tiermem.units import Size, SizeKind

OUT_OF_DATE = 1
WORSE = 1
DEFAULT_POOL_BYTES = {Scale.FULL: 8 << 30, Scale.QUICK: 64 << 20}


Lines = Callable[[Sequence[Result], "int | None"], "list[str]"]
"""Results as text of at most so many columns."""


def measure(options: argparse.Namespace) -> int:
    """Run what the options name; 1 if it compares worse, else 0."""
    return report(options, _results(options), result_lines)


def report(options: argparse.Namespace, saved_results: Iterable[SavedResult], lines: Lines) -> int:
    """Take results as they come, then show, save and compare them as the options say; 1 if worse, else 0."""
    before = None if options.compare is None else read_results(options.compare)
    if options.save is not None:
        check_writable(options.save)
    found = []
    for saved in saved_results:
        found.append(saved)
        if options.json:
            print(line_of(saved.to_json()), flush=True)
    Progress.clear()
    results = [saved.result for saved in found]
    if not options.json:
        width = terminal_width(sys.stdout)
        print("\n".join([*environment_lines(found[0], width), "", *lines(results, width)]))
    if options.save is not None:
        write_results(options.save, found)
    if before is None:
        return 0
    if before[0].machine != found[0].machine:
        note(f"{options.compare} is of another machine: {before[0].machine}")
    return _compare(compare(results, [saved.result for saved in before]), options)


def plot(files: list[Path], out: Path | None) -> int:
    """Draw one figure a file and print where it is."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for path in files:
        target = (out or path.parent) / f"{path.stem}.svg"
        draw(read_results(path), target)
        print(target)
    return 0


def table(files: list[Path], into: Path | None, check: bool) -> int:
    """Print tables, or put them into a file; 1 if `check` finds that the file would change."""
    tables = markdown_tables([saved for path in files for saved in read_results(path)])
    if into is None:
        if check:
            raise ConfigError("--check needs --into FILE")
        print("\n".join(f"## {name}\n\n{text}" for name, text in tables.items()))
        return 0
    try:
        old = into.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--into {into}: cannot be read: {error}") from error
    new = fill_markers(old, tables, str(into))
    if check and new != old:
        note(f"{into} is out of date: run tiermem bench table FILES --into {into}")
        return OUT_OF_DATE
    if new != old:
        into.write_text(new, encoding="utf-8")
    return 0


def _results(options: argparse.Namespace) -> Iterator[SavedResult]:
    """The results as they come, each with the run it belongs to."""
    scale = Scale.QUICK if options.quick else Scale.FULL
    directory = _directory(options.ssd_path)
    names = list(BENCHMARKS) if options.benchmark == ALL else [options.benchmark]
    pool_bytes = _pool_bytes(options.pool_size, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below, for people
        device, choice = open_device(options.device)
    if choice.is_fallback:
        note(f"measuring the CPU: {choice.reason}")
    with closing(device), open_ceilings(device, scale) as ceilings:
        environment, name = describe(device), commit()
        bench = Run(device, scale, ceilings, directory, pool_bytes, Progress.show)
        for result in run_suite(names, bench):
            yield SavedResult(result, environment, name)


def _directory(path: Path | None) -> Path:
    if path is None:
        return private_base()
    place = nearest_directory(path)
    if place != path.absolute() or not place.is_dir():
        raise ConfigError(f"--ssd-path {path}: there is no such directory")
    return path


def _pool_bytes(text: str | None, scale: Scale) -> int:
    if text is None:
        return DEFAULT_POOL_BYTES[scale]
    size = Size.parse(text, "--pool-size")
    if size.kind is not SizeKind.EXPLICIT or size.num_bytes < 4096:
        raise ConfigError(f"--pool-size={text!r}: must be a size such as 8GiB, at least 4KiB")
    return size.num_bytes


def _compare(comparison: Comparison, options: argparse.Namespace) -> int:
    lines = comparison_lines(comparison, options.tolerance, terminal_width(sys.stdout))
    # with --json stdout holds results alone
    print("\n".join(lines), file=sys.stderr if options.json else sys.stdout)
    worse = comparison.worse(options.tolerance)
    if worse:
        note(
            f"{len(worse)} of {len(comparison.ratios)} figures are worse than in {options.compare}"
        )
        return WORSE
    return 0
