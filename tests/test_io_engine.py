"""One contract suite for I/O over every engine: every byte is looked at."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import numpy as np
import pytest
from io_support import (  # noqa: F401
    FILE_BYTES,
    PAGE,
    POISON,
    WAIT_S,
    Numbers,
    descriptors_and_threads,
    engine_fixture,
    file_fixture,
    finish,
    make_engine,
    memory,
    numbers,
    path_fixture,
    random_memory,
    rng_fixture,
)

from tiermem import _core
from tiermem._core import BlockFile, EngineKind, IoEngine, IoStatus, OpenMode


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
    gc.collect()  # what earlier tests left must not go meanwhile
    before = descriptors_and_threads()
    for _ in range(200):
        cycle()
    assert descriptors_and_threads() == before
