"""Captured decode on a GPU: replays equal float64, while sequences grow and batches change."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tiermem import PageLayout, Sequence, TierConfig, TierManager
from tiermem.device.capture import capture
from tiermem.graphs import CapturedDecode
from tiermem.step import Step

pytestmark = pytest.mark.gpu

LAYOUT = PageLayout(num_layers=3, num_kv_heads=2, head_dim=64, dtype="float16", page_tokens=16)
Q_HEADS = 8
MOST_TOKENS = 2600


@pytest.fixture
def manager() -> Iterator[TierManager]:
    """Room for some thousand tokens in GPU memory and in RAM."""
    config = TierConfig(
        device="cuda", gpu=600 * LAYOUT.slot_bytes, ram=600 * LAYOUT.slot_bytes, ssd=0
    )
    with TierManager(LAYOUT, config) as manager:
        manager._core.hot.data.fill_(float("nan"))  # what nobody wrote must not be read
        yield manager


class Text:
    """K, V and q of one sequence, fresh and random; its sequence in the cache."""

    def __init__(self, manager: TierManager, seed: int) -> None:
        random = torch.Generator(manager.torch_device).manual_seed(seed)
        shape = (LAYOUT.num_layers, MOST_TOKENS, LAYOUT.num_kv_heads, LAYOUT.head_dim)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, device=manager.torch_device).half()

        self.k, self.v = draw(*shape), draw(*shape)
        self.q = draw(MOST_TOKENS, Q_HEADS, LAYOUT.head_dim)
        self.sequence: Sequence = manager.open_sequence()

    def error(self, out: torch.Tensor, position: int) -> float:
        """Of (layers, q_heads, head_dim), relative to float64 over the first `position` + 1 tokens."""
        group = Q_HEADS // LAYOUT.num_kv_heads
        k = self.k[:, : position + 1].double().repeat_interleave(group, 2)
        v = self.v[:, : position + 1].double().repeat_interleave(group, 2)
        scores = torch.einsum("hd,lnhd->lhn", self.q[position].double(), k) * LAYOUT.head_dim**-0.5
        want = torch.einsum("lhn,lnhd->lhd", torch.softmax(scores, -1), v)
        return float((out.double() - want).norm() / want.norm())


def prefill(manager: TierManager, text: Text, tokens: int) -> None:
    with manager.step([text.sequence], tokens) as step:
        for layer in range(LAYOUT.num_layers):
            step.append(layer, text.k[layer, :tokens], text.v[layer, :tokens])


def body(step: Step, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    outs = []
    for layer in range(LAYOUT.num_layers):
        step.append(layer, k[layer], v[layer])
        outs.append(step.attend(layer, q))
    return torch.stack(outs)


def decode(decoding: CapturedDecode[torch.Tensor], texts: list[Text]) -> None:
    """One token each, compared with float64."""
    at = [text.sequence.num_tokens for text in texts]
    k = torch.stack([text.k[:, position] for text, position in zip(texts, at, strict=True)], 1)
    v = torch.stack([text.v[:, position] for text, position in zip(texts, at, strict=True)], 1)
    q = torch.stack([text.q[position] for text, position in zip(texts, at, strict=True)])
    out = decoding.run([text.sequence for text in texts], k, v, q)
    for i, text in enumerate(texts):
        assert text.error(out[:, i], at[i]) < 2e-3


def test_one_graph_serves_sequences_that_grow(manager: TierManager) -> None:
    texts = [Text(manager, seed) for seed in range(3)]
    for text, tokens in zip(texts, (700, 1, 33), strict=True):
        prefill(manager, text, tokens)
    decoding = CapturedDecode(manager, body)
    for _ in range(80):
        decode(decoding, texts)
    assert decoding.num_graphs == 1
    for text in texts:
        k, v = text.sequence.read(1, 0, text.sequence.num_tokens)
        assert torch.equal(k, text.k[1, : text.sequence.num_tokens])
        assert torch.equal(v, text.v[1, : text.sequence.num_tokens])


def test_graphs_of_several_batch_sizes_live_side_by_side(manager: TierManager) -> None:
    texts = [Text(manager, seed) for seed in range(4)]
    for i, text in enumerate(texts):
        prefill(manager, text, 50 + 211 * i)
    decoding = CapturedDecode(manager, body)
    for round_ in range(6):
        for count in (1, 4, 2, 3):
            for _ in range(3):
                decode(decoding, texts[:count] if round_ % 2 else texts[-count:])
    assert decoding.num_graphs == 4


def test_a_batch_that_changes_or_moves_is_replayed_over_its_own_pages(manager: TierManager) -> None:
    texts = [Text(manager, seed) for seed in range(3)]
    for text in texts:
        prefill(manager, text, 200)
    decoding = CapturedDecode(manager, body)
    for i in range(24):
        if i % 6 == 2:
            texts[0].sequence.suspend()
        if i % 6 == 4:
            texts[1].sequence.rollback(20)
        for _ in range(4):
            decode(decoding, [texts[i % 3], texts[(i + 1) % 3]])
    assert decoding.num_graphs == 1


def test_outgrown_tables_are_captured_again(manager: TierManager) -> None:
    text = Text(manager, 0)
    prefill(manager, text, 64 * LAYOUT.page_tokens - 3)
    decoding = CapturedDecode(manager, body)
    widths = set()
    for _ in range(8):
        decode(decoding, [text])
        widths.add(manager._resident._tables[1].max_pages)
    assert widths == {64, 128}
    assert decoding.num_graphs == 2


def test_a_body_that_cannot_be_captured_runs_as_it_is(
    manager: TierManager, caplog: pytest.LogCaptureFixture
) -> None:
    def reads_back(step: Step, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        assert float(q.sum()) == float(q.sum())
        return body(step, k, v, q)

    text = Text(manager, 0)
    prefill(manager, text, 100)
    decoding = CapturedDecode(manager, reads_back)
    with caplog.at_level(logging.WARNING, logger="tiermem"):
        for _ in range(5):
            decode(decoding, [text])
    assert decoding.num_graphs == 0
    assert sum("not captured" in record.message for record in caplog.records) == 1


def test_a_failed_capture_leaves_torch_as_it_was(manager: TierManager) -> None:
    before = torch.cuda.Stream()
    with torch.cuda.stream(before):
        with pytest.raises(RuntimeError), capture(torch.cuda.CUDAGraph()):
            torch.ones(3, device="cuda").sum().item()
        assert torch.cuda.current_stream() == before
        assert torch.randn(1000, device="cuda").std() > 0.5
        freed = torch.cuda.memory_allocated()
        del_me = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        del_me.record_stream(torch.cuda.default_stream())
        del del_me
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # lets the allocator look at its events
        assert torch.cuda.memory_allocated() <= freed + 512
        text = Text(manager, 0)
        prefill(manager, text, 100)
        decoding = CapturedDecode(manager, body)
        for _ in range(3):
            decode(decoding, [text])
        assert decoding.num_graphs == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_steps_larger_than_the_hot_tier_are_replayed_in_pieces(share: float) -> None:
    config = TierConfig(
        device="cuda",
        gpu=24 * LAYOUT.slot_bytes,
        ram=600 * LAYOUT.slot_bytes,
        ssd=0,
        cpu_share=share,
    )
    with TierManager(LAYOUT, config) as manager:
        manager._core.hot.data.fill_(float("nan"))
        texts = [Text(manager, seed) for seed in range(2)]
        for text, tokens in zip(texts, (700, 333), strict=True):
            prefill(manager, text, tokens)
        decoding = CapturedDecode(manager, body)
        for i in range(40):
            decode(decoding, texts if i % 3 else texts[:1])
        assert (decoding.num_graphs, decoding.num_pieces) == (0, 2)
        for text in texts:
            k, v = text.sequence.read(2, 0, text.sequence.num_tokens)
            assert torch.equal(k, text.k[2, : text.sequence.num_tokens])
            assert torch.equal(v, text.v[2, : text.sequence.num_tokens])


def test_sequences_that_outgrow_the_hot_tier_go_on_in_pieces() -> None:
    config = TierConfig(
        device="cuda", gpu=40 * LAYOUT.slot_bytes, ram=600 * LAYOUT.slot_bytes, ssd=0
    )
    with TierManager(LAYOUT, config) as manager:
        manager._core.hot.data.fill_(float("nan"))
        text = Text(manager, 5)
        prefill(manager, text, 500)
        decoding = CapturedDecode(manager, body)
        for _ in range(200):
            decode(decoding, [text])
        assert decoding.num_graphs > 0
        assert decoding.num_pieces == 1


def test_what_cannot_be_captured_in_pieces_runs_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def with_mass(step: Step, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        outs = []
        for layer in range(LAYOUT.num_layers):
            step.append(layer, k[layer], v[layer])
            outs.append(step.attend_with_mass(layer, q)[0])
        return torch.stack(outs)

    config = TierConfig(
        device="cuda", gpu=24 * LAYOUT.slot_bytes, ram=600 * LAYOUT.slot_bytes, ssd=0
    )
    with TierManager(LAYOUT, config) as manager:
        text = Text(manager, 1)
        prefill(manager, text, 700)
        decoding = CapturedDecode(manager, with_mass)
        with caplog.at_level(logging.WARNING, logger="tiermem"):
            for _ in range(5):
                decode(decoding, [text])
        assert decoding.num_pieces == 0
        assert sum("not captured in pieces" in record.message for record in caplog.records) == 1
        before = torch.cuda.current_stream()
        assert torch.randn(1000, device="cuda").std() > 0.5
        assert torch.cuda.current_stream() == before


def test_graphs_can_be_switched_off() -> None:
    config = TierConfig(
        device="cuda", gpu=40 * LAYOUT.slot_bytes, ram=0, ssd=0, decode_graphs="off"
    )
    with TierManager(LAYOUT, config) as manager:
        text = Text(manager, 0)
        prefill(manager, text, 100)
        decoding = CapturedDecode(manager, body)
        for _ in range(4):
            decode(decoding, [text])
        assert decoding.num_graphs == 0


def test_forgotten_graphs_are_captured_again(manager: TierManager) -> None:
    text = Text(manager, 0)
    prefill(manager, text, 100)
    decoding = CapturedDecode(manager, body)
    for _ in range(3):
        decode(decoding, [text])
    decoding.forget_graphs()
    assert decoding.num_graphs == 0
    decode(decoding, [text])
    assert decoding.num_graphs == 1
