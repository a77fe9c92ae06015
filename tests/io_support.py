"""What the tests of files and I/O share: poisoned memory, engines of each kind, a file."""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tiermem._core import BlockFile, EngineKind, IoEngine, IoStatus, OpenMode

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

PAGE = 4096
FILE_BYTES = 1 << 22
POISON = 0xA5
WAIT_S = 60.0


def numbers(*values: int) -> Numbers:
    return np.array(values, dtype=np.int64)


def memory(num_bytes: int) -> Bytes:
    """Page-aligned memory full of poison."""
    array = np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)
    array[:] = POISON
    return array


def random_memory(rng: np.random.Generator, num_bytes: int) -> Bytes:
    array = memory(num_bytes)
    array[:] = rng.integers(0, 256, num_bytes, dtype=np.uint8)
    return array


def make_engine(kind: EngineKind, queue_depth: int = 8, piece_bytes: int = 1 << 20) -> IoEngine:
    try:
        return IoEngine(kind, queue_depth=queue_depth, num_threads=3, piece_bytes=piece_bytes)
    except OSError as error:
        if kind is EngineKind.IO_URING and error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"no io_uring here: {error}")
        raise


def finish(engine: IoEngine, ticket: int) -> None:
    result = engine.wait(ticket, WAIT_S)
    assert result.status is IoStatus.OK, result
    engine.forget(ticket)


def assert_failed(engine: IoEngine, ticket: int, error: int, *words: str) -> None:
    result = engine.wait(ticket, WAIT_S)
    assert (result.status, result.errno) == (IoStatus.FAILED, error), result
    for word in words:
        assert word in result.message


@pytest.fixture(name="rng")
def rng_fixture() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    return np.random.default_rng(seed)


@pytest.fixture(
    name="engine",
    params=[
        pytest.param((kind, pieces * PAGE), id=f"{kind.name.lower()}-{pieces}")
        for kind in (EngineKind.IO_URING, EngineKind.THREADS)
        for pieces in (1, 256)
    ],
)
def engine_fixture(request: pytest.FixtureRequest) -> Iterator[IoEngine]:
    """Engines that cut nearly everything into pages, and engines that join up to 1.25 MiB."""
    kind, piece_bytes = request.param
    made = make_engine(kind, piece_bytes=piece_bytes)
    assert made.kind is kind
    yield made
    assert made.close(WAIT_S)
    assert made.counters().in_flight == 0


@pytest.fixture(name="path")
def path_fixture(tmp_path: Path) -> Path:
    return tmp_path / "slots"


@pytest.fixture(name="file")
def file_fixture(path: Path) -> Iterator[BlockFile]:
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE) as opened:
        yield opened


def descriptors_and_threads() -> tuple[int, int]:
    """How many of each this process has."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))
