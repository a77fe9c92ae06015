"""The simulated device: late, out of order, truthful, repeatable, and quick to find a broken rule."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tiermem.device import Direction, Event, Memory
from tiermem.device.simulated import SimulatedDevice
from tiermem.errors import InvariantError, TransferError

UP, DOWN, ACROSS = Direction.HOST_TO_DEVICE, Direction.DEVICE_TO_HOST, Direction.DEVICE_TO_DEVICE
PIECE = 64


def at(memory: Memory, *pieces: int) -> Any:
    return np.array([memory.address + piece * PIECE for piece in pieces], dtype=np.int64)


def piece_of(memory: Memory, piece: int) -> list[int]:
    return sorted(set(memory.tensor[piece * PIECE : (piece + 1) * PIECE].tolist()))


def numbered(device: SimulatedDevice, num_pieces: int) -> Memory:
    """Host memory in which every piece holds its number."""
    memory = device.allocate_host(num_pieces * PIECE)
    memory.tensor.copy_(torch.arange(num_pieces, dtype=torch.uint8).repeat_interleave(PIECE))
    return memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_memory_is_nan_until_it_is_written(dtype: torch.dtype) -> None:
    device = SimulatedDevice()
    for memory in (device.allocate(4096), device.allocate_host(4096)):
        assert memory.tensor.view(dtype).isnan().all()


def test_freed_memory_is_nan_for_those_who_still_read_it() -> None:
    device = SimulatedDevice()
    memory = device.allocate(4096)
    view = memory.tensor.fill_(0)
    memory.free()
    assert view.view(torch.float32).isnan().all()


def test_nothing_runs_before_something_makes_progress() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 4), device.allocate(4 * PIECE)
    stream = device.new_stream()
    device.copy(UP, at(hot, 0, 1, 2, 3), at(source, 0, 1, 2, 3), PIECE, stream)
    event = stream.record()
    for _ in range(50):
        assert not event.done()
    assert device.copies_pending == 4
    event.wait()
    assert device.copies_pending == 0
    assert [piece_of(hot, i) for i in range(4)] == [[0], [1], [2], [3]]


def test_a_source_that_is_reused_too_early_arrives_as_wrong_bytes() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(PIECE)
    stream = device.new_stream()
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    source.tensor.fill_(77)
    stream.record().wait()
    assert piece_of(hot, 0) == [77]


def test_a_wait_runs_what_the_event_needs_and_leaves_the_rest() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 3), device.allocate(3 * PIECE)
    first, second, third = (device.new_stream() for _ in range(3))
    device.copy(UP, at(hot, 0), at(source, 0), PIECE, first)
    second.wait_event(first.record())
    device.copy(UP, at(hot, 1), at(source, 1), PIECE, second)
    device.copy(UP, at(hot, 2), at(source, 2), PIECE, third)
    needed = second.record()
    device.copy(UP, at(hot, 0), at(source, 2), PIECE, second)
    needed.wait()
    assert [piece_of(hot, i) for i in range(3)] == [[0], [1], [255]]
    assert device.copies_pending == 2


def test_streams_overtake_each_other_and_pieces_of_a_batch_too() -> None:
    stream_orders, piece_orders = set(), set()
    for seed in range(60):
        device = SimulatedDevice(seed)
        source, hot = numbered(device, 3), device.allocate(PIECE)
        for i in range(3):
            device.copy(UP, at(hot, 0), at(source, i), PIECE, device.new_stream())
        device.run_all()
        stream_orders.add(tuple(piece_of(hot, 0)))
        device.copy(UP, at(hot, 0, 0, 0), at(source, 0, 1, 2), PIECE, device.new_stream())
        device.run_all()
        piece_orders.add(tuple(piece_of(hot, 0)))
    assert stream_orders == piece_orders == {(0,), (1,), (2,)}


def test_polls_see_unfinished_work_and_at_last_its_end() -> None:
    num_polls = set()
    for seed in range(40):
        device = SimulatedDevice(seed)
        source, hot = numbered(device, 8), device.allocate(8 * PIECE)
        stream = device.new_stream()
        device.copy(UP, at(hot, *range(8)), at(source, *range(8)), PIECE, stream)
        event = stream.record()
        polls = 1
        while not event.done():
            polls += 1
        num_polls.add(polls)
        assert [piece_of(hot, i) for i in range(8)] == [[i] for i in range(8)]
    assert len(num_polls) > 3


def test_a_waiting_stream_holds_back_until_the_event_whoever_makes_progress() -> None:
    for seed in range(60):
        device = SimulatedDevice(seed)
        source, hot, back = numbered(device, 2), device.allocate(PIECE), device.allocate_host(PIECE)
        up, down = device.new_stream(), device.new_stream()
        device.copy(UP, at(hot, 0), at(source, 1), PIECE, up)
        down.wait_event(up.record())
        device.copy(DOWN, at(back, 0), at(hot, 0), PIECE, down)
        while device.progress():
            assert piece_of(back, 0) in ([255], [1])
        assert piece_of(back, 0) == [1]


def test_the_compute_stream_has_what_it_waits_for_at_once() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(2 * PIECE)
    stream, compute = device.new_stream(), device.compute_stream()
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    event = stream.record()
    device.copy(UP, at(hot, 1), at(source, 1), PIECE, stream)
    compute.wait_event(event)
    assert [piece_of(hot, i) for i in range(2)] == [[1], [255]]


def test_a_step_is_seen_to_end_late() -> None:
    device = SimulatedDevice(seed=3)
    compute = device.compute_stream()
    late = 0
    for _ in range(100):
        event = compute.record()
        compute.wait_event(event)
        late += not event.done()
    assert 20 < late < 100


def test_a_stream_that_waits_for_a_step_runs_after_it_is_done() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(PIECE)
    stream, compute = device.new_stream(), device.compute_stream()
    step = compute.record()
    stream.wait_event(step)
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    copied = stream.record()
    assert not step.done()
    copied.wait()
    assert step.done()
    assert piece_of(hot, 0) == [1]


def test_a_failing_copy_is_told_by_the_next_event_of_its_stream_alone() -> None:
    device = SimulatedDevice(seed=5)
    source, hot = numbered(device, 3), device.allocate(3 * PIECE)
    stream, other = device.new_stream(), device.new_stream()
    before = stream.record()
    device.fail_copy(ahead=1)
    events = []
    for i in range(3):
        device.copy(UP, at(hot, i), at(source, i), PIECE, stream)
        events.append(stream.record())
    elsewhere = other.record()
    for event in (before, events[0], events[2], elsewhere):
        event.wait()
        assert event.done()
    for ask in (events[1].wait, events[1].done, events[1].wait):
        with pytest.raises(TransferError, match="copy 1 of 64 bytes"):
            ask()
    assert [piece_of(hot, i) for i in range(3)] == [[0], [255], [2]]
    with pytest.raises(TransferError, match="copy 1"):
        stream.synchronize()
    stream.synchronize()


def test_a_failing_copy_of_the_compute_stream_is_told_by_its_next_event() -> None:
    device = SimulatedDevice(seed=6)
    hot = device.allocate(2 * PIECE)
    hot.tensor.fill_(1)
    compute = device.compute_stream()
    device.fail_copy()
    device.copy(ACROSS, at(hot, 0), at(hot, 1), PIECE, compute)
    event = compute.record()
    with pytest.raises(TransferError):
        event.wait()
    assert piece_of(hot, 0) == [255]


def test_a_stream_goes_on_behind_an_event_that_failed() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(2 * PIECE)
    up, other = device.new_stream(), device.new_stream()
    device.fail_copy()
    device.copy(UP, at(hot, 0), at(source, 0), PIECE, up)
    failed = up.record()
    other.wait_event(failed)
    device.copy(UP, at(hot, 1), at(source, 1), PIECE, other)
    other.record().wait()
    assert piece_of(hot, 1) == [1]


@pytest.mark.parametrize("end", ["dst", "src"])
def test_memory_freed_under_a_copy_is_found(end: str) -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(PIECE)
    stream = device.new_stream()
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    memory = hot if end == "dst" else source
    with pytest.raises(InvariantError, match="freed under copy 0"):
        memory.free()
    stream.synchronize()
    memory.free()


@pytest.mark.parametrize("direction", list(Direction))
def test_addresses_outside_live_memory_are_refused(direction: Direction) -> None:
    device = SimulatedDevice()
    hot, more, host = device.allocate(4096), device.allocate(4096), device.allocate_host(4096)
    dst, src = {UP: (hot, host), DOWN: (host, hot), ACROSS: (hot, more)}[direction]
    stream = device.new_stream()
    wrong = {
        "dst": [(src if direction is not ACROSS else host).address, dst.address + 4090, 4096],
        "src": [(dst if direction is not ACROSS else host).address, src.address - 1, 0],
    }
    for name, addresses in wrong.items():
        for address in addresses:
            good = {"dst": at(dst, 0), "src": at(src, 0), name: np.array([address])}
            with pytest.raises(ValueError, match=f"{name}=0x.*not inside one live allocation"):
                device.copy(direction, good["dst"], good["src"], PIECE, stream)
    assert device.copies_submitted == 0
    dst.free()
    with pytest.raises(ValueError, match="dst="):
        device.copy(direction, at(dst, 0), at(src, 0), PIECE, stream)


def test_a_guarded_page_that_is_written_too_early_is_found() -> None:
    device = SimulatedDevice(eagerness=0.0)
    source, hot = numbered(device, 2), device.allocate(2 * PIECE)
    stream = device.new_stream()
    step = device.compute_stream().record()
    device.guard(hot.address, PIECE, until=step)
    device.copy(UP, at(hot, 1), at(source, 1), PIECE, stream)
    stream.synchronize()
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    with pytest.raises(InvariantError, match="in flight"):
        stream.synchronize()
    step.wait()
    device.copy(UP, at(hot, 0), at(source, 1), PIECE, stream)
    stream.synchronize()
    assert piece_of(hot, 0) == [1]


def test_hot_memory_is_limited() -> None:
    device = SimulatedDevice(total_bytes=8192)
    first = device.allocate(6000)
    assert device.memory_info().free_bytes == 2192
    first.free()
    device.allocate(8192)
    assert device.memory_info().free_bytes == 0


def test_the_same_seed_runs_in_the_same_order() -> None:
    def history(seed: int) -> list[bool]:
        device = SimulatedDevice(seed)
        source, hot = numbered(device, 4), device.allocate(4 * PIECE)
        seen = []
        for i in range(30):
            stream = device.new_stream()
            device.copy(UP, at(hot, i % 4), at(source, i % 4), PIECE, stream)
            seen.append(stream.record().done())
        return seen

    assert history(1) == history(1)
    assert len({tuple(history(seed)) for seed in range(5)}) == 5


def test_random_graphs_of_streams_and_events_keep_every_order() -> None:
    """Each copy writes its number into one of a few places; what a waiter reads is never too old."""
    for seed in range(40):
        _run_random_graph(random.Random(seed), SimulatedDevice(seed))


def _run_random_graph(rng: random.Random, device: SimulatedDevice) -> None:
    source, hot = numbered(device, 200), device.allocate(4 * PIECE)
    streams = [device.new_stream() for _ in range(4)]
    # Stream s alone writes place s, in rising order; an event promises at least what came before it.
    last = [-1] * 4
    promises: list[tuple[Event, list[int]]] = []
    known = [[-1] * 4 for _ in range(4)]
    for number in range(120):
        s = rng.randrange(4)
        device.copy(UP, at(hot, s), at(source, number), PIECE, streams[s])
        known[s][s] = last[s] = number
        if rng.random() < 0.5:
            promises.append((streams[s].record(), list(known[s])))
        if promises and rng.random() < 0.4:
            event, promised = rng.choice(promises)
            waiter = rng.randrange(4)
            streams[waiter].wait_event(event)
            known[waiter] = [max(a, b) for a, b in zip(known[waiter], promised, strict=True)]
        if promises and rng.random() < 0.4:
            event, promised = rng.choice(promises)
            if rng.random() < 0.3:
                event.wait()
            if event.done():
                _check(hot, promised)
    device.run_all()
    _check(hot, last)
    assert all(event.done() for event, _ in promises)


def _check(hot: Memory, promised: list[int]) -> None:
    for place, least in enumerate(promised):
        (value,) = piece_of(hot, place)
        assert value >= least or least == -1
