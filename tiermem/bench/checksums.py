"""What do checksums cost where pages are decoded, copied and stored?"""

from __future__ import annotations

from collections.abc import Iterator

from tiermem.bench import checksum_rates, checksum_steps, checksum_store
from tiermem.bench.checksum_turns import NAME
from tiermem.bench.result import Result
from tiermem.bench.run import Run

__all__ = ["NAME", "run"]


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark; each with and without comparing, in turns.

    Raises
    ------
    InvariantError, CorruptPageError: a comparison found what is not there, or did not find what is.
    OSError, TransferError: the disk fails.
    """
    yield from checksum_steps.rows(bench)
    yield from checksum_rates.rows(bench)
    yield from checksum_store.rows(bench)
