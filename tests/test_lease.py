"""Leases, resident plans and resident tables: what lets a step begin without looking at every page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from world import LAYOUT, kv_of

from tiermem import PageLayout, Sequence, TierConfig, TierManager
from tiermem._core import Tier
from tiermem.device.simulated import SimulatedDevice
from tiermem.graphs import CapturedDecode
from tiermem.lease import IDLE_STEPS
from tiermem.resident import MOST_TABLES, ResidentTables
from tiermem.step import Step

PAGE = LAYOUT.page_tokens


@pytest.fixture
def manager() -> Iterator[TierManager]:
    """24 hot and 24 warm slots on a device whose copies run when they are waited for."""
    config = TierConfig(
        gpu=24 * LAYOUT.slot_bytes,
        ram=24 * LAYOUT.slot_bytes,
        ssd=0,
        low_watermark=0.2,
        high_watermark=0.4,
    )
    device = SimulatedDevice(7, total_bytes=1 << 26, eagerness=0.0)
    with TierManager(LAYOUT, config, device=device) as manager:
        yield manager


def grow(manager: TierManager, *sequences: Sequence, tokens: int = 1) -> bool:
    """Append `tokens` tokens to each; whether the step was planned as a resident one."""
    with manager.step(sequences, tokens) as step:
        for layer in range(LAYOUT.num_layers):
            kv = [
                kv_of(b"", np.arange(s.num_tokens, s.num_tokens + tokens), s.num_tokens, layer)
                for s in sequences
            ]
            k, v = torch.cat(kv, 1)
            step.append(layer, k, v)
        assert step._plan is not None
        return step._plan.is_resident


def verify(sequence: Sequence) -> None:
    for layer in range(LAYOUT.num_layers):
        k, v = sequence.read(layer, 0, sequence.num_tokens)
        want = kv_of(b"", np.arange(sequence.num_tokens), 0, layer)
        assert torch.equal(k, want[0])
        assert torch.equal(v, want[1])


def pins(manager: TierManager, sequence: Sequence) -> list[int]:
    return manager._core.table.pins(sequence.pages, Tier.GPU).tolist()


def settle(manager: TierManager) -> None:
    manager._core.in_flight.drain()


def test_steps_of_a_sequence_that_is_hot_are_resident(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    assert grow(manager, sequence, tokens=3 * PAGE + 5), "a new sequence has no pages to look at"
    settle(manager)
    assert pins(manager, sequence) == [1, 1, 1, 0], "full pages are held, the open one is not"
    for _ in range(2 * PAGE):
        assert grow(manager, sequence)
    settle(manager)
    assert pins(manager, sequence) == [1, 1, 1, 1, 1, 0]
    verify(sequence)
    manager.check()


def test_a_lease_ends_after_many_steps_of_others(manager: TierManager) -> None:
    first, second = manager.open_sequence(), manager.open_sequence()
    grow(manager, first, tokens=2 * PAGE)
    for _ in range(IDLE_STEPS - 1):
        grow(manager, second)
    settle(manager)
    assert pins(manager, first) == [1, 1]
    grow(manager, second)
    settle(manager)
    assert pins(manager, first) == [0, 0]
    assert pins(manager, second) == [1]
    assert not grow(manager, first), "it has to be looked at again"
    assert grow(manager, first)


def test_a_lease_that_ends_under_a_step_keeps_its_pins_until_the_step_was_reaped(
    manager: TierManager,
) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=2 * PAGE)
    settle(manager)
    assert grow(manager, sequence), "a step that counts on the lease alone"
    manager._core.leases.end_all()
    assert pins(manager, sequence)[:2] == [1, 1], "R2: the step has not been seen to end"
    settle(manager)
    assert pins(manager, sequence) == [0, 0, 0]


def test_leaves_are_older_than_their_parents_after_a_lease(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=4 * PAGE)
    settle(manager)
    manager._core.leases.end_all()
    coldest = manager._core.table.coldest_dirty(Tier.GPU, 4)
    assert coldest.tolist() == sequence.pages[::-1].tolist()


def test_room_ends_leases(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=18 * PAGE)
    assert grow(manager, sequence)
    assert manager._core.room.gain(Tier.GPU, 24) >= 20, "all but the step's own pages can go"
    settle(manager)
    verify(sequence)


def test_prefetching_ends_leases_of_sequences_that_are_idle(manager: TierManager) -> None:
    idle, busy, coming = (manager.open_sequence() for _ in range(3))
    grow(manager, coming, tokens=8 * PAGE)
    coming.suspend()
    grow(manager, idle, tokens=15 * PAGE)
    idle_pages = idle.pages
    manager._core.mover.submit(idle_pages, Tier.GPU, Tier.RAM)  # clean, but for the lease
    grow(manager, busy, tokens=2 * PAGE)
    settle(manager)
    assert min(pins(manager, idle)) == 1
    assert coming.prefetch() == 8
    assert max(pins(manager, idle)) == 0
    assert pins(manager, busy) == [1, 1], "the last step's leases stay"
    settle(manager)
    verify(coming)


def test_nothing_is_leased_below_the_low_watermark(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=22 * PAGE)
    settle(manager)
    assert max(pins(manager, sequence)) == 0, "idle work must be able to copy the pages down"
    manager.poll()
    settle(manager)
    assert (manager._core.table.states(sequence.pages, Tier.RAM) != 0).any()


@pytest.mark.parametrize("end", ["close", "suspend", "rollback"])
def test_a_sequence_that_gives_pages_up_gives_their_pins_up(manager: TierManager, end: str) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=5 * PAGE)
    pages = sequence.pages
    if end == "rollback":
        sequence.rollback(2 * PAGE + 3)
    else:
        getattr(sequence, end)()
    settle(manager)
    alive = pages[manager._core.table.alive(pages)]
    kept = 2 if end == "rollback" else 0
    assert int(manager._core.table.pins(alive, Tier.GPU).sum()) == kept
    manager.check()
    if end == "rollback":
        grow(manager, sequence, tokens=PAGE)
        verify(sequence)


def test_a_failed_step_leaves_the_lease_as_it_was(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=2 * PAGE)
    with pytest.raises(RuntimeError, match="body"), manager.step([sequence]):
        raise RuntimeError("body")
    settle(manager)
    assert pins(manager, sequence) == [1, 1]
    assert grow(manager, sequence)
    verify(sequence)


# ---- tables ----------------------------------------------------------------------------------------


def held(tables: ResidentTables, row: int) -> list[int]:
    """What the device's tables say of the slots of one row."""
    count = int(tables.paged.num_pages[row])
    return tables.paged.block_table[row, :count].tolist()


def decode(manager: TierManager, *sequences: Sequence) -> ResidentTables:
    """One token each; the tables of the step, which must say where every page is."""
    with manager.step(sequences) as step:
        tables = step.resident_tables
        assert tables is not None
        assert step._plan is not None
        for row, share in enumerate(step._plan.shares):
            slots = manager._core.table.slots(share.pages, Tier.GPU)
            assert held(tables, row) == slots.tolist()
            place = slots[-1] * PAGE + share.past_tokens % PAGE
            assert int(tables.token_slots[row]) == place
            assert int(tables.paged.kv_end[row]) == share.past_tokens + 1
            assert int(tables.paged.q_start[row]) == share.past_tokens
        for layer in range(LAYOUT.num_layers):
            kv = [kv_of(b"", np.array([s.num_tokens]), s.num_tokens, layer) for s in sequences]
            step.append(layer, *torch.cat(kv, 1))
    return tables


def test_tables_keep_their_place_and_follow_the_sequences(manager: TierManager) -> None:
    sequences = [manager.open_sequence(), manager.open_sequence()]
    grow(manager, *sequences, tokens=2 * PAGE + 3)
    tables = decode(manager, *sequences)
    address = tables.paged.block_table.data_ptr()
    for i in range(3 * PAGE):
        if i == PAGE:
            sequences[0].rollback(PAGE + 2)  # its last page is another one now
            grow(manager, *sequences)
        if i == 2 * PAGE:
            sequences.reverse()
        assert decode(manager, *sequences) is tables
    assert tables.paged.block_table.data_ptr() == address
    for sequence in sequences:
        verify(sequence)


def test_tables_follow_what_steps_of_other_batches_changed(manager: TierManager) -> None:
    first, second = manager.open_sequence(), manager.open_sequence()
    grow(manager, first, second, tokens=4 * PAGE)
    tables = decode(manager, first)
    first.rollback(2 * PAGE + 1)
    grow(manager, first, second, tokens=3 * PAGE)  # other pages than those the tables know
    decode(manager, first, second)
    assert decode(manager, first) is tables
    verify(first)


def test_a_sealed_last_page_is_not_written_by_a_resident_step(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=PAGE + 3)
    settle(manager)
    twin = sequence.fork()
    assert not grow(manager, sequence), "the page is the twin's too"
    assert sequence.pages[-1] != twin.pages[-1]
    verify(sequence)
    verify(twin)


def test_tables_follow_pages_that_moved_between_steps(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=3 * PAGE)
    tables = decode(manager, sequence)
    before = held(tables, 0)
    sequence.suspend()
    other = manager.open_sequence()
    grow(manager, other, tokens=2 * PAGE)  # takes slots that were the sequence's
    while not grow(manager, sequence):
        settle(manager)
    assert decode(manager, sequence) is tables
    assert held(tables, 0) != before
    verify(sequence)
    verify(other)


def test_tables_grow_with_the_longest_sequence() -> None:
    layout = PageLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", page_tokens=16)
    with TierManager(
        layout, TierConfig(gpu=200 * layout.slot_bytes, ram=0, ssd=0, device="cpu")
    ) as tm:
        sequence = tm.open_sequence()
        widths = []
        for tokens in (40 * 16, 1, 60 * 16, 1, 40 * 16, 1):
            with tm.step([sequence], tokens) as step:
                if step.resident_tables is not None:
                    widths.append(step.resident_tables.max_pages)
                kv = torch.zeros(tokens, 1, 16)
                step.append(0, kv, kv)
        assert widths == [64, 128, 256]


def test_tables_of_few_batch_sizes_are_kept(manager: TierManager) -> None:
    sequences = [manager.open_sequence() for _ in range(MOST_TABLES + 2)]
    grow(manager, *sequences)
    for count in range(1, len(sequences) + 1):
        grow(manager, *sequences[:count])
    assert len(manager._resident._tables) == MOST_TABLES


def test_decode_without_graphs_runs_the_body_as_it_is(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, tokens=PAGE)

    def body(step: Step, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for layer in range(LAYOUT.num_layers):
            step.append(layer, k[layer], v[layer])
        return step.attend(LAYOUT.num_layers - 1, k[0])

    decoding = CapturedDecode(manager, body)
    for position in range(PAGE, 2 * PAGE):
        kv = torch.stack(
            [
                kv_of(b"", np.array([position]), position, layer)
                for layer in range(LAYOUT.num_layers)
            ]
        )
        assert decoding.run([sequence], kv[:, 0], kv[:, 1]).shape == (1, 1, LAYOUT.head_dim)
    assert decoding.num_graphs == 0
    assert sequence.num_tokens == 2 * PAGE
    verify(sequence)
