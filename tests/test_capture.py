"""What is put right after a failed capture, against a torch that fails as the real one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tiermem.device.capture import capture


@dataclass
class FakeStream:
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))


@dataclass
class FakeTorch:
    """torch.cuda's state, as far as captures change it."""

    refuses: bool
    current: FakeStream = field(default_factory=lambda: FakeStream("the caller's"))
    generator_captures: bool = False
    allocator_captures: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def graph(
        self, graph: object, pool: Any = None, stream: FakeStream | None = None
    ) -> Iterator[None]:
        before, pool = self.current, pool or (9, 9)
        self.current = stream or FakeStream("torch's")
        self.generator_captures = True
        self.allocator_captures.append(pool)
        try:
            yield
        finally:
            if self.refuses and graph == "wanted":
                raise RuntimeError("operation not permitted")
        self.generator_captures = False
        self.allocator_captures.remove(pool)
        self.current = before

    def end_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.allocator_captures:
            raise RuntimeError("not recording")
        self.allocator_captures.remove(pool)

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream


@pytest.fixture(params=[False, True])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch(request.param)
    zeros = torch.zeros
    for name, value in {
        "graph": fake.graph, "set_stream": fake.set_stream, "current_stream": lambda: fake.current,
        "graph_pool_handle": lambda: (0, 1), "CUDAGraph": lambda: "another",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_pool, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    return fake


@pytest.mark.parametrize("pool", [None, (0, 7)])
@pytest.mark.parametrize("stream", [None, FakeStream("given")])
def test_everything_is_as_it_was(
    fake: FakeTorch, pool: tuple[int, int] | None, stream: Any
) -> None:
    before, seen = fake.current, []

    def record() -> None:
        with capture("wanted", pool=pool, stream=stream):  # type: ignore[arg-type]
            seen.append((fake.current.name, fake.allocator_captures[-1]))

    if fake.refuses:
        with pytest.raises(RuntimeError, match="operation not permitted"):
            record()
    else:
        record()
    assert seen == [(stream.name if stream else "torch's", pool or (0, 1))]
    assert fake.current is before
    assert not fake.generator_captures
    assert fake.allocator_captures == []
