"""Every split of a step's pages on a GPU, the CPU's share handed over by words of pinned memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from texts import Q_HEADS, TOLERANCE, Text, config_of

from tiermem import PageLayout, TierConfig, TierManager
from tiermem.hand_over import HandOver
from tiermem.ram_attention import FixedShare

pytestmark = pytest.mark.gpu

LAYERS = 9


def run_step(manager: TierManager, texts: list[Text], counts: list[int]) -> float:
    """One step of new random tokens on the GPU; the largest error of its outputs against float64."""
    for text, count in zip(texts, counts, strict=True):
        text.draw(count)
    pairs, outs = list(zip(texts, counts, strict=True)), []
    with manager.step([text.sequence for text in texts], counts) as step:
        for layer in range(LAYERS):
            step.append(
                layer,
                torch.cat([text.k[layer, -count:] for text, count in pairs]).cuda(),
                torch.cat([text.v[layer, -count:] for text, count in pairs]).cuda(),
            )
            q = torch.randn(sum(counts), Q_HEADS, 64).to(texts[0].k.dtype)
            outs.append((layer, q, step.attend(layer, q.cuda())))
    worst = 0.0
    for layer, q, out in outs:
        parts = zip(texts, q.split(counts), strict=True)
        want = torch.cat([text.wanted(layer, part, None) for text, part in parts])
        worst = max(worst, float((out.cpu().double() - want).norm() / want.norm()))
    return worst


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_share_is_exact(dtype: str) -> None:
    layout = PageLayout(LAYERS, 2, 64, dtype, 16)
    config = config_of(layout, gpu=8, ram=80, cpu_share=1.0)
    config = TierConfig.from_table({**config.to_table(), "device": "cuda"})
    with TierManager(layout, config) as manager:
        ram, random = manager._core.ram, np.random.default_rng()
        assert isinstance(ram, HandOver)
        texts = [Text.new(manager) for _ in range(2)]
        errors = [run_step(manager, texts, [400, 150])]
        for share in [1.0, 0.0, *random.uniform(0, 1, 10)]:
            ram.policy = FixedShare(float(share))
            errors.append(run_step(manager, texts, random.integers(1, 33, 2).tolist()))
        assert manager.stats().attended_bytes > 0
        manager.check()
    assert max(errors) < TOLERANCE[dtype]


def test_steps_are_enqueued_without_waiting_for_the_gpu() -> None:
    """Many steps one after another, whose results are looked at late."""
    layout = PageLayout(LAYERS, 2, 64, "float16", 16)
    config = config_of(layout, gpu=4, ram=80, cpu_share=0.6)
    config = TierConfig.from_table({**config.to_table(), "device": "cuda"})
    with TierManager(layout, config) as manager:
        text = Text.new(manager)
        assert run_step(manager, [text], [500]) < TOLERANCE["float16"]
        for _ in range(40):
            assert run_step(manager, [text], [1]) < TOLERANCE["float16"]
