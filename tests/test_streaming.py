"""Slices that come from the SSD: read ahead of their use, in order, and never left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TOLERANCE, Text, config_of, layout_of, run_step

from tiermem import CorruptPageError, TierManager
from tiermem._core import Tier

LAYERS = 2


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[TierManager]:
    """Two hot pages and none in RAM: nearly everything is streamed from the SSD, two pages at a time."""
    layout = layout_of()
    config = config_of(layout, gpu=2, ram=0, ssd=60, path=tmp_path / "store")
    with TierManager(layout, config) as opened:
        yield opened
        assert not is_reading(opened)


def is_reading(manager: TierManager) -> bool:
    """Whether a read from the SSD was started that nobody has taken or dropped."""
    return any(half.ahead for half in manager._core.ring._halves)


@pytest.fixture
def text(manager: TierManager) -> Text:
    text = Text.new(manager)
    for _ in range(3):
        assert run_step(manager, [text], [32]) < TOLERANCE["float16"]
    return text


class Order:
    """What happened, in order: "read" for slices of a layer, "attend" for a chunk."""

    def __init__(self, manager: TierManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        store, backend = manager._store, manager._core.backend
        assert store is not None
        read_slices, attend = store.read_slices, backend.attend

        def read(slots: Any, layer: int, addresses: Any) -> Any:
            self.events.append(f"read {layer}")
            return read_slices(slots, layer, addresses)

        def attends(pool: Any, layer: int, *arguments: Any, **more: Any) -> Any:
            if pool is manager._core.ring.view:
                self.events.append(f"attend {layer}")
            return attend(pool, layer, *arguments, **more)

        monkeypatch.setattr(store, "read_slices", read)
        monkeypatch.setattr(backend, "attend", attends)


def test_each_chunk_is_read_while_the_one_before_is_attended(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(manager, monkeypatch)
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
    chunks = order.events.count("attend 0")
    assert chunks > 1
    wanted = ["read 0"]
    for layer in range(LAYERS):
        following = [layer] * (chunks - 1) + [layer + 1]
        for next_layer in following:
            wanted += [f"read {next_layer}"] * (next_layer < LAYERS) + [f"attend {layer}"]
    assert order.events == wanted


def test_attending_twice_or_not_at_all_reads_what_is_needed(
    manager: TierManager, text: Text
) -> None:
    text.draw(1)
    with manager.step([text.sequence]) as step:
        for layer in range(LAYERS):
            step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
            for _ in range(2 - layer):
                q = torch.randn(1, 6, 32).half()
                out, want = step.attend(layer, q).double(), text.wanted(layer, q, None)
                assert (out - want).norm() < TOLERANCE["float16"] * want.norm()
    text.draw(1)
    with manager.step([text.sequence]) as step:
        step.append(0, text.k[0, -1:], text.v[0, -1:])
        step.attend(0, torch.randn(1, 6, 32).half())  # reads ahead for a layer that is not attended
        step.append(1, text.k[1, -1:], text.v[1, -1:])
    assert not is_reading(manager)
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]


def test_a_body_that_raises_leaves_no_read_behind(manager: TierManager, text: Text) -> None:
    kept = text.k, text.v
    text.draw(1)

    def fails() -> None:
        with manager.step([text.sequence]) as step:
            step.append(0, text.k[0, -1:], text.v[0, -1:])
            step.attend(0, torch.randn(1, 6, 32).half())
            assert is_reading(manager)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not is_reading(manager)
    text.k, text.v = kept
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]


def test_a_damaged_slice_is_found_where_it_is_used(manager: TierManager, text: Text) -> None:
    store = manager._store
    assert store is not None
    run_step(manager, [text], [1])
    slots = manager._core.table.slots(text.sequence.pages[-3:-2], Tier.SSD)
    place = int(slots[0]) * store.slot_stride + manager.layout.layer_bytes + 17
    with (store.path / "slots").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptPageError, match="not what was written there"):
        run_step(manager, [text], [1])
    assert not is_reading(manager)
    manager.check()
