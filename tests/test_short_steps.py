"""Steps of 1 to 32 new tokens a sequence, each followed by a rollback of any number, against float64."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tiermem import PageLayout, Sequence, TierConfig, TierManager

PAGE = 16
LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 32
Q_HEADS = KV_HEADS * GROUP
MOST_NEW = 32
MOST_TOKENS = 260


@dataclass(eq=False)
class Text:
    """One sequence and what was appended to it: K and V of shape (2, layers, tokens, kv_heads, dim)."""

    sequence: Sequence
    kv: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.kv.shape[2])

    def rollback(self, count: int) -> None:
        self.sequence.rollback(count)
        self.kv = self.kv[:, :, : self.num_tokens - count]


def layout_of(dtype: str) -> PageLayout:
    return PageLayout(LAYERS, KV_HEADS, DIM, dtype, PAGE)


def dtype_of(manager: TierManager) -> torch.dtype:
    dtype = getattr(torch, manager.layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def exact(q: torch.Tensor, kv: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention in float64 of q (n, q_heads, dim), the last n tokens of kv (2, tokens, kv_heads, dim)."""
    k, v = kv.double().repeat_interleave(GROUP, dim=2)
    total, new = k.shape[0], q.shape[0]
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * DIM**-0.5
    places, rows = torch.arange(total)[None], torch.arange(total - new, total)[:, None]
    seen = (places <= rows) & (places > rows - (window or total + 1))
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def step(manager: TierManager, texts: list[Text], counts: list[int], window: int | None) -> float:
    """Append `counts` random tokens; the largest error of any output, relative to the largest value."""
    dtype = dtype_of(manager)
    new = [torch.randn(2, LAYERS, count, KV_HEADS, DIM).to(dtype) for count in counts]
    for text, kv in zip(texts, new, strict=True):
        text.kv = torch.cat([text.kv, kv], dim=2)
    error = 0.0
    with manager.step([text.sequence for text in texts], new_tokens=counts) as running:
        for layer in range(LAYERS):
            k, v = torch.cat([kv[:, layer] for kv in new], dim=1)
            running.append(layer, k, v)
            q = torch.randn(sum(counts), Q_HEADS, DIM).to(dtype)
            out = running.attend(layer, q, window=window).split(counts)
            for text, rows, part in zip(texts, q.split(counts), out, strict=True):
                want = exact(rows, text.kv[:, layer], window)
                error = max(error, float((part.double() - want).abs().max() / want.abs().max()))
    return error


def open_manager(dtype: str, gpu: int, ram: int, ssd_path: Path | None) -> TierManager:
    slot = layout_of(dtype).slot_bytes
    config = TierConfig(
        gpu=gpu * slot, ram=ram * slot, ssd="8MiB" if ssd_path else 0, ssd_path=ssd_path,
        device="cpu",
    )  # fmt: skip
    manager = TierManager(layout_of(dtype), config)
    for pool in manager._core.pools.values():
        pool.memory.tensor.fill_(0xFF)  # NaN: what nobody wrote must not be read
    return manager


def new_text(manager: TierManager) -> Text:
    empty = torch.empty(2, LAYERS, 0, KV_HEADS, DIM, dtype=dtype_of(manager))
    return Text(manager.open_sequence(), empty)


def check_bytes(text: Text) -> None:
    """What is stored is what was appended and not rolled back."""
    for layer in range(LAYERS):
        k, v = text.sequence.read(layer, 0, text.num_tokens)
        assert torch.equal(k, text.kv[0, layer])
        assert torch.equal(v, text.kv[1, layer])


@pytest.mark.parametrize(
    ("dtype", "most_error"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("tiers", ["all hot", "two tiers", "three tiers"])
def test_any_batch_of_short_steps_and_rollbacks(
    tiers: str, dtype: str, most_error: float, tmp_path: Path
) -> None:
    gpu, ram, path = {
        "all hot": (90, 0, None), "two tiers": (9, 90, None), "three tiers": (9, 5, tmp_path),
    }[tiers]  # fmt: skip
    seed = random.SystemRandom().getrandbits(31)
    chance = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [*range(1, MOST_NEW + 1), *(chance.randint(1, MOST_NEW) for _ in range(16))]
    chance.shuffle(lengths)
    with open_manager(dtype, gpu, ram, path) as manager:
        texts = [new_text(manager) for _ in range(4)]
        for text, tokens in zip(texts, (150, 64, 1, 33), strict=True):
            assert step(manager, [text], [tokens], None) < most_error
        # more pages than the upper tiers have together: some of them are read from the last one
        assert step(manager, texts, [1, 1, 1, 1], None) < most_error
        while lengths:
            batch = chance.sample(texts, min(chance.randint(1, 4), len(lengths)))
            counts = [lengths.pop() for _ in batch]
            window = chance.choice([None, None, 40])
            assert step(manager, batch, counts, window) < most_error, f"seed {seed}"
            for text, count in zip(batch, counts, strict=True):
                most = text.num_tokens
                gone = chance.choice([0, chance.randint(0, count), chance.randint(0, most)])
                text.rollback(max(gone, most - MOST_TOKENS))
                assert text.sequence.num_tokens == text.num_tokens
            manager.check()
        for text in texts:
            check_bytes(text)
        reads = {tier.tier: tier.reads for tier in manager.stats().tiers if tier.slots}
        assert all(reads.values()), f"seed {seed}: {reads}"


@pytest.mark.parametrize("drafts", [1, 8, 31])
def test_drafts_that_are_rolled_back_between_single_tokens(drafts: int) -> None:
    """All hot: tables at fixed addresses serve the single tokens, and drafts cross pages in between."""
    torch.manual_seed(drafts)
    with open_manager("float32", 40, 0, None) as manager:
        texts = [new_text(manager), new_text(manager)]
        assert step(manager, texts, [PAGE - 3, 3 * PAGE + 5], None) < 1e-5
        for accepted in range(drafts + 1):
            for text in texts:
                assert step(manager, [text], [1 + drafts], None) < 1e-5
                text.rollback(drafts - accepted)
            for _ in range(2):
                assert step(manager, texts, [1, 1], None) < 1e-5
            for text in texts:
                text.rollback(max(0, text.num_tokens - 7 * PAGE))
        manager.check()
        for text in texts:
            check_bytes(text)


def test_a_rollback_takes_names_along(tmp_path: Path) -> None:
    """What is named after a rollback is found under its own tokens; what was rolled back is not what is read."""
    torch.manual_seed(1)
    with open_manager("float32", 6, 6, tmp_path) as manager:
        text = new_text(manager)
        step(manager, [text], [2 * PAGE], None)
        step(manager, [text], [9], None)
        text.rollback(9)
        step(manager, [text], [PAGE + 1], None)
        kept = list(range(3 * PAGE + 1))
        text.sequence.record(kept)
        found = manager.open_sequence([*kept, 9])
        assert found.num_tokens == 3 * PAGE
        for layer in range(LAYERS):
            assert torch.equal(found.read(layer, 0, 3 * PAGE)[0], text.kv[0, layer, : 3 * PAGE])


@pytest.mark.parametrize("known_by", ["nobody", "its name", "a fork", "a copy in RAM"])
def test_a_page_that_a_draft_had_filled_is_written_on_where_nobody_else_has_it(
    known_by: str,
) -> None:
    """The draft fills page 1 and reaches into page 2; 5 tokens of page 1 are kept."""
    torch.manual_seed(3)
    with open_manager("float32", 12, 12, None) as manager:
        text = new_text(manager)
        step(manager, [text], [PAGE + 4], None)
        step(manager, [text], [PAGE], None)
        page = int(text.sequence.pages[1])
        manager._core.in_flight.drain()
        if known_by == "its name":
            text.sequence.record(range(2 * PAGE + 4))
        twin = Text(text.sequence.fork(), text.kv) if known_by == "a fork" else None
        if known_by == "a copy in RAM":
            text.sequence.suspend()
            step(manager, [text], [1], None)
            manager._core.in_flight.drain()
            text.rollback(1)
        text.rollback(PAGE - 1)
        assert step(manager, [text], [3], None) < 1e-5
        assert (int(text.sequence.pages[1]) == page) == (known_by == "nobody")
        check_bytes(text)
        if twin is not None:
            check_bytes(twin)
        if known_by == "its name":
            text.rollback(text.num_tokens)
            assert manager.open_sequence(range(3 * PAGE)).num_tokens == 2 * PAGE
        manager.check()
