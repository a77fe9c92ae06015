"""Every split of a step's pages into hot ones, streamed ones and those attended in RAM, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import Q_HEADS, TOLERANCE, Text, config_of, layout_of, run_step

from tiermem import ConfigError, Step, TierConfig, TierManager, TransferError
from tiermem._core import Tier
from tiermem.attention.cpus import usable_cpus
from tiermem.device.simulated import SimulatedDevice
from tiermem.ram_attention import MOST_ROWS, FixedShare


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_share_is_exact(dtype: str, share: float) -> None:
    layout = layout_of(dtype)
    with TierManager(layout, config_of(layout, gpu=8, ram=60, cpu_share=share)) as manager:
        texts = [Text.new(manager) for _ in range(3)]
        worst = run_step(manager, texts, [333, 90, 1])
        for counts in ([1, 1, 1], [32, 1, 7], [1, 33, 2], [4, 8, 1], [1, 1, 64]):
            worst = max(worst, run_step(manager, texts, counts))
        worst = max(worst, run_step(manager, texts, [3, 1, 1], window=50))
        attended = manager.stats().attended_bytes
        manager.check()
    assert worst < TOLERANCE[dtype]
    assert (attended > 0) == (share > 0)


def test_shares_may_change_at_every_step() -> None:
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=4, ram=40, cpu_share=1.0)) as manager:
        ram = manager._core.ram
        assert ram is not None
        text = Text.new(manager)
        worst = run_step(manager, [text], [400])
        random = np.random.default_rng()
        for share in [0.0, 1.0, *random.uniform(0, 1, 20)]:
            ram.policy = FixedShare(float(share), None)
            worst = max(worst, run_step(manager, [text], [int(random.integers(1, 6))]))
    assert worst < TOLERANCE["float16"]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48])
def test_all_pages_but_the_last_in_ram(tokens: int) -> None:
    """A hot tier of one page: nothing is left there but what is written."""
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=1, ram=20, cpu_share=1.0)) as manager:
        text = Text.new(manager)
        errors = [run_step(manager, [text], [tokens])]
        errors += [run_step(manager, [text], [1]) for _ in range(20)]
        assert max(errors) < TOLERANCE["float16"]
        assert manager.stats().attended_bytes > 0


def test_pages_on_the_ssd_are_streamed_beside(tmp_path: Path) -> None:
    layout = layout_of()
    config = config_of(layout, gpu=4, ram=8, ssd=60, path=tmp_path / "store", cpu_share=0.7)
    with TierManager(layout, config) as manager:
        text = Text.new(manager)
        errors = [run_step(manager, [text], [64]) for _ in range(8)]
        errors += [run_step(manager, [text], [count]) for count in (1, 5, 32, 1)]
        flows = {(flow.src, flow.dst): flow.streamed_bytes for flow in manager.stats().flows}
        assert flows.get(("SSD", "GPU"), 0) > 0
        assert manager.stats().attended_bytes > 0
    assert max(errors) < TOLERANCE["float16"]


def test_beside_a_device_long_chunks_are_streamed() -> None:
    """On any device but the CPU; a simulated one here."""
    layout = layout_of("float32")
    device = SimulatedDevice(3, total_bytes=1 << 28, eagerness=0.5)
    config = replace_device(config_of(layout, gpu=6, ram=60, cpu_share=1.0))
    with TierManager(layout, config, device=device) as manager:
        texts = [Text.new(manager) for _ in range(2)]
        run_step(manager, texts, [300, 40])
        before = manager.stats().attended_bytes
        long = run_step(manager, texts, [MOST_ROWS + 1, MOST_ROWS + 1])
        assert manager.stats().attended_bytes == before
        short = run_step(manager, texts, [1, MOST_ROWS])
        assert manager.stats().attended_bytes > before
        assert max(long, short) < TOLERANCE["float32"]


def replace_device(config: TierConfig) -> TierConfig:
    return TierConfig.from_table({**config.to_table(), "device": "auto"})


def test_beside_a_gpu_it_is_off_while_its_rates_are_not_known() -> None:
    layout = layout_of()
    device = SimulatedDevice(3, total_bytes=1 << 28, eagerness=0.5)
    with TierManager(
        layout, replace_device(config_of(layout, gpu=4, ram=8)), device=device
    ) as manager:
        assert manager._core.ram is None


def test_pages_attended_in_ram_are_not_copied_to_the_device() -> None:
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=4, ram=40)) as manager:
        text = Text.new(manager)
        run_step(manager, [text], [400])
        before = streamed_bytes(manager)
        assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
        assert streamed_bytes(manager) == before
        pages = manager._core.table.counts(Tier.RAM)
        assert pages.slots - pages.free > 20


def streamed_bytes(manager: TierManager) -> int:
    flows = {(flow.src, flow.dst): flow.streamed_bytes for flow in manager.stats().flows}
    return flows.get(("RAM", "GPU"), 0)


# ---- what can go wrong -------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[TierManager]:
    layout = layout_of()
    with TierManager(layout, config_of(layout, gpu=4, ram=40, cpu_share=1.0)) as opened:
        yield opened


def test_a_cpu_that_fails_undoes_the_step_and_no_more(
    manager: TierManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text.new(manager)
    run_step(manager, [text], [300])
    ram = manager._core.ram
    assert ram is not None
    tokens, kept = text.sequence.num_tokens, (text.k, text.v)

    def fails(*_: object, **__: object) -> None:
        raise TransferError("a worker threw")

    with monkeypatch.context() as patch:
        patch.setattr(type(ram), "begin", fails)
        with pytest.raises(TransferError, match="a worker threw"):
            run_step(manager, [text], [1])
    text.k, text.v = kept
    assert text.sequence.num_tokens == tokens
    manager.check()
    assert run_step(manager, [text], [2]) < TOLERANCE["float16"]


def test_more_threads_than_cpus_are_refused_before_anything_is_allocated() -> None:
    layout = layout_of()
    many = usable_cpus() + 1
    with pytest.raises(ConfigError, match=rf"cpu_threads={many}: must be 1 to {many - 1}"):
        TierManager(layout, config_of(layout, gpu=4, ram=8, cpu_threads=many))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("cpu_share", 1.1, "0 to 1"),
        ("cpu_share", -0.1, "0 to 1"),
        ("cpu_share", "half", "0 to 1"),
        ("cpu_threads", 0, "1 to"),
        ("cpu_threads", 1.5, "1 to"),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.*{allowed}"):
        TierConfig(**{key: value})  # type: ignore[arg-type]


def test_one_thread_computes_the_same(manager: TierManager) -> None:
    layout = layout_of()
    outs = []
    for threads in (1, usable_cpus()):
        torch.manual_seed(1)
        with TierManager(layout, config_of(layout, gpu=4, ram=40, cpu_threads=threads)) as other:
            text = Text.new(other)
            run_step(other, [text], [300])
            text.draw(1)
            outs.append(step_outputs(other, text))
    assert torch.equal(*outs)


def step_outputs(manager: TierManager, text: Text) -> torch.Tensor:
    outs = []
    with manager.step([text.sequence]) as step:
        assert isinstance(step, Step)
        for layer in range(manager.layout.num_layers):
            step.append(layer, text.k[layer, -1:], text.v[layer, -1:])
            q = torch.ones(1, Q_HEADS, manager.layout.head_dim, dtype=text.k.dtype)
            outs.append(step.attend(layer, q))
    return torch.stack(outs)


def test_the_last_step_tells_what_it_read_from_where(tmp_path: Path) -> None:
    layout = layout_of()
    config = config_of(layout, gpu=4, ram=8, ssd=60, path=tmp_path / "store", cpu_share=0.5)
    with TierManager(layout, config) as manager:
        assert manager.stats().last_step is None
        text = Text.new(manager)
        for count in (64, 64, 64, 64, 60):  # the next token has its page
            run_step(manager, [text], [count])
        pages = text.sequence.pages[: text.sequence.num_tokens // layout.page_tokens]
        best = manager._core.best_tiers(pages)
        in_ram, cold = (int((best == tier).sum()) for tier in (Tier.RAM, Tier.SSD))
        before = manager.stats()
        run_step(manager, [text], [1])
        step = manager.stats().last_step
        assert step is not None
        attended = manager.stats().attended_bytes - before.attended_bytes
        assert step.new_tokens == 1
        assert step.attended_bytes == attended == round(0.5 * in_ram) * layout.page_bytes
        assert step.streamed_bytes == in_ram * layout.page_bytes - attended
        assert step.cold_bytes == cold * layout.page_bytes > 0
        assert 0 < step.attended_s <= step.elapsed_s
        with pytest.raises(KeyError), manager.step([text.sequence]):
            raise KeyError
        assert manager.stats().last_step == step  # what was undone is no step
