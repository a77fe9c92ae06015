"""Suite: the benchmarks by name, and a run of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tiermem.bench import checksums, copy, disk, kernel, pool, prediction, step
from tiermem.bench.result import Result
from tiermem.bench.run import Run

Benchmark = Callable[[Run], Iterator[Result]]

MODULES = {
    module.NAME: module for module in (copy, disk, kernel, step, pool, prediction, checksums)
}
BENCHMARKS: dict[str, Benchmark] = {name: module.run for name, module in MODULES.items()}
ALL = "all"


def question(name: str) -> str:
    """What the benchmark `name` asks."""
    return (MODULES[name].__doc__ or "").strip()


def run_suite(names: Sequence[str], bench: Run) -> Iterator[Result]:
    """The results of each benchmark of `names` as they come.

    Raises
    ------
    TierMemError: no room, or a result that was found wrong. OSError: the disk fails.
    """
    for name in names:
        yield from BENCHMARKS[name](bench)
