"""What the tests of liveness share: managers over a disk and a device that hang or fail when they are told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from world import LAYOUT, kv_of, store_bytes

from tiermem import ConfigError, Sequence, TierConfig, TierManager, _core
from tiermem._core import EngineKind, FaultOps
from tiermem.breaker import TierState
from tiermem.device.protocol import Device

PAGE = LAYOUT.page_tokens
DEADLINE_S = 0.15
SLACK_S = 1.0
GIVE_UP_S = 30.0


@pytest.fixture(name="faults")
def faults_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultOps]:
    """Faults under the engine of every store that is opened meanwhile."""
    planned = FaultOps()

    def opened(*_: object) -> _core.IoEngine:
        return _core.IoEngine(EngineKind.THREADS, num_threads=3, faults=planned)

    monkeypatch.setattr("tiermem.guarded_io._open_engine", opened)
    yield planned
    planned.release()


def open_manager(
    path: Path | None, slots: tuple[int, int, int], device: Device | None = None, **keys: object
) -> TierManager:
    gpu, ram, ssd = slots
    size = LAYOUT.slot_bytes
    values: dict[str, object] = {
        "io_timeout_s": DEADLINE_S, "copy_timeout_s": DEADLINE_S, "device": "cpu", "cpu_share": 0.0,
        "gpu": gpu * size, "ram": ram * size, "ssd": store_bytes(ssd) if path else 0,
        "ssd_path": path, "low_watermark": 0.0, "high_watermark": 0.0,
    }  # fmt: skip
    return TierManager(LAYOUT, TierConfig(**{**values, **keys}), "live", device=device)  # type: ignore[arg-type]


def grow(manager: TierManager, sequence: Sequence, count: int, salt: int = 0) -> None:
    """Append and record `count` tokens that are told by `salt`."""
    append(manager, sequence, count, salt)
    start = sequence.num_named
    sequence.record(tokens_of(salt, sequence.num_tokens)[start:])


def append(manager: TierManager, sequence: Sequence, count: int, salt: int = 0) -> None:
    """Append `count` tokens that are told by `salt`."""
    start = sequence.num_tokens
    tokens = tokens_of(salt, start + count)[start:]
    with manager.step([sequence], new_tokens=count) as step:
        for layer in range(LAYOUT.num_layers):
            kv = kv_of(b"", np.array(tokens), start, layer)
            step.append(layer, kv[0], kv[1])
            step.attend(layer, torch.ones(count, 1, LAYOUT.head_dim))


def tokens_of(salt: int, count: int) -> list[int]:
    return [salt * 1000 + i for i in range(count)]


def check_content(sequence: Sequence, salt: int = 0) -> None:
    """Every stored byte is what was appended."""
    count = sequence.num_tokens
    for layer in range(LAYOUT.num_layers):
        k, v = sequence.read(layer, 0, count)
        want = kv_of(b"", np.array(tokens_of(salt, count), dtype=np.int64), 0, layer)
        assert torch.equal(k, want[0])
        assert torch.equal(v, want[1])


@contextmanager
def in_time(deadlines: int = 1) -> Iterator[None]:
    """What is done within comes back by its deadlines and a second: the promise itself, not a speed."""
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < deadlines * DEADLINE_S + SLACK_S


def make_due(manager: TierManager) -> None:
    """The pause of the SSD tier's breaker is over."""
    assert manager._store is not None
    manager._store.breaker._backoff._until_s = 0.0


def state(manager: TierManager) -> TierState:
    assert manager._store is not None
    return manager._store.breaker.state


def settle(manager: TierManager) -> None:
    """Poll until what was late has ended and the tier was tried again."""
    ended = threading.Event()
    for _ in range(500):
        make_due(manager)
        manager.poll()
        if state(manager) is TierState.ON and not len(manager._core.in_flight):
            return
        ended.wait(0.01)
    raise AssertionError("it did not come back")


def reopened(path: Path, slots: tuple[int, int, int]) -> TierManager:
    """A manager on a store that is given back as soon as what was late there has ended."""
    end_s = time.monotonic() + GIVE_UP_S
    while time.monotonic() < end_s:
        with suppress(ConfigError):
            return open_manager(path, slots, io_timeout_s=GIVE_UP_S)
        threading.Event().wait(0.01)
    raise AssertionError(f"{path} was not given back")
