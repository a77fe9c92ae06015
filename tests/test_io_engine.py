"""One contract suite for files and I/O over every engine: every byte is looked at."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tiermem import _core
from tiermem._core import BlockFile, EngineKind, FileCall, IoEngine, IoStatus, OpenMode

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


def make_engine(kind: EngineKind, queue_depth: int = 8) -> IoEngine:
    try:
        return IoEngine(kind, queue_depth=queue_depth, num_threads=3)
    except OSError as error:
        if kind is EngineKind.IO_URING and error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"no io_uring here: {error}")
        raise


def finish(engine: IoEngine, ticket: int) -> None:
    result = engine.wait(ticket, WAIT_S)
    assert result.status is IoStatus.OK, result
    engine.forget(ticket)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    return np.random.default_rng(seed)


@pytest.fixture(params=[EngineKind.IO_URING, EngineKind.THREADS], ids=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[IoEngine]:
    made = make_engine(request.param)
    assert made.kind is request.param
    yield made
    assert made.close(WAIT_S)
    assert made.counters().in_flight == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


@pytest.fixture
def file(path: Path) -> Iterator[BlockFile]:
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE) as opened:
        yield opened


def random_ranges(rng: np.random.Generator, count: int, step: int) -> tuple[Numbers, Numbers]:
    """`count` disjoint ranges of the file, in random order; multiples of `step`."""
    cuts = np.sort(rng.choice(np.arange(1, FILE_BYTES // step), 2 * count, replace=False)) * step
    order = rng.permutation(count)
    return cuts[::2][order].astype(np.int64), (cuts[1::2] - cuts[::2])[order].astype(np.int64)


# -- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [PAGE, 1], ids=["aligned", "unaligned"])
def test_bytes_come_back_and_no_others_change(
    engine: IoEngine, file: BlockFile, path: Path, rng: np.random.Generator, step: int
) -> None:
    expected = np.zeros(FILE_BYTES, dtype=np.uint8)
    for _ in range(5):
        source = random_memory(rng, FILE_BYTES)
        offsets, lengths = random_ranges(rng, 100, step)
        finish(engine, engine.submit_write(file, offsets, source.ctypes.data + offsets, lengths))
        for start, length in zip(offsets, lengths, strict=True):
            expected[start : start + length] = source[start : start + length]
        assert np.array_equal(np.fromfile(path, dtype=np.uint8), expected)

        offsets, lengths = random_ranges(rng, 100, step)
        target = memory(FILE_BYTES)
        finish(engine, engine.submit_read(file, offsets, target.ctypes.data + offsets, lengths))
        wanted = np.full(FILE_BYTES, POISON, dtype=np.uint8)
        for start, length in zip(offsets, lengths, strict=True):
            wanted[start : start + length] = expected[start : start + length]
        assert np.array_equal(target, wanted)


@pytest.mark.parametrize("shift", [0, 1, 512, PAGE - 1])
def test_direct_and_buffered_operations_of_one_ticket(
    engine: IoEngine, file: BlockFile, path: Path, rng: np.random.Generator, shift: int
) -> None:
    """Every third operation is aligned in offset only, in memory only, or in both."""
    source = random_memory(rng, 4 * PAGE * 60)
    places = np.arange(60, dtype=np.int64) * 4 * PAGE
    offsets = places + np.where(np.arange(60) % 3 == 0, shift, 0)
    addresses = source.ctypes.data + places + np.where(np.arange(60) % 3 == 1, shift, 0)
    lengths = np.full(60, 2 * PAGE, dtype=np.int64)
    finish(engine, engine.submit_write(file, offsets, addresses, lengths))
    stored = np.fromfile(path, dtype=np.uint8)
    for offset, address in zip(offsets, addresses - source.ctypes.data, strict=True):
        assert np.array_equal(
            stored[offset : offset + 2 * PAGE], source[address : address + 2 * PAGE]
        )


@pytest.mark.parametrize(
    ("length", "tail_length"), [(2 * PAGE, PAGE), (5000, 100), (1, 1), (2 * PAGE, 7)]
)
def test_tails_lie_directly_behind_their_payload(
    engine: IoEngine,
    file: BlockFile,
    path: Path,
    rng: np.random.Generator,
    length: int,
    tail_length: int,
) -> None:
    count, stride = 50, 4 * PAGE
    payload = random_memory(rng, count * stride)
    tails = random_memory(rng, count * PAGE)
    slots = rng.permutation(count).astype(np.int64)
    addresses = payload.ctypes.data + np.arange(count, dtype=np.int64) * stride
    tail_addresses = tails.ctypes.data + np.arange(count, dtype=np.int64) * PAGE
    lengths = np.full(count, length, dtype=np.int64)
    arguments = (file, slots * stride, addresses, lengths, tail_addresses, tail_length)
    finish(engine, engine.submit_write(*arguments))

    stored = np.fromfile(path, dtype=np.uint8)
    for i, slot in enumerate(slots):
        place = stored[slot * stride :]
        assert np.array_equal(place[:length], payload[i * stride :][:length])
        assert np.array_equal(place[length : length + tail_length], tails[i * PAGE :][:tail_length])

    written, written_tails = payload.copy(), tails.copy()
    payload[:] = POISON
    tails[:] = POISON
    finish(engine, engine.submit_read(*arguments))
    for i in range(count):
        place, tail = payload[i * stride :][:stride], tails[i * PAGE :][:PAGE]
        assert np.array_equal(place[:length], written[i * stride :][:length])
        assert np.all(place[length:] == POISON)
        assert np.array_equal(tail[:tail_length], written_tails[i * PAGE :][:tail_length])
        assert np.all(tail[tail_length:] == POISON)


def test_thousands_of_operations_beyond_the_queue(
    engine: IoEngine, file: BlockFile, rng: np.random.Generator
) -> None:
    count, length = 8000, 512
    source = random_memory(rng, count * length)
    offsets = rng.permutation(count).astype(np.int64) * length
    addresses = source.ctypes.data + np.arange(count, dtype=np.int64) * length
    pieces = np.array_split(np.arange(count), 80)
    lengths = np.full(100, length, dtype=np.int64)
    tickets = [engine.submit_write(file, offsets[p], addresses[p], lengths) for p in pieces]
    assert len(set(tickets)) == 80 and 0 not in tickets
    for ticket in reversed(tickets):
        finish(engine, ticket)
    written = source.copy()
    source[:] = POISON
    tickets = [engine.submit_read(file, offsets[p], addresses[p], lengths) for p in pieces]
    while any(engine.poll(ticket).status is IoStatus.PENDING for ticket in tickets):
        assert engine.counters().in_flight <= count
    assert np.array_equal(source, written)
    counters = engine.counters()
    assert (counters.reads, counters.writes, counters.errors) == (count, count, 0)
    assert counters.bytes_read == counters.bytes_written == count * length


def test_counters_count_tails_and_pieces_once(engine: IoEngine, file: BlockFile) -> None:
    target = memory(4 * PAGE)
    at = target.ctypes.data
    ticket = engine.submit_read(
        file, numbers(0), numbers(at), numbers(PAGE), numbers(at + 2 * PAGE), 100
    )
    finish(engine, ticket)
    counters = engine.counters()
    assert (counters.reads, counters.bytes_read) == (1, PAGE + 100)
    assert (counters.writes, counters.bytes_written) == (0, 0)


def test_one_large_operation(engine: IoEngine, path: Path, rng: np.random.Generator) -> None:
    num_bytes = 96 << 20
    with BlockFile(path, num_bytes, OpenMode.CREATE) as large:
        source = random_memory(rng, num_bytes)
        where = (numbers(0), numbers(source.ctypes.data), numbers(num_bytes))
        finish(engine, engine.submit_write(large, *where))
        before = _core.checksum(source.ctypes.data, num_bytes)
        source[:] = POISON
        finish(engine, engine.submit_read(large, *where))
        assert _core.checksum(source.ctypes.data, num_bytes) == before


# -- Tickets --------------------------------------------------------------------------------------


def test_an_empty_batch_is_ok_at_once(engine: IoEngine, file: BlockFile) -> None:
    none = numbers()
    for ticket in (
        engine.submit_read(file, none, none, none),
        engine.submit_write(file, none, none, none, none, PAGE),
    ):
        assert engine.poll(ticket).status is IoStatus.OK


def test_results_are_kept_until_forgotten(engine: IoEngine, file: BlockFile) -> None:
    target = memory(PAGE)
    ticket = engine.submit_read(file, numbers(0), numbers(target.ctypes.data), numbers(PAGE))
    for _ in range(3):
        assert engine.wait(ticket, WAIT_S).status is IoStatus.OK
        assert engine.poll(ticket).status is IoStatus.OK
    engine.forget(ticket)
    for call in (engine.poll, engine.wait, engine.forget):
        with pytest.raises(ValueError, match=f"ticket {ticket} "):
            call(ticket)
    with pytest.raises(ValueError, match="ticket 999999 "):
        engine.poll(999999)


def test_a_pending_ticket_can_be_forgotten(engine: IoEngine, file: BlockFile) -> None:
    target = memory(FILE_BYTES)
    every = np.arange(0, FILE_BYTES, PAGE, dtype=np.int64)
    lengths = np.full(every.size, PAGE, dtype=np.int64)
    ticket = engine.submit_read(file, every, target.ctypes.data + every, lengths)
    engine.forget(ticket)
    with pytest.raises(ValueError, match="forgotten"):
        engine.poll(ticket)
    assert engine.close(WAIT_S)
    assert np.all(target == 0)


def test_a_wait_of_no_time_only_looks(engine: IoEngine, file: BlockFile) -> None:
    target = memory(FILE_BYTES)
    ticket = engine.submit_read(file, numbers(0), numbers(target.ctypes.data), numbers(FILE_BYTES))
    assert engine.wait(ticket, 0.0).status in (IoStatus.PENDING, IoStatus.OK)
    finish(engine, ticket)


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_impossible_timeouts(engine: IoEngine, file: BlockFile, timeout_s: float) -> None:
    ticket = engine.submit_read(file, numbers(), numbers(), numbers())
    with pytest.raises(ValueError, match="timeout_s="):
        engine.wait(ticket, timeout_s)
    with pytest.raises(ValueError, match="timeout_s="):
        engine.close(timeout_s)


def test_a_closed_engine_refuses_batches_and_keeps_results(
    engine: IoEngine, file: BlockFile
) -> None:
    target = memory(PAGE)
    where = (file, numbers(0), numbers(target.ctypes.data), numbers(PAGE))
    ticket = engine.submit_read(*where)
    assert engine.close(WAIT_S) and engine.close(0.0)
    assert engine.poll(ticket).status is IoStatus.OK
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit_read(*where)


@pytest.mark.parametrize("kind", [EngineKind.IO_URING, EngineKind.THREADS])
def test_destruction_while_pending_waits(
    kind: EngineKind, path: Path, rng: np.random.Generator
) -> None:
    source = random_memory(rng, FILE_BYTES)
    every = np.arange(0, FILE_BYTES, PAGE, dtype=np.int64)
    lengths = np.full(every.size, PAGE, dtype=np.int64)
    engine = make_engine(kind, queue_depth=2)
    file = BlockFile(path, FILE_BYTES, OpenMode.CREATE)
    engine.submit_write(file, every, source.ctypes.data + every, lengths)
    file.close()  # operations in flight keep the descriptors
    del file, engine
    assert np.array_equal(np.fromfile(path, dtype=np.uint8), source)


def test_context_manager_closes(path: Path) -> None:
    with IoEngine() as engine, BlockFile(path, PAGE, OpenMode.CREATE) as file:
        pass
    assert file.is_closed
    with pytest.raises(OSError, match="closed") as caught:
        file.sync()
    assert caught.value.errno == errno.EBADF
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit_read(file, numbers(), numbers(), numbers())


@pytest.mark.parametrize("kind", [EngineKind.IO_URING, EngineKind.THREADS])
def test_open_close_cycles_leak_no_descriptor(kind: EngineKind, path: Path) -> None:
    target = memory(PAGE)

    def cycle() -> None:
        with make_engine(kind) as engine, BlockFile(path, 8 * PAGE, OpenMode.CREATE) as file:
            where = (file, numbers(0), numbers(target.ctypes.data), numbers(PAGE))
            finish(engine, engine.submit_write(*where))
            engine.submit_read(*where)

    cycle()
    before = (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
    for _ in range(200):
        cycle()
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before


# -- Failures -------------------------------------------------------------------------------------


def assert_failed(engine: IoEngine, ticket: int, error: int, *words: str) -> None:
    result = engine.wait(ticket, WAIT_S)
    assert (result.status, result.errno) == (IoStatus.FAILED, error), result
    for word in words:
        assert word in result.message


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
        words = (f"read of {length} bytes at offset {offset} ", "end of file", str(path))
        assert_failed(engine, ticket, errno.ENODATA, *words)
    assert engine.counters().errors == 3
    assert np.all(target[4 * PAGE :] == POISON)


def test_a_tail_that_lies_behind_the_end_fails(
    engine: IoEngine, file: BlockFile, path: Path
) -> None:
    os.truncate(path, 2 * PAGE)
    target = memory(4 * PAGE)
    at = target.ctypes.data
    tail = numbers(at + 3 * PAGE)
    ticket = engine.submit_read(file, numbers(0), numbers(at), numbers(2 * PAGE), tail, PAGE)
    assert_failed(engine, ticket, errno.ENODATA, f"after {2 * PAGE} bytes")


def test_all_operations_have_ended_when_one_failed(
    engine: IoEngine, file: BlockFile, path: Path, rng: np.random.Generator
) -> None:
    os.truncate(path, FILE_BYTES // 2)
    target = memory(FILE_BYTES)
    every = rng.permutation(np.arange(0, FILE_BYTES, PAGE, dtype=np.int64))
    lengths = np.full(every.size, PAGE, dtype=np.int64)
    ticket = engine.submit_read(file, every, target.ctypes.data + every, lengths)
    assert_failed(engine, ticket, errno.ENODATA, f"read of {PAGE} bytes")
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
    for bad in (good.astype(np.int32), good.astype(np.float64), good.reshape(1, 2), good[::-1]):
        with pytest.raises(TypeError):
            engine.submit_read(file, bad, good, good)


@pytest.mark.parametrize(
    "arguments",
    [{"queue_depth": 0}, {"queue_depth": 4097}, {"num_threads": 0}, {"num_threads": 257}],
)
def test_sizes_of_the_engine(arguments: dict[str, int]) -> None:
    (name, value) = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value}: must be 1 to"):
        IoEngine(**arguments)
    with pytest.raises(ValueError, match="kind threads"):
        IoEngine(faults=_core.FaultOps())


# -- Planned faults: threads only, where the system calls can be replaced -----------------------------


@pytest.fixture
def faults() -> Iterator[_core.FaultOps]:
    planned = _core.FaultOps()
    yield planned
    planned.release()


@pytest.fixture
def faulty(faults: _core.FaultOps) -> Iterator[IoEngine]:
    with IoEngine(EngineKind.THREADS, num_threads=1, faults=faults) as made:
        yield made


CALLS = [(FileCall.READ, "submit_read"), (FileCall.WRITE, "submit_write")]


@pytest.mark.parametrize(("call", "submit"), CALLS)
@pytest.mark.parametrize("num_bytes", [1, 511, PAGE, PAGE + 1, 3 * PAGE])
def test_short_transfers_continue_where_they_stopped(
    faulty: IoEngine,
    faults: _core.FaultOps,
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
    faults: _core.FaultOps,
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
    faults: _core.FaultOps,
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


def test_a_write_of_nothing_fails(
    faulty: IoEngine, faults: _core.FaultOps, file: BlockFile
) -> None:
    faults.shorten(FileCall.WRITE, first=1, num_bytes=0)
    data = memory(PAGE)
    ticket = faulty.submit_write(file, numbers(0), numbers(data.ctypes.data), numbers(PAGE))
    assert_failed(faulty, ticket, errno.EIO)


def test_a_waits_deadline_passes_while_an_operation_hangs(
    faulty: IoEngine, faults: _core.FaultOps, file: BlockFile
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


def test_close_gives_up_on_a_hanging_operation(
    faulty: IoEngine, faults: _core.FaultOps, file: BlockFile
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


# -- Files ----------------------------------------------------------------------------------------


def test_a_new_file_is_private_and_allocated(path: Path) -> None:
    with BlockFile(path, FILE_BYTES + 1, OpenMode.CREATE) as file:
        assert file.path == str(path) and file.size_bytes == FILE_BYTES + 1
        assert file.allocated_bytes == path.stat().st_blocks * 512 >= FILE_BYTES + 1
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_size == FILE_BYTES + 1
        file.sync()


@pytest.mark.parametrize("name", ["slots", b"slots", "sl\udcffots"])
def test_any_path(tmp_path: Path, name: str | bytes) -> None:
    where = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    with BlockFile(where, PAGE, OpenMode.CREATE) as file:
        assert os.fsencode(file.path) == where
        assert os.path.getsize(where) == PAGE


def test_an_existing_file_keeps_its_bytes(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE) as file:
        assert file.size_bytes == FILE_BYTES
    assert path.read_bytes() == b"x" * 5000 + bytes(FILE_BYTES - 5000)
    with BlockFile(path, PAGE, OpenMode.CREATE) as file:
        assert file.size_bytes == FILE_BYTES
    with BlockFile(path, 0, OpenMode.EXISTING) as file:
        assert file.size_bytes == FILE_BYTES


def test_resize_grows_and_shrinks(path: Path) -> None:
    with BlockFile(path, 2 * PAGE, OpenMode.CREATE) as file:
        file.resize(64 * PAGE)
        assert file.size_bytes == path.stat().st_size == 64 * PAGE <= file.allocated_bytes
        file.resize(PAGE)
        assert file.size_bytes == path.stat().st_size == PAGE
        for size_bytes in (0, -1):
            with pytest.raises(ValueError, match=f"size_bytes={size_bytes}"):
                file.resize(size_bytes)


@pytest.mark.parametrize("mode", [OpenMode.READ_ONLY, OpenMode.EXISTING])
def test_files_that_must_be_there(path: Path, mode: OpenMode) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        BlockFile(path, 0, mode)
    assert caught.value.filename == str(path)
    path.write_bytes(bytes(PAGE))
    with pytest.raises(OSError, match=f"has {PAGE} bytes, needs {PAGE + 1}") as short:
        BlockFile(path, PAGE + 1, mode)
    assert short.value.errno == errno.ENODATA
    assert path.stat().st_size == PAGE


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(bytes(PAGE))
    link.symlink_to(target)
    os.mkfifo(pipe)
    for mode in OpenMode:
        for where, error in ((link, errno.ELOOP), (pipe, errno.EINVAL)):
            with pytest.raises(OSError, match=where.name) as caught:
                BlockFile(where, PAGE, mode)
            assert (caught.value.errno, caught.value.filename) == (error, str(where))
    for mode in (OpenMode.EXISTING, OpenMode.CREATE):
        with pytest.raises(IsADirectoryError):
            BlockFile(tmp_path, PAGE, mode)
    with pytest.raises(OSError, match="not a regular file"):
        BlockFile(tmp_path, 0, OpenMode.READ_ONLY)
    with pytest.raises(OSError, match="not a regular file"):
        BlockFile("/dev/full", 0, OpenMode.EXISTING)
    with pytest.raises(ValueError, match="size_bytes=0"):
        BlockFile(tmp_path / "new", 0, OpenMode.CREATE)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(path: Path) -> None:
    huge = 1 << 55
    with pytest.raises(OSError, match="are free") as caught:
        BlockFile(path, huge, OpenMode.CREATE)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert not path.exists()
    path.write_bytes(b"kept" * 1000)
    with pytest.raises(OSError, match="are free"):
        BlockFile(path, huge, OpenMode.CREATE)
    assert path.read_bytes() == b"kept" * 1000


def test_a_disk_that_fills_up_meanwhile_leaves_the_file_as_it_was(path: Path) -> None:
    faults = _core.FaultOps()
    faults.fail(FileCall.ALLOCATE, first=1, error=errno.ENOSPC, count=3)
    with pytest.raises(OSError, match="cannot grow from 0 to") as caught:
        BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()
    path.write_bytes(b"kept")
    with pytest.raises(OSError, match="cannot grow from 4 to"):
        BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults)
    with BlockFile(path, 4, OpenMode.EXISTING, faults=faults) as file:
        with pytest.raises(OSError, match="cannot grow from 4 to"):
            file.resize(FILE_BYTES)
        assert file.size_bytes == 4
    assert path.read_bytes() == b"kept"


def test_without_fallocate_zeros_are_written(path: Path) -> None:
    faults = _core.FaultOps()
    faults.fail(FileCall.ALLOCATE, first=1, error=errno.EOPNOTSUPP, count=100)
    faults.shorten(FileCall.WRITE, first=1, num_bytes=1000)
    faults.fail(FileCall.WRITE, first=2, error=errno.EINTR)
    path.write_bytes(b"kept")
    with BlockFile(path, FILE_BYTES, OpenMode.CREATE, faults=faults) as file:
        assert file.allocated_bytes >= FILE_BYTES
    assert path.read_bytes() == b"kept" + bytes(FILE_BYTES - 4)
    faults.fail(FileCall.WRITE, first=faults.num_calls(FileCall.WRITE) + 3, error=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        BlockFile(path, 4 * FILE_BYTES, OpenMode.CREATE, faults=faults)
    assert path.stat().st_size == FILE_BYTES


def test_a_failed_sync_is_told(path: Path) -> None:
    faults = _core.FaultOps()
    faults.fail(FileCall.SYNC, first=1, error=errno.EINTR)
    faults.fail(FileCall.SYNC, first=3, error=errno.EIO)
    with BlockFile(path, PAGE, OpenMode.CREATE, faults=faults) as file:
        file.sync()
        with pytest.raises(OSError, match="cannot sync"):
            file.sync()


def test_faults_that_cannot_be_planned() -> None:
    faults = _core.FaultOps()
    with pytest.raises(ValueError, match="counted from 1"):
        faults.hold(FileCall.READ, first=0)
    with pytest.raises(ValueError, match="error=0"):
        faults.fail(FileCall.READ, first=1, error=0)
    with pytest.raises(ValueError, match="shortened"):
        faults.shorten(FileCall.SYNC, first=1, num_bytes=1)
