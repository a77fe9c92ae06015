"""The mass of each page over every split of a step's pages: hot, streamed, attended in RAM, written through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mass_steps import poison, run_step
from texts import PAGE, Q_HEADS, Text, config_of, layout_of

from tiermem import PageLayout, TierConfig, TierManager, TierMemError, TransferError
from tiermem.device.simulated import SimulatedDevice
from tiermem.hand_over import NUM_BUFFERS, HandOver
from tiermem.ram_attention import FixedShare


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_share_of_two_tiers(dtype: str, share: float) -> None:
    layout = layout_of(dtype)
    with TierManager(layout, config_of(layout, gpu=8, ram=60, cpu_share=share)) as manager:
        poison(manager)
        texts = [Text.new(manager) for _ in range(3)]
        run_step(manager, texts, [333, 90, 1])
        for counts in ([1, 1, 1], [32, 1, 7], [1, 33, 2], [1, 1, 64]):
            run_step(manager, texts, counts)
        run_step(manager, texts, [3, 1, 1], window=50)
        assert (manager.stats().attended_bytes > 0) == (share > 0)
        manager.check()


def test_everything_hot_in_tables_that_stay() -> None:
    layout = layout_of("float32")
    with TierManager(layout, config_of(layout, gpu=90, ram=0)) as manager:
        poison(manager)
        texts = [Text.new(manager) for _ in range(2)]
        run_step(manager, texts, [70, 3])
        for _ in range(40):
            run_step(manager, texts, [1, 1])
        run_step(manager, texts, [1, 1], window=20)
        run_step(manager, texts[1:], [1])
        run_step(manager, texts[::-1], [5, 1])


def test_three_tiers(tmp_path: Path) -> None:
    layout = layout_of()
    config = config_of(layout, gpu=4, ram=8, ssd=60, path=tmp_path / "store", cpu_share=0.7)
    with TierManager(layout, config) as manager:
        poison(manager)
        text = Text.new(manager)
        for count in (64, 64, 64, 64, 1, 5, 32, 1):
            run_step(manager, [text], [count])
        flows = {(flow.src, flow.dst): flow.streamed_bytes for flow in manager.stats().flows}
        assert flows.get(("SSD", "GPU"), 0) > 0
        assert manager.stats().attended_bytes > 0


def test_after_forks_and_rollbacks() -> None:
    """Pages that continue others are in the places of those."""
    layout = layout_of("float32")
    with TierManager(layout, config_of(layout, gpu=6, ram=60, cpu_share=0.5)) as manager:
        text = Text.new(manager)
        run_step(manager, [text], [150])
        twin = Text(text.sequence.fork(), text.k, text.v)
        for _ in range(5):
            run_step(manager, [text, twin], [3, 4])
            text.sequence.rollback(2)
            text.k, text.v = text.k[:, :-2], text.v[:, :-2]


def test_a_mixture_with_steps_that_do_not_ask() -> None:
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=6, ram=40)) as manager:
        text = Text.new(manager)
        run_step(manager, [text], [200])
        text.draw(1)
        with manager.step([text.sequence]) as step:
            for layer in range(layout.num_layers):
                step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
                q = torch.randn(1, Q_HEADS, layout.head_dim).half()
                out, mass = step.attend_with_mass(layer, q)
                assert torch.equal(step.attend(layer, q), out)
                again, same = step.attend_with_mass(layer, q, scale=layout.head_dim**-0.5)
                assert torch.equal(again, out) and torch.equal(same, mass)
                _, sharper = step.attend_with_mass(layer, q, scale=2.0)
                assert not torch.equal(sharper, mass)


def test_what_is_wrong_is_refused_as_by_attend() -> None:
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=8, ram=0)) as manager:
        text = Text.new(manager)
        text.draw(1)
        q = torch.randn(1, Q_HEADS, layout.head_dim).half()
        with manager.step([text.sequence]) as step:
            with pytest.raises(TierMemError, match="attend of layer 0"):
                step.attend_with_mass(0, q)
            for layer in range(layout.num_layers):
                step.append(layer, text.k[layer], text.v[layer])
            with pytest.raises(TierMemError, match="attend of layer 0"):
                step.attend_with_mass(0, q)
            with pytest.raises(TypeError, match="q"):
                step.attend_with_mass(1, None)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="float32"):
                step.attend_with_mass(1, q.float())
            with pytest.raises(ValueError, match="q of shape"):
                step.attend_with_mass(1, q[0])
            with pytest.raises(ValueError, match="window=0"):
                step.attend_with_mass(1, q, window=0)


# ---- handed over -------------------------------------------------------------------------------------


LAYERS = 2 * NUM_BUFFERS + 1


@pytest.fixture
def open_manager() -> Iterator[Callable[..., TierManager]]:
    """Makes a manager beside a simulated device, nearly all of whose pages are in RAM."""
    opened: list[TierManager] = []

    def open_one(dtype: str = "float16", share: float = 1.0) -> TierManager:
        layout = PageLayout(LAYERS, 2, 32, dtype, PAGE)
        config = config_of(layout, gpu=5, ram=80, cpu_share=share, io_timeout_s=20.0)
        config = TierConfig.from_table({**config.to_table(), "device": "auto"})
        device = SimulatedDevice(11, total_bytes=1 << 28, eagerness=0.5)
        opened.append(TierManager(layout, config, device=device))
        return opened[-1]

    yield open_one
    for manager in opened:
        manager.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_handed_over(dtype: str, open_manager: Callable[..., TierManager]) -> None:
    manager = open_manager(dtype)
    texts = [Text.new(manager) for _ in range(2)]
    run_step(manager, texts, [300, 150])
    for counts in ([1, 1], [32, 5], [1, 1]):
        run_step(manager, texts, counts)
    run_step(manager, texts, [4, 1], window=100)
    assert manager.stats().attended_bytes > 0
    manager.check()


def test_handed_over_in_any_share(open_manager: Callable[..., TierManager]) -> None:
    manager = open_manager()
    ram, random = manager._core.ram, np.random.default_rng()
    assert isinstance(ram, HandOver)
    text = Text.new(manager)
    run_step(manager, [text], [300])
    for share in [0.0, 1.0, *random.uniform(0, 1, 5)]:
        ram.policy = FixedShare(float(share))
        run_step(manager, [text], [int(random.integers(1, 9))])


def test_memory_for_pages_is_taken_when_asked_for_and_then_kept(
    open_manager: Callable[..., TierManager],
) -> None:
    manager = open_manager()
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    text = Text.new(manager)
    run_step(manager, [text], [200])
    for count in (2, 9):
        text.draw(count)
        with manager.step([text.sequence], [count]) as step:
            for layer in range(LAYERS):
                step.append(layer, text.k[layer, -count:], text.v[layer, -count:])
                step.attend(layer, torch.randn(count, Q_HEADS, 32).half())
        asked = ram._items[2]
        run_step(manager, [text], [1])
        assert asked < ram._items[2] if count == 2 else asked == ram._items[2]
    assert ram._places is None


def test_a_failure_undoes_the_step(
    open_manager: Callable[..., TierManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager()
    ram = manager._core.ram
    assert isinstance(ram, HandOver)
    text = Text.new(manager)
    run_step(manager, [text], [200])
    kept, tokens = (text.k, text.v), text.sequence.num_tokens

    def refuses(*arguments: object, **more: object) -> int:
        raise RuntimeError("attention overruns its deadline")

    with monkeypatch.context() as patch:
        patch.setattr(ram._attention, "submit", refuses)
        with pytest.raises(TransferError, match="the CPU cannot attend"):
            run_step(manager, [text], [2])
    text.k, text.v = kept
    assert text.sequence.num_tokens == tokens
    run_step(manager, [text], [2])
