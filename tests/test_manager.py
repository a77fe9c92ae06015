"""TierManager, sequences and steps on the CPU device: what they promise and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from world import LAYOUT, attention, kv_of, store_bytes

from tiermem import (
    ClosedError,
    ConfigError,
    OutOfPagesError,
    PageLayout,
    Sequence,
    TierConfig,
    TierManager,
    TierMemError,
)
from tiermem._core import CopyState, Tier

PAGE = LAYOUT.page_tokens


def config(gpu: int = 8, ram: int = 8, ssd: int = 0, path: Path | None = None) -> TierConfig:
    return TierConfig(
        gpu=gpu * LAYOUT.slot_bytes,
        ram=ram * LAYOUT.slot_bytes,
        ssd=store_bytes(ssd) if ssd else 0,
        ssd_path=path,
        device="cpu",
    )


@pytest.fixture
def manager() -> Iterator[TierManager]:
    with TierManager(LAYOUT, config()) as opened:
        yield opened


def grow(manager: TierManager, sequence: Sequence, tokens: list[int], salt: bytes = b"") -> None:
    """Append `tokens` and record them; check the last layer's output against the definition."""
    start = sequence.num_tokens
    array = np.array(tokens)
    before = np.array(sequence.token_ids)
    with manager.step([sequence], new_tokens=len(tokens)) as step:
        for layer in range(LAYOUT.num_layers):
            kv = kv_of(salt, array, start, layer)
            step.append(layer, kv[0], kv[1])
            q = torch.randn(len(tokens), 3, LAYOUT.head_dim)
            out = step.attend(layer, q)
            every = kv_of(salt, np.concatenate([before, array]).astype(np.int64), 0, layer)
            want = attention(q.numpy(), every.numpy(), start, None)
            np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5)
    sequence.record(tokens)


# ---- sequences ---------------------------------------------------------------------------------------


def test_an_empty_sequence_opens_and_closes(manager: TierManager) -> None:
    sequence = manager.open_sequence(tokens=[])
    assert sequence.num_tokens == 0
    sequence.close()
    sequence.close()
    assert sequence.is_closed


def test_recorded_pages_are_attached_whole(manager: TierManager) -> None:
    tokens = list(range(3 * PAGE + 5))
    grow(manager, manager.open_sequence(), tokens)
    assert manager.open_sequence(tokens).num_tokens == 3 * PAGE
    assert manager.open_sequence(tokens[: 2 * PAGE]).num_tokens == 2 * PAGE
    assert manager.open_sequence(tokens[: 2 * PAGE - 1]).num_tokens == PAGE
    assert manager.open_sequence(tokens, at_most=2 * PAGE - 1).num_tokens == PAGE
    assert manager.open_sequence([9, *tokens]).num_tokens == 0


def test_another_salt_or_model_never_matches(tmp_path: Path) -> None:
    tokens = list(range(2 * PAGE))
    path = tmp_path / "store"
    with TierManager(LAYOUT, config(ssd=20, path=path), model_id="a") as manager:
        grow(manager, manager.open_sequence(salt=b"x"), tokens, salt=b"x")
        assert manager.open_sequence(tokens).num_tokens == 0
        assert manager.open_sequence(tokens, salt=b"y").num_tokens == 0
        assert manager.open_sequence(tokens, salt=b"x").num_tokens == 2 * PAGE
    with TierManager(LAYOUT, config(ssd=20, path=path), model_id="b") as manager:
        assert manager.open_sequence(tokens, salt=b"x").num_tokens == 0
    with TierManager(LAYOUT, config(ssd=20, path=path), model_id="a", shard=(1, 2)) as manager:
        assert manager.open_sequence(tokens, salt=b"x").num_tokens == 0
    with TierManager(LAYOUT, config(ssd=20, path=path), model_id="a") as manager:
        sequence = manager.open_sequence(tokens, salt=b"x")
        assert sequence.num_tokens == 2 * PAGE
        for layer in range(LAYOUT.num_layers):
            k, v = sequence.read(layer, 0, 2 * PAGE)
            want = kv_of(b"x", np.array(tokens), 0, layer)
            assert torch.equal(k, want[0])
            assert torch.equal(v, want[1])


def test_rollback_of_a_fully_matched_prompt_leaves_room_for_its_last_token(
    manager: TierManager,
) -> None:
    tokens = list(range(2 * PAGE))
    grow(manager, manager.open_sequence(), tokens)
    sequence = manager.open_sequence(tokens)
    assert sequence.num_tokens == 2 * PAGE
    sequence.rollback(1)
    grow(manager, sequence, [77])
    assert sequence.token_ids == (*tokens[:-1], 77)
    again = manager.open_sequence(tokens)
    want = kv_of(b"", np.array(tokens), 0, 0)
    assert torch.equal(again.read(0, 0, 2 * PAGE)[0], want[0]), "a published page was overwritten"


def test_a_fork_shares_pages_and_diverges(manager: TierManager) -> None:
    tokens = list(range(PAGE + 3))
    one = manager.open_sequence()
    grow(manager, one, tokens)
    two = one.fork()
    used = manager.stats().tiers[0].used
    assert used == 2
    grow(manager, one, [50, 51])
    grow(manager, two, [60])
    for sequence in (one, two):
        ids = np.array(sequence.token_ids)
        k, _ = sequence.read(1, 0, sequence.num_tokens)
        assert torch.equal(k, kv_of(b"", ids, 0, 1)[0])


def test_suspend_leaves_the_gpu_and_the_next_step_brings_back(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, list(range(4 * PAGE + 1)))
    sequence.suspend()
    assert not (manager._core.table.states(sequence.pages, Tier.GPU) == CopyState.VALID).any()
    grow(manager, sequence, [5])
    assert (manager._core.table.states(sequence.pages, Tier.GPU) == CopyState.VALID).all()


def test_suspend_without_a_lower_tier_refuses_and_loses_nothing() -> None:
    with TierManager(LAYOUT, config(ram=0)) as manager:
        sequence = manager.open_sequence()
        grow(manager, sequence, list(range(2 * PAGE)))
        with pytest.raises(OutOfPagesError, match="GPU 8 slots"):
            sequence.suspend()
        grow(manager, sequence, [1])


def test_prefetch_starts_what_fits_and_never_waits(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, list(range(4 * PAGE)))
    sequence.suspend()
    assert sequence.prefetch() == 4
    manager.poll()
    assert (manager._core.table.states(sequence.pages, Tier.GPU) == CopyState.VALID).all()
    assert sequence.prefetch() == 0


# ---- larger than the hot tier ------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "ram", "ssd"), [(2, 40, 0), (2, 0, 40), (1, 3, 40), (3, 10, 30)])
def test_a_sequence_a_batch_and_a_step_beyond_the_hot_tier_are_exact(
    gpu: int, ram: int, ssd: int, tmp_path: Path
) -> None:
    path = tmp_path / "store" if ssd else None
    with TierManager(LAYOUT, config(gpu, ram, ssd, path)) as manager:
        one = manager.open_sequence()
        grow(manager, one, list(range(9 * PAGE + 4)))
        for token in range(2 * PAGE):
            grow(manager, one, [token])
        two = manager.open_sequence()
        grow(manager, two, list(range(100, 100 + 5 * PAGE)))
        batch = [one, two, manager.open_sequence(), manager.open_sequence()]
        with manager.step(batch, new_tokens=[1, 3, PAGE + 1, 2]) as step:
            rows = [
                kv_of(b"", np.arange(n), s.num_tokens, 0)
                for s, n in zip(batch, [1, 3, PAGE + 1, 2], strict=True)
            ]
            kv = torch.cat(rows, dim=1)
            q = torch.randn(kv.shape[1], 2, LAYOUT.head_dim)
            step.append(0, kv[0], kv[1])
            out = step.attend(0, q)
            step.append(1, kv[0], kv[1])
        past = np.array(two.token_ids)
        every = kv_of(b"", past, 0, 0), rows[1]
        want = attention(q[1:4].numpy(), torch.cat(every, dim=1).numpy(), len(past), None)
        np.testing.assert_allclose(out[1:4].numpy(), want, rtol=1e-4, atol=1e-5)
        manager.check()


def test_a_store_opened_again_gives_up_leaves_before_what_they_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain that grew over minutes: its first pages are the oldest ones, and all others need them."""
    now_ns = 10**18
    monkeypatch.setattr("tiermem.store_index.time.time_ns", lambda: now_ns)
    settings = config(8, 0, 4, tmp_path / "s")
    chain = list(range(3 * PAGE))
    for pages in (1, 2, 3):
        with TierManager(LAYOUT, settings) as manager:
            sequence = manager.open_sequence()
            grow(manager, sequence, chain[: pages * PAGE])
        now_ns += 60 * 10**9
    with TierManager(LAYOUT, settings) as manager:
        grow(manager, manager.open_sequence(), list(range(900, 900 + 2 * PAGE)))
        manager.flush()  # one page has to go
    with TierManager(LAYOUT, settings) as manager:
        assert manager.stats().published_pages == 4
        assert manager.open_sequence(chain).num_tokens == 2 * PAGE


def test_a_step_in_a_store_opened_again_evicts_leaves_before_what_they_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = 10**18
    monkeypatch.setattr("tiermem.store_index.time.time_ns", lambda: now_ns)
    settings = config(2, 0, 4, tmp_path / "s")
    chain = list(range(3 * PAGE))
    for pages in (1, 2, 3):
        with TierManager(LAYOUT, settings) as manager:
            grow(manager, manager.open_sequence(), chain[: pages * PAGE])
        now_ns += 60 * 10**9
    with TierManager(LAYOUT, settings) as manager:
        grow(manager, manager.open_sequence(), list(range(900, 900 + 5 * PAGE)))
        assert manager.stats().tiers[Tier.SSD].evictions > 0
        assert manager.open_sequence(chain).num_tokens > 0


def test_a_flush_keeps_the_beginning_of_what_grows(tmp_path: Path) -> None:
    """What has no room is a sequence's end, though that was named last."""
    settings = config(2, 8, 3, tmp_path / "s")
    tokens = list(range(5 * PAGE))
    with TierManager(LAYOUT, settings) as manager:
        sequence = manager.open_sequence()
        for start in range(0, len(tokens), PAGE):
            grow(manager, sequence, tokens[start : start + PAGE])
        manager.flush()
        kept = manager._core.table.states(sequence.pages, Tier.SSD) == CopyState.VALID
        assert kept.tolist() == [True] * 3 + [False] * 2
    with TierManager(LAYOUT, settings) as manager:
        assert manager.open_sequence(tokens).num_tokens == 3 * PAGE


def test_no_room_in_any_tier_is_said_with_counts_and_loses_nothing() -> None:
    with TierManager(LAYOUT, config(gpu=2, ram=3)) as manager:
        sequence = manager.open_sequence()
        tokens = list(range(4 * PAGE))
        grow(manager, sequence, tokens)
        with (
            pytest.raises(OutOfPagesError, match=r"2 pages .* RAM 3 slots: "),
            manager.step([sequence], new_tokens=2 * PAGE + 1),
        ):
            pass
        assert sequence.num_tokens == 4 * PAGE
        grow(manager, sequence, [1])


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1])
def test_new_tokens_below_one(manager: TierManager, count: int) -> None:
    with pytest.raises(ValueError, match=f"new_tokens={count}: must be at least 1"):
        manager.step([manager.open_sequence()], new_tokens=count)


def test_wrong_batches(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    with pytest.raises(ValueError, match="must be 1 to max_sequences"):
        manager.step([])
    with pytest.raises(ValueError, match="given twice"):
        manager.step([sequence, sequence])
    with pytest.raises(ValueError, match="2 numbers for 1 sequences"):
        manager.step([sequence], new_tokens=[1, 2])
    with pytest.raises(TypeError, match=r"new_tokens=1\.5"):
        manager.step([sequence], new_tokens=[1.5])  # type: ignore[list-item]
    with TierManager(LAYOUT, config()) as other, pytest.raises(ValueError, match="another manager"):
        other.step([sequence])


def test_a_step_on_a_closed_sequence_or_manager(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    sequence.close()
    for use in (
        lambda: manager.step([sequence]),
        lambda: sequence.record([1]),
        lambda: sequence.rollback(0),
        sequence.fork,
        sequence.suspend,
        lambda: sequence.read(0, 0, 0),
    ):
        with pytest.raises(ClosedError):
            use()
    manager.close()
    manager.close()
    with pytest.raises(ClosedError):
        manager.open_sequence()
    with pytest.raises(ClosedError):
        manager.poll()


def test_a_second_step_before_the_first_has_ended(manager: TierManager) -> None:
    one, two = manager.open_sequence(), manager.open_sequence()
    early = manager.step([two])
    kv = torch.zeros(1, 1, LAYOUT.head_dim)
    with manager.step([one]) as step:
        with pytest.raises(TierMemError, match="still running"):
            manager.step([two])
        with pytest.raises(TierMemError, match="still running"):
            early.__enter__()
        with pytest.raises(TierMemError, match="still running"):
            one.close()
        with pytest.raises(TierMemError, match="still running"):
            manager.close()
        for layer in range(LAYOUT.num_layers):
            step.append(layer, kv, kv)
    assert one.num_tokens == 1
    with pytest.raises(ClosedError):
        step.append(0, kv, kv)


def test_layers_out_of_order_or_missing_undo_the_step(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    kv = torch.zeros(2, 1, LAYOUT.head_dim)
    with (
        pytest.raises(TierMemError, match=r"append of layer 1: .* due is layer 0"),
        manager.step([sequence], new_tokens=2) as step,
    ):
        step.append(1, kv, kv)
    with (
        pytest.raises(TierMemError, match="attend of layer 0"),
        manager.step([sequence], new_tokens=2) as step,
    ):
        step.attend(0, kv)
    with (
        pytest.raises(TierMemError, match="1 of 2 layers"),
        manager.step([sequence], new_tokens=2) as step,
    ):
        step.append(0, kv, kv)
    assert sequence.num_tokens == 0
    assert manager.stats().tiers[0].used == 0
    grow(manager, sequence, [1, 2])


@pytest.mark.parametrize(
    ("k", "error", "text"),
    [
        (torch.zeros(3, 1, 16), ValueError, r"k of shape \(3, 1, 16\): must be \(2, 1, 16\)"),
        (torch.zeros(2, 2, 16), ValueError, r"must be \(2, 1, 16\)"),
        (torch.zeros(2, 1, 32), ValueError, r"must be \(2, 1, 16\)"),
        (torch.zeros(2, 16), ValueError, r"must be \(2, 1, 16\)"),
        (torch.zeros(2, 1, 16).half(), TypeError, "torch.float16: must be torch.float32"),
        (torch.zeros(2, 1, 16, device="meta"), ValueError, "device=meta: must be cpu"),
        (np.zeros((2, 1, 16)), TypeError, "must be a torch.Tensor"),
    ],
)
def test_a_wrong_append_undoes_the_step(
    manager: TierManager, k: torch.Tensor, error: type[Exception], text: str
) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, [4, 5, 6])
    with pytest.raises(error, match=text), manager.step([sequence], new_tokens=2) as step:
        step.append(0, k, torch.zeros(2, 1, 16))
    assert sequence.num_tokens == 3
    grow(manager, sequence, [7])


def test_wrong_token_ids(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, [1])
    with pytest.raises(ValueError, match="1 ids given, 0 appended"):
        sequence.record([1])
    for wrong in (-1, 2**32):
        with pytest.raises(ValueError, match=f"{wrong} is out of range"):
            manager.open_sequence([wrong])
    with pytest.raises(TypeError, match="must be integers"):
        manager.open_sequence([0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one-dimensional"):
        manager.open_sequence(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(TypeError, match="salt"):
        manager.open_sequence(salt="text")  # type: ignore[arg-type]


def test_wrong_ranges(manager: TierManager) -> None:
    sequence = manager.open_sequence()
    grow(manager, sequence, [1, 2])
    with pytest.raises(ValueError, match="num_tokens=3: must be 0 to 2"):
        sequence.rollback(3)
    with pytest.raises(ValueError, match="layer=2: must be 0 to 1"):
        sequence.read(2, 0, 1)
    with pytest.raises(ValueError, match=r"must be 0 <= start <= end <= 2"):
        sequence.read(0, 1, 3)


def test_impossible_pools() -> None:
    with pytest.raises(ConfigError, match=r"gpu=1KiB: .* must be at least 4KiB"):
        TierManager(LAYOUT, TierConfig(gpu="1KiB", ram=0, device="cpu"))
    with pytest.raises(ConfigError, match=r"ram=.* bytes of memory are free"):
        TierManager(LAYOUT, TierConfig(gpu="1MiB", ram="900TiB", device="cpu"))
    with pytest.raises(ConfigError, match=r"gpu=.*free"):
        TierManager(LAYOUT, TierConfig(gpu="900TiB", ram=0, device="cpu"))
    with pytest.raises(ConfigError, match="gpu_limit"):
        TierManager(LAYOUT, TierConfig(gpu="1MiB", ram=0, gpu_limit="1MiB", device="cpu"))
    with pytest.raises(ConfigError, match=r"ssd=.*free"):
        TierManager(
            LAYOUT, TierConfig(gpu="1MiB", ram=0, ssd="900TiB", ssd_path="/tmp", device="cpu")
        )
    with pytest.raises(ConfigError, match="no SSD tier"), TierManager(LAYOUT, config()) as manager:
        manager.flush()


# ---- stats -------------------------------------------------------------------------------------------


def test_stats_add_up(tmp_path: Path) -> None:
    with TierManager(LAYOUT, config(2, 3, 40, tmp_path / "s"), model_id="m") as manager:
        sequence = manager.open_sequence(label="long")
        grow(manager, sequence, list(range(10 * PAGE + 1)))
        grow(manager, sequence, [1])
        stats = manager.stats()
        for tier in stats.tiers:
            parts = (tier.free, tier.filling, tier.clean, tier.duplicate)
            assert sum(parts) + tier.dirty + tier.pinned + tier.open == tier.slots
        assert sum(tier.used for tier in stats.tiers) >= 11
        assert stats.sequences[0].tokens == 10 * PAGE + 2
        assert abs(sum(stats.hit_rates.values()) - 1) < 1e-9
        assert stats.steps == 2
        assert stats.rss_bytes > 0
        assert stats.ssd_disk_bytes > 0
        text = stats.to_json()
        assert text["model_id"] == "m"
        assert text["hit_rates"] == stats.hit_rates


def test_pages_of_every_dtype_and_shape_come_back_as_stored(tmp_path: Path) -> None:
    for i, (dtype, dim, heads, tokens) in enumerate(
        [("float16", 80, 3, 16), ("bfloat16", 16, 1, 128), ("float32", 256, 2, 32)]
    ):
        layout = PageLayout(3, heads, dim, dtype, tokens)
        slot = layout.slot_bytes
        settings = TierConfig(
            gpu=2 * slot, ram=slot, ssd="64MiB", ssd_path=tmp_path / str(i), device="cpu"
        )
        with TierManager(layout, settings) as manager:
            sequence = manager.open_sequence()
            kv = torch.randn(3, 2, 5 * tokens + 3, heads, dim).to(getattr(torch, dtype))
            with manager.step([sequence], new_tokens=kv.shape[2]) as step:
                for layer in range(3):
                    step.append(layer, kv[layer, 0], kv[layer, 1])
            for layer in range(3):
                k, v = sequence.read(layer, 1, kv.shape[2])
                assert torch.equal(k, kv[layer, 0, 1:])
                assert torch.equal(v, kv[layer, 1, 1:])
