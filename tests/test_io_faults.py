"""What an engine says and does when files, memory or system calls fail, are short or hang."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from io_support import (  # noqa: F401
    FILE_BYTES,
    PAGE,
    POISON,
    WAIT_S,
    assert_failed,
    engine_fixture,
    file_fixture,
    finish,
    memory,
    numbers,
    path_fixture,
    random_memory,
    rng_fixture,
)

from tiermem._core import BlockFile, EngineKind, FaultOps, FileCall, IoEngine, IoStatus, OpenMode

# -- Real failures, every engine ------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, 1, PAGE, 2 * PAGE + 100, 3 * PAGE])
def test_a_read_that_meets_the_end_of_the_file_fails(
    engine: IoEngine, file: BlockFile, path: Path, end: int
) -> None:
    """Truncated behind our back: some of the bytes are there, all of them never are."""
    os.truncate(path, end)
    target = memory(8 * PAGE)
    for offset, length in ((0, 4 * PAGE), (1, 4 * PAGE), (3 * PAGE, 1)):
        ticket = engine.submit_read(
            file, numbers(offset), numbers(target.ctypes.data), numbers(length)
        )
        words = ("read of ", " bytes at offset ", "end of file", str(path))
        assert_failed(engine, ticket, errno.ENODATA, *words)
    assert engine.counters().errors >= 3
    assert engine.counters().reads <= 2
    assert np.all(target[4 * PAGE :] == POISON)


def test_a_tail_that_lies_behind_the_end_fails(
    engine: IoEngine, file: BlockFile, path: Path
) -> None:
    os.truncate(path, 2 * PAGE)
    target = memory(4 * PAGE)
    at = target.ctypes.data
    tail = numbers(at + 3 * PAGE)
    ticket = engine.submit_read(file, numbers(0), numbers(at), numbers(2 * PAGE), tail, PAGE)
    assert_failed(engine, ticket, errno.ENODATA, "bytes: end of file")


def test_all_operations_have_ended_when_one_failed(
    engine: IoEngine, file: BlockFile, path: Path, rng: np.random.Generator
) -> None:
    os.truncate(path, FILE_BYTES // 2)
    target = memory(FILE_BYTES)
    every = rng.permutation(np.arange(0, FILE_BYTES, PAGE, dtype=np.int64))
    lengths = np.full(every.size, PAGE, dtype=np.int64)
    ticket = engine.submit_read(file, every, target.ctypes.data + every, lengths)
    assert_failed(engine, ticket, errno.ENODATA, "read of ", "end of file")
    assert engine.counters().in_flight == 0
    target[:] = POISON  # the memory is ours again: nothing writes into it any more
    good = memory(PAGE)
    finish(engine, engine.submit_read(file, numbers(0), numbers(good.ctypes.data), numbers(PAGE)))
    assert np.all(good == 0) and np.all(target == POISON)


def test_a_write_to_a_read_only_file_fails(engine: IoEngine, file: BlockFile, path: Path) -> None:
    source = memory(PAGE)
    where = (numbers(0), numbers(source.ctypes.data), numbers(PAGE))
    with BlockFile(path, 0, OpenMode.READ_ONLY) as locked:
        words = (f"write of {PAGE} bytes at offset 0 ", "Bad file descriptor")
        assert_failed(engine, engine.submit_write(locked, *where), errno.EBADF, *words)
        finish(engine, engine.submit_read(locked, *where))
    assert np.all(source == 0)


def test_bad_memory_fails(engine: IoEngine, file: BlockFile) -> None:
    nowhere = numbers(PAGE)  # an address that no process has mapped
    ticket = engine.submit_read(file, numbers(0), nowhere, numbers(PAGE))
    assert_failed(engine, ticket, errno.EFAULT, "Bad address")


@pytest.mark.parametrize(
    ("offsets", "addresses", "lengths", "tails", "tail_length", "message"),
    [
        ([0, 8], [8], [8, 8], None, 0, "addresses has 1 elements, offsets has 2"),
        ([0], [8], [8, 8], None, 0, "lengths has 2 elements, offsets has 1"),
        ([0], [8], [8], [8, 8], 8, "tail_addresses has 2 elements, offsets has 1"),
        ([0], [8], [8], [8], 0, "tail_length=0"),
        ([0], [8], [8], None, 8, "tail_length=8"),
        ([0], [8], [8], [8], -1, "tail_length=-1"),
        ([-1], [8], [8], None, 0, r"offsets\[0\]=-1"),
        ([0, FILE_BYTES + 1], [8, 8], [8, 8], None, 0, r"offsets\[1\]="),
        ([0], [8], [0], None, 0, r"lengths\[0\]=0"),
        ([0], [8], [-8], None, 0, r"lengths\[0\]=-8"),
        ([FILE_BYTES - 8], [8], [9], None, 0, r"lengths\[0\]=9: must be 1 to 8"),
        ([FILE_BYTES - 8], [8], [8], [8], 1, r"lengths\[0\]=8: must be 1 to 7"),
        ([8], [8], [2**63 - 1], None, 0, r"lengths\[0\]="),
        ([8], [8], [8], [8], 2**63 - 1, r"lengths\[0\]="),
        ([0, 0], [8, 0], [8, 8], None, 0, r"addresses\[1\]=0"),
        ([0], [8], [8], [0], 8, r"tail_addresses\[0\]=0"),
    ],
)
def test_impossible_batches_are_refused_whole(
    engine: IoEngine,
    file: BlockFile,
    offsets: list[int],
    addresses: list[int],
    lengths: list[int],
    tails: list[int] | None,
    tail_length: int,
    message: str,
) -> None:
    tail_addresses = None if tails is None else numbers(*tails)
    for submit in (engine.submit_read, engine.submit_write):
        with pytest.raises(ValueError, match=message):
            submit(
                file,
                numbers(*offsets),
                numbers(*addresses),
                numbers(*lengths),
                tail_addresses,
                tail_length,
            )
    assert engine.counters().in_flight == 0 and engine.counters().errors == 0


def test_arrays_of_another_type_are_refused(engine: IoEngine, file: BlockFile) -> None:
    good = numbers(0, 8)
    submit: Callable[..., int] = engine.submit_read
    for bad in (good.astype(np.int32), good.astype(np.float64), good.reshape(1, 2), good[::-1]):
        with pytest.raises(TypeError):
            submit(file, bad, good, good)


@pytest.mark.parametrize(
    "arguments",
    [
        {"queue_depth": 0},
        {"queue_depth": 4097},
        {"num_threads": 0},
        {"num_threads": 257},
        {"num_rings": 0},
        {"num_rings": 17},
    ],
)
def test_sizes_of_the_engine(arguments: dict[str, int]) -> None:
    (name, value) = next(iter(arguments.items()))
    make: Callable[..., IoEngine] = IoEngine
    with pytest.raises(ValueError, match=f"{name}={value}: must be 1 to"):
        make(**arguments)
    with pytest.raises(ValueError, match="kind threads"):
        IoEngine(faults=FaultOps())
    for piece_bytes in (0, -PAGE, PAGE + 1, 2 << 30):
        with pytest.raises(ValueError, match=f"piece_bytes={piece_bytes}: must be a multiple"):
            IoEngine(piece_bytes=piece_bytes)


def test_memory_that_cannot_be_registered(engine: IoEngine) -> None:
    for address, num_bytes in ((0, PAGE), (-1, PAGE), (PAGE, 0), (PAGE, -1)):
        for call in (engine.register_memory, engine.unregister_memory):
            with pytest.raises(ValueError, match=r"(address|num_bytes)="):
                call(address, num_bytes)
    num_registered, error = engine.register_memory(PAGE, PAGE)  # an address that is not mapped
    assert num_registered == 0
    assert (error != 0) == (engine.kind is EngineKind.IO_URING)


# -- Planned faults: threads only, where the system calls can be replaced -----------------------------


@pytest.fixture
def faults() -> Iterator[FaultOps]:
    planned = FaultOps()
    yield planned
    planned.release()


@pytest.fixture
def faulty(faults: FaultOps) -> Iterator[IoEngine]:
    kind = EngineKind.THREADS
    with IoEngine(kind, num_threads=1, piece_bytes=PAGE, faults=faults) as made:
        yield made


CALLS = [(FileCall.READ, "submit_read"), (FileCall.WRITE, "submit_write")]


@pytest.mark.parametrize(("call", "submit"), CALLS)
@pytest.mark.parametrize("num_bytes", [1, 511, PAGE, PAGE + 1, 3 * PAGE])
def test_short_transfers_continue_where_they_stopped(
    faulty: IoEngine,
    faults: FaultOps,
    file: BlockFile,
    path: Path,
    rng: np.random.Generator,
    call: FileCall,
    submit: str,
    num_bytes: int,
) -> None:
    data = random_memory(rng, 4 * PAGE)
    tail = random_memory(rng, PAGE)
    wanted = np.concatenate([data[: 3 * PAGE], tail])
    if call is FileCall.READ:
        path.write_bytes(wanted.tobytes() + bytes(FILE_BYTES - wanted.size))
        data[:] = POISON
        tail[:] = POISON
    faults.shorten(call, first=1, num_bytes=num_bytes, count=5)
    where = (numbers(0), numbers(data.ctypes.data), numbers(3 * PAGE), numbers(tail.ctypes.data))
    finish(faulty, getattr(faulty, submit)(file, *where, PAGE))
    assert faults.num_calls(call) > 1
    assert np.array_equal(np.concatenate([data[: 3 * PAGE], tail]), wanted)
    assert np.array_equal(np.fromfile(path, dtype=np.uint8)[: 4 * PAGE], wanted)


@pytest.mark.parametrize(("call", "submit"), CALLS)
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_interrupted_calls_are_repeated(
    faulty: IoEngine,
    faults: FaultOps,
    file: BlockFile,
    call: FileCall,
    submit: str,
    error: int,
) -> None:
    faults.fail(call, first=1, error=error, count=3)
    data = memory(PAGE)
    where = (numbers(0), numbers(data.ctypes.data), numbers(PAGE))
    finish(faulty, getattr(faulty, submit)(file, *where))
    assert faults.num_calls(call) == 4


@pytest.mark.parametrize(("call", "submit"), CALLS)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("first", [1, 3, 5])
def test_the_kth_call_fails(
    faulty: IoEngine,
    faults: FaultOps,
    file: BlockFile,
    call: FileCall,
    submit: str,
    error: int,
    first: int,
) -> None:
    faults.fail(call, first=first, error=error)
    data = memory(5 * PAGE)
    offsets = np.arange(5, dtype=np.int64) * PAGE
    where = (offsets, data.ctypes.data + offsets, np.full(5, PAGE, dtype=np.int64))
    ticket = getattr(faulty, submit)(file, *where)
    words = (f"at offset {(first - 1) * PAGE} ", os.strerror(error))
    assert_failed(faulty, ticket, error, *words)
    assert faults.num_calls(call) == first  # the rest of the ticket never started
    assert faulty.counters().errors == 1
    finish(faulty, getattr(faulty, submit)(file, *where))


def test_a_write_of_nothing_fails(faulty: IoEngine, faults: FaultOps, file: BlockFile) -> None:
    faults.shorten(FileCall.WRITE, first=1, num_bytes=0)
    data = memory(PAGE)
    ticket = faulty.submit_write(file, numbers(0), numbers(data.ctypes.data), numbers(PAGE))
    assert_failed(faulty, ticket, errno.EIO)


def test_a_waits_deadline_passes_while_an_operation_hangs(
    faulty: IoEngine, faults: FaultOps, file: BlockFile
) -> None:
    faults.hold(FileCall.READ, first=1)
    data = memory(2 * PAGE)
    where = (numbers(0, PAGE), data.ctypes.data + numbers(0, PAGE), numbers(PAGE, PAGE))
    ticket = faulty.submit_read(file, *where)
    assert faults.wait_held(1, WAIT_S)
    assert faulty.wait(ticket, 0.25).status is IoStatus.PENDING
    assert faulty.poll(ticket).status is IoStatus.PENDING
    assert faulty.counters().in_flight == 2
    assert np.all(data == POISON)
    faults.release()
    finish(faulty, ticket)
    assert np.all(data == 0)


class AlarmError(Exception):
    """Raised by a signal handler."""


def test_a_signal_ends_a_wait_at_once(faulty: IoEngine, faults: FaultOps, file: BlockFile) -> None:
    def ring(number: int, frame: object) -> None:
        raise AlarmError

    faults.hold(FileCall.READ, first=1)
    data = memory(PAGE)
    ticket = faulty.submit_read(file, numbers(0), numbers(data.ctypes.data), numbers(PAGE))
    former = signal.signal(signal.SIGUSR1, ring)
    bell = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    start_s = time.monotonic()
    try:
        bell.start()
        with pytest.raises(AlarmError):
            faulty.wait(ticket, WAIT_S)
    finally:
        bell.join()
        signal.signal(signal.SIGUSR1, former)
    assert time.monotonic() - start_s < WAIT_S / 2
    assert faulty.poll(ticket).status is IoStatus.PENDING
    faults.release()
    finish(faulty, ticket)


def test_close_gives_up_on_a_hanging_operation(
    faulty: IoEngine, faults: FaultOps, file: BlockFile
) -> None:
    faults.hold(FileCall.READ, first=1)
    data = memory(2 * PAGE)
    at = data.ctypes.data
    hanging = faulty.submit_read(file, numbers(0), numbers(at), numbers(PAGE))
    queued = faulty.submit_read(file, numbers(0), numbers(at + PAGE), numbers(PAGE))
    assert faults.wait_held(1, WAIT_S)
    assert not faulty.close(0.01)
    assert faulty.poll(hanging).status is IoStatus.PENDING
    assert_failed(faulty, queued, errno.ECANCELED, "cancelled")
    assert faulty.counters().in_flight == 1
    faults.release()
    assert faulty.close(WAIT_S)
    assert faulty.poll(hanging).status is IoStatus.OK
    assert np.all(data[PAGE:] == POISON)
