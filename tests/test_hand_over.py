"""Attention that is handed over to the CPU's threads by words, beside a simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from texts import Q_HEADS, TOLERANCE, Text, config_of, run_step

from tiermem import ConfigError, PageLayout, TierConfig, TierManager, TransferError, hand_over
from tiermem.device.simulated import SimulatedDevice
from tiermem.hand_over import NUM_BUFFERS, HandOver
from tiermem.ram_attention import FixedShare

LAYERS = 2 * NUM_BUFFERS + 1


def layout_of(dtype: str = "float16") -> PageLayout:
    return PageLayout(num_layers=LAYERS, num_kv_heads=2, head_dim=32, dtype=dtype, page_tokens=16)


def open_manager(
    layout: PageLayout, seed: int = 7, gpu: int = 4, share: float = 1.0, **more: object
) -> TierManager:
    """Nearly everything is in RAM."""
    config = config_of(layout, gpu=gpu, ram=60, cpu_share=share, **more)
    config = TierConfig.from_table({**config.to_table(), "device": "auto"})
    device = SimulatedDevice(seed, total_bytes=1 << 28, eagerness=0.5)
    return TierManager(layout, config, device=device)


@pytest.fixture
def manager() -> Iterator[TierManager]:
    with open_manager(layout_of()) as opened:
        yield opened


@pytest.fixture
def text(manager: TierManager) -> Text:
    text = Text.new(manager)
    assert run_step(manager, [text], [300]) < TOLERANCE["float16"]
    return text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_more_layers_than_buffers_and_growing_batches(dtype: str) -> None:
    with open_manager(layout_of(dtype), gpu=8) as manager:
        texts = [Text.new(manager) for _ in range(2)]
        errors = [run_step(manager, texts, [200, 150])]
        batches = ([1, 1], [2, 1], [1, 1], [32, 31], [1, 5])
        errors += [run_step(manager, texts, counts) for counts in batches]
        assert max(errors) < TOLERANCE[dtype]
        assert manager.stats().attended_bytes > 0
        assert manager.stats().attended_s > 0


def test_shares_change_and_layers_are_attended_twice_or_not_at_all(
    manager: TierManager, text: Text
) -> None:
    ram, random = manager._core.ram, np.random.default_rng()
    assert isinstance(ram, HandOver)
    for share in random.uniform(0, 1, 8):
        ram.policy = FixedShare(float(share))
        text.draw(1)
        with manager.step([text.sequence]) as step:
            for layer in range(LAYERS):
                step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
                for _ in range(int(random.integers(0, 3))):
                    q = torch.randn(1, Q_HEADS, 32).half()
                    want = text.wanted(layer, q, None)
                    error = (step.attend(layer, q).double() - want).norm() / want.norm()
                    assert error < TOLERANCE["float16"]
    manager.check()


def test_words_wrap(manager: TierManager, text: Text) -> None:
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    ram._value = 2**32 - 3  # as after as many jobs
    ram._words.tensor.view(torch.int32)[:] = -3
    for _ in range(2):
        assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
    assert ram._value == 2 * LAYERS - 3


def check_that_a_step_fails(manager: TierManager, text: Text, match: str) -> None:
    """By an error with these words; everything is as before."""
    kept, tokens = (text.k, text.v), text.sequence.num_tokens
    text.draw(1)

    def fails() -> None:
        with manager.step([text.sequence]) as step:
            for layer in range(LAYERS):
                step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
                step.attend(layer, torch.randn(1, Q_HEADS, 32).half())

    with pytest.raises(TransferError, match=match):
        fails()
    text.k, text.v = kept
    assert text.sequence.num_tokens == tokens
    manager.check()


def test_queries_that_never_come_fail_the_step_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_manager(layout_of(), io_timeout_s=2.0) as manager:
        text = Text.new(manager)
        assert run_step(manager, [text], [300]) < TOLERANCE["float16"]
        lost = iter([False] * 3 + [True])
        device = manager._device
        write_word = device.write_word

        def write(address: int, value: int) -> None:
            if not next(lost, False):
                write_word(address, value)

        with monkeypatch.context() as patch:
            patch.setattr(device, "write_word", write)
            check_that_a_step_fails(manager, text, "attention on the CPU failed")
        assert run_step(manager, [text], [2]) < TOLERANCE["float16"]


def test_work_that_is_refused_undoes_the_step(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    submit, count = ram._attention.submit, iter(range(100))

    def refuses(*arguments: object, **more: object) -> int:
        if next(count) == 5:
            raise RuntimeError("attention overruns its deadline")
        return submit(*arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ram._attention, "submit", refuses)
        check_that_a_step_fails(manager, text, "the CPU cannot attend: attention overruns")
    assert run_step(manager, [text], [2]) < TOLERANCE["float16"]


def test_memory_that_is_refused_undoes_the_step(
    manager: TierManager, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram, device = manager._core.ram, manager._device
    assert isinstance(ram, HandOver)
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
    allocate, count = device.allocate_host, iter(range(100))

    def refuses(num_bytes: int) -> object:
        if next(count) == 2:
            raise ConfigError("no memory is left")
        return allocate(num_bytes)

    kept, tokens = (text.k, text.v), text.sequence.num_tokens
    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate_host", refuses)
        with pytest.raises(TransferError, match="no memory is left"):
            run_step(manager, [text], [20])
    text.k, text.v = kept
    assert text.sequence.num_tokens == tokens
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
    assert len(ram._buffers) == NUM_BUFFERS
    for buffer in ram._buffers:
        assert buffer.memory.tensor.numel(), "one that was freed is in use"
    assert run_step(manager, [text], [30]) < TOLERANCE["float16"]


def test_wrong_queries_are_refused_before_anything_is_handed_over(
    manager: TierManager, text: Text
) -> None:
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    before = ram._attention.counters().submitted
    text.draw(1)
    with manager.step([text.sequence]) as step:
        for layer in range(LAYERS):
            step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
            if layer:
                continue
            with pytest.raises(TypeError, match="float32"):
                step.attend(layer, torch.randn(1, Q_HEADS, 32))
            with pytest.raises(ValueError, match="q of shape"):
                step.attend(layer, torch.randn(2, Q_HEADS, 32).half())
    assert ram._attention.counters().submitted == before


def test_a_body_that_raises_leaves_nothing_running(manager: TierManager, text: Text) -> None:
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    kept = text.k, text.v
    text.draw(1)

    def fails() -> None:
        with manager.step([text.sequence]) as step:
            step.append(0, text.k[0, -1:], text.v[0, -1:])
            step.attend(0, torch.randn(1, Q_HEADS, 32).half())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not ram._jobs
    text.k, text.v = kept
    assert run_step(manager, [text], [1]) < TOLERANCE["float16"]


class Clocked:
    """An event of a GPU: when it was recorded, by a clock that every record moves by a millisecond."""

    now_ms = 0.0

    def __init__(self) -> None:
        self.at_ms: float | None = None

    def record(self) -> None:
        Clocked.now_ms += 1.0
        self.at_ms = Clocked.now_ms

    def query(self) -> bool:
        return True

    def elapsed_time(self, after: Clocked) -> float:
        assert self.at_ms is not None
        assert after.at_ms is not None
        return after.at_ms - self.at_ms


def test_a_wait_that_could_not_be_enqueued_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over, "_timed_event", Clocked)
    waits = hand_over._Waits(is_timed=True)
    for _ in range(3):
        with waits.timed():
            pass
    with pytest.raises(TransferError), waits.timed():
        raise TransferError
    assert waits.take() == pytest.approx([1e-3, 1e-3, 1e-3])
    with pytest.raises(TransferError), waits.timed():
        raise TransferError
    assert waits.take() == []
    assert hand_over._Waits(is_timed=False).take() is None


def test_late_are_the_layers_that_were_waited_for() -> None:
    outcomes = [SimpleNamespace(attended_s=2e-3)] * 4
    assert hand_over._late([5e-3, 3e-6, 1e-4, 1.2e-4], outcomes) == 0.5
    assert hand_over._late([5e-3, 3e-6], outcomes) == 0.5  # the other ones have not ended yet
    assert hand_over._late([], outcomes) == 0
