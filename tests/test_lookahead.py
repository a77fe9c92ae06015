"""Loads of streamed slices: started ahead of their use, each once, across layers, and never taken for others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from texts import Q_HEADS, TOLERANCE, Text, config_of, layout_of, run_step

from tiermem import PageLayout, TierConfig, TierManager
from tiermem._core import Tier
from tiermem.attention import partial_sums
from tiermem.attention.host import HostBackend
from tiermem.attention.partial_sums import PartialSums
from tiermem.device.simulated import SimulatedDevice
from tiermem.pools import VALID
from tiermem.streaming import SliceLoad
from tiermem.upload import BLOCK_BYTES, Upload

LAYERS = 3


def layout_with_layers() -> PageLayout:
    of_two = layout_of()
    return PageLayout(LAYERS, of_two.num_kv_heads, of_two.head_dim, "float16", of_two.page_tokens)


@pytest.fixture
def manager() -> Iterator[TierManager]:
    """Three hot pages, everything else streamed from RAM, a page a half of the ring at a time."""
    layout = layout_with_layers()
    with TierManager(layout, config_of(layout, gpu=3, ram=60, cpu_share=0)) as opened:
        yield opened


@pytest.fixture
def text(manager: TierManager) -> Text:
    text = Text.new(manager)
    assert run_step(manager, [text], [165]) < TOLERANCE["float16"]
    return text


class Order:
    """What happened, in order: ("load", layer, number of the chunk) and ("attend", layer)."""

    def __init__(self, manager: TierManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[Any, ...]] = []
        ring, backend = manager._core.ring, manager._core.backend
        start, attend = ring.start, backend.attend
        numbers: dict[int, int] = {}
        kept: list[SliceLoad] = []

        def starts(load: SliceLoad, layer: int) -> None:
            if not ring.holds(load, layer):
                kept.append(load)  # so that no other one gets its id
                number = numbers.setdefault(id(load), len(numbers))
                self.events.append(("load", layer, number))
            start(load, layer)

        def attends(pool: Any, layer: int, *arguments: Any, **more: Any) -> Any:
            if pool is ring.view:
                self.events.append(("attend", layer))
            return attend(pool, layer, *arguments, **more)

        monkeypatch.setattr(ring, "start", starts)
        monkeypatch.setattr(backend, "attend", attends)


def test_every_slice_is_loaded_once_and_two_chunks_ahead(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(manager, monkeypatch)
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
    loads = [event[1:] for event in order.events if event[0] == "load"]
    chunks = len(loads) // LAYERS
    assert chunks >= 4
    assert chunks % 2 == 0
    assert loads == [(layer, i) for layer in range(LAYERS) for i in range(chunks)]
    assert order.events[:2] == [("load", 0, 0), ("load", 0, 1)]
    started = attended = 0
    for event in order.events:
        if event[0] == "attend":
            assert started == min(attended + 2, len(loads))
            attended += 1
        else:
            started += 1
    # when the last chunk of a layer is attended, the first one of the next is there
    at = [i for i, event in enumerate(order.events) if event == ("attend", 0)][-1]
    assert ("load", 1, 0) in order.events[:at]


def test_attending_twice_or_not_at_all_is_right(manager: TierManager, text: Text) -> None:
    for times in ([2, 0, 1], [0, 0, 3], [1, 2, 0]):
        text.draw(1)
        with manager.step([text.sequence]) as step:
            for layer, count in enumerate(times):
                step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
                for _ in range(count):
                    q = torch.randn(1, Q_HEADS, 32).half()
                    out, want = step.attend(layer, q).double(), text.wanted(layer, q, None)
                    assert (out - want).norm() < TOLERANCE["float16"] * want.norm()
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]


def test_reading_within_a_step_takes_the_ring_and_gives_it_back(
    manager: TierManager, text: Text
) -> None:
    other = Text.new(manager)
    other.random.manual_seed(17)
    assert run_step(manager, [other], [110]) < TOLERANCE["float16"]
    text.draw(1)
    with manager.step([text.sequence]) as step:
        for layer in range(LAYERS):
            step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
            k, v = other.sequence.read(layer, 0, 100)
            assert torch.equal(k, other.k[layer, :100])
            assert torch.equal(v, other.v[layer, :100])
            q = torch.randn(1, Q_HEADS, 32).half()
            out, want = step.attend(layer, q).double(), text.wanted(layer, q, None)
            assert (out - want).norm() < TOLERANCE["float16"] * want.norm()


def test_a_half_is_filled_again_behind_what_used_it_only(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = manager._core
    streamed = text.sequence.pages[core.table.states(text.sequence.pages, Tier.GPU) != VALID][:2]
    tiers = np.full(1, Tier.RAM, dtype=np.int64)
    first, second = (core.ring.plan(0, streamed[i : i + 1], tiers) for i in range(2))
    kind, waits, used = type(core.mover.to_device), [], core.device.compute_stream().record()
    monkeypatch.setattr(kind, "wait_event", lambda _, event: waits.append(event))
    core.ring.begin_use(first, 0)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "record", lambda _: used)
        core.ring.end_use(0)
    assert used not in waits
    core.ring.start(second, 0)
    assert waits[-1] is used
    core.ring.start(second, 0)  # it is there
    assert waits.count(used) == 1
    core.ring.drop_ahead()


def test_a_step_ends_behind_loads_that_nothing_used(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read pages that must stay pinned until they have ended (R2)."""
    core, order = manager._core, []
    kind = type(core.mover.to_device)
    wait_event, record = kind.wait_event, kind.record

    def waits(stream: Any, event: Any) -> None:
        order.append(event)
        wait_event(stream, event)

    def records(stream: Any) -> Any:
        event = record(stream)
        order.append(event)
        return event

    monkeypatch.setattr(kind, "wait_event", waits)
    monkeypatch.setattr(kind, "record", records)
    text.draw(1)
    with manager.step([text.sequence]) as step:
        for layer in range(LAYERS):
            step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
        loads = [half.loaded for half in core.ring._halves]
        assert all(half.is_waiting for half in core.ring._halves)
        order.clear()
    # the step's end is recorded after the compute stream was told to wait for both
    first = order.index(loads[0])
    order = order[first:]  # before it, that what was used was compared with its checksums
    assert order[:2] == loads
    assert len(order) > 2


@pytest.mark.parametrize("seed", range(4))
def test_pages_that_come_after_others_are_never_taken_for_them(seed: int) -> None:
    """Sequences end and new ones get their page ids and slots, while loads of undone steps are in the ring."""
    layout, pick = layout_with_layers(), random.Random(seed)
    device = SimulatedDevice(seed, total_bytes=1 << 28, eagerness=0.5)
    table = config_of(layout, gpu=4, ram=40, cpu_share=0).to_table()
    config = TierConfig.from_table({**table, "device": "auto"})
    with TierManager(layout, config, device=device) as manager:
        for _ in range(6):
            text = Text.new(manager)
            text.random.manual_seed(pick.randrange(1 << 30))
            errors = [run_step(manager, [text], [pick.randint(90, 200)])]
            for _ in range(3):
                errors.append(run_step(manager, [text], [pick.randint(1, 3)]))
                with pytest.raises(KeyError):
                    undone_step(manager, text, pick.randint(0, LAYERS))
            assert max(errors) < TOLERANCE["float16"]
            manager.check()
            text.sequence.close()


def undone_step(manager: TierManager, text: Text, layers: int) -> None:
    """A step that raises after some layers; `text` stays what it was."""
    kept = text.k, text.v
    text.draw(1)
    new, (text.k, text.v) = (text.k[:, -1:], text.v[:, -1:]), kept
    with manager.step([text.sequence]) as step:
        for layer in range(layers):
            step.append(layer, new[0][layer], new[1][layer])
            step.attend(layer, torch.randn(1, Q_HEADS, 32).half())
        raise KeyError


# ---- partial results ------------------------------------------------------------------------------


@pytest.mark.parametrize("most_bytes", [0, 3000, 1 << 30])
def test_partial_sums_are_those_of_everything(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    """However many are merged at a time, over all rows or some, in float64."""
    monkeypatch.setattr(partial_sums, "MOST_BYTES", most_bytes)
    rows, heads, dim = 7, 3, 5
    out, lse = torch.randn(rows, heads, dim), torch.randn(rows, heads)
    lse[2] = -torch.inf
    out[2] = 0
    weighted = torch.exp(lse).double()[..., None] * out.double()
    total = torch.exp(lse).double()
    sums = PartialSums(HostBackend(1), out.clone(), lse.clone())
    for _ in range(9):
        start = random.choice([0, 0, 0, 3])
        part_rows = slice(start, rows if start == 0 else 6)
        shape = (part_rows.stop - start, heads)
        part, part_lse = torch.randn(*shape, dim), 4 * torch.randn(shape)
        weights = torch.exp(part_lse.double())
        weighted[part_rows] += weights[..., None] * part.double()
        total[part_rows] += weights
        sums.add(part_rows, part, part_lse)
    found, found_lse = sums.result(torch.float32)
    assert torch.allclose(found.double(), weighted / total[..., None], atol=1e-5)
    assert torch.allclose(found_lse.double(), torch.log(total), atol=1e-5)


# ---- uploads --------------------------------------------------------------------------------------


def test_on_the_cpu_an_upload_is_the_array() -> None:
    upload = Upload(torch.device("cpu"))
    array = torch.arange(6).reshape(2, 3).numpy()
    tensor = upload.put(array)
    upload.send()
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == array.tolist()


@pytest.mark.gpu
def test_uploads_of_every_size_and_dtype_arrive() -> None:
    upload, pairs = Upload(torch.device("cuda")), []
    for i in range(300):
        dtype = random.choice([torch.int32, torch.int64])
        count = random.choice([0, 1, 3, 1000, BLOCK_BYTES, random.randint(1, 5000)])
        array = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=dtype)
        pairs.append((array, upload.put(array.numpy())))
        if i % 90 == 89:
            upload.send()
    upload.send()
    for array, tensor in pairs:
        assert tensor.dtype == array.dtype
        assert torch.equal(tensor.cpu(), array)
        assert tensor.data_ptr() % 16 == 0 or not len(array)
