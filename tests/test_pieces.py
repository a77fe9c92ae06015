"""A step recorded in pieces: what is replayed, in which order, from and to which memory. Without a GPU, by a fake
capture, in whose graphs stands what was given to a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiermem import pieces
from tiermem.pieces import record


@dataclass
class FakeGraph:
    works: list[Callable[[], object]] = field(default_factory=list)

    def replay(self) -> None:
        for work in self.works:
            work()


@dataclass
class FakeSplitter:
    graphs: list[FakeGraph] = field(default_factory=list)
    is_recording: bool = False

    def begin(self) -> None:
        assert not self.is_recording
        self.graphs.append(FakeGraph())
        self.is_recording = True

    def end(self) -> None:
        assert self.is_recording
        self.is_recording = False

    def give(self, work: Callable[[], object]) -> None:
        """Kernels that the body launches."""
        assert self.is_recording
        self.graphs[-1].works.append(work)


class FakeStep:
    """Attends with the sum of what was appended to the layer, times q."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.sums: dict[int, torch.Tensor] = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.log.append(("append", layer))
        self.sums[layer] = (k + v).clone()

    def attend(self, layer: int, q: torch.Tensor, **how: object) -> torch.Tensor:
        self.log.append(("attend", layer, how))
        return q * self.sums[layer]


@pytest.fixture
def splitter(monkeypatch: pytest.MonkeyPatch) -> FakeSplitter:
    fake = FakeSplitter()

    @contextmanager
    def capture_split(_pool: object) -> Iterator[FakeSplitter]:
        fake.begin()
        yield fake
        fake.end()

    monkeypatch.setattr(pieces, "capture_split", capture_split)
    return fake


def test_layers_run_between_the_graphs_in_their_order(splitter: FakeSplitter) -> None:
    def body(step: Any, x: torch.Tensor) -> SimpleNamespace:
        hidden = [torch.zeros(3) for _ in range(3)]
        result = torch.zeros(3)
        k, v, q = (torch.zeros(3) for _ in range(3))
        splitter.give(lambda: hidden[0].copy_(x + 1))
        for layer in range(2):
            splitter.give(lambda layer=layer: k.copy_(hidden[layer] * 2))
            splitter.give(lambda layer=layer: v.copy_(hidden[layer] * 3))
            step.append(layer, k, v)
            splitter.give(lambda layer=layer: q.copy_(hidden[layer] + 1))
            out = step.attend(layer, q, scale=0.5 + layer, window=None)
            splitter.give(lambda layer=layer, out=out: hidden[layer + 1].copy_(out))
        step.append(2, hidden[2], hidden[2])
        splitter.give(lambda: result.copy_(hidden[2] - 1))
        return SimpleNamespace(logits=result)

    recorded = record(body, (torch.full((3,), float("nan")),), None)
    assert len(recorded.graphs) == 3
    for x in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 7.0])):
        recorded.inputs[0].copy_(x)
        step = FakeStep()
        found = recorded.replay(step)  # type: ignore[arg-type]
        hidden = x + 1
        for _ in range(2):
            hidden = (hidden + 1) * (5 * hidden)
        assert torch.equal(found.logits, hidden - 1)
        assert step.log == [
            ("append", 0),
            ("attend", 0, {"scale": 0.5, "window": None}),
            ("append", 1),
            ("attend", 1, {"scale": 1.5, "window": None}),
            ("append", 2),
        ]


def test_a_layer_may_be_attended_twice(splitter: FakeSplitter) -> None:
    def body(step: Any, q: torch.Tensor) -> torch.Tensor:
        step.append(0, q, q)
        return torch.stack([step.attend(0, q), step.attend(0, q)])

    recorded = record(body, (torch.ones(4),), None)
    step = FakeStep()
    recorded.replay(step)  # type: ignore[arg-type]
    assert [entry[0] for entry in step.log] == ["append", "attend", "attend"]
    assert len(splitter.graphs) == 3
