"""Pages that are lost and cannot be computed again, or not with the SSD: a clear error, and a cache that lives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damage_cold, small_cache
from tiny_models import DYNAMIC, PAGE_TOKENS, left_padded, random_ids, reference, tiny_model
from transformers import PreTrainedModel

from tiermem import CorruptPageError, OutOfPagesError, TransferError
from tiermem.integrations.transformers import TieredCache
from tiermem.integrations.transformers.recovery import MOST_ATTEMPTS
from tiermem.store import ColdStore

GREEDY = {"do_sample": False, "max_new_tokens": 16}


def refuse(
    model: PreTrainedModel,
    cache: TieredCache,
    reason: str,
    arguments: dict[str, torch.Tensor],
    ids: torch.Tensor,
) -> None:
    """After the damage of a page nothing goes on and nothing is changed; the cache can take another text."""
    columns = cache.get_seq_length()
    for _ in range(2):
        with pytest.raises(CorruptPageError, match=reason) as caught:
            model(**arguments, past_key_values=cache)
        assert caught.value.lost
        assert cache.get_seq_length() == columns
    cache.manager.check()
    assert cache.stats().computed_again_tokens == 0
    cache.reset()
    assert torch.equal(
        model.generate(ids, past_key_values=cache, **GREEDY), reference(model, ids, **GREEDY)
    )


@torch.no_grad()
def test_embeddings_cannot_be_computed_again(tmp_path: Path) -> None:
    model = tiny_model("llama", 16)
    ids = random_ids(1, 200, 16)
    with small_cache(model, tmp_path) as cache:
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
        damage_cold(cache, 1)
        refuse(model, cache, "row 0 has tokens", {"input_ids": ids[:, :1]}, ids)


@torch.no_grad()
def test_positions_that_the_model_chose_among_padding_are_not_guessed(tmp_path: Path) -> None:
    model = tiny_model("llama", 17)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (150, 140)])
    with small_cache(model, tmp_path) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
        damage_cold(cache, 1, row=1)
        more = {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
        refuse(model, cache, "row 1 has tokens", more, ids[:1])


@torch.no_grad()
def test_rotations_that_depend_on_the_length_are_not_computed_again(tmp_path: Path) -> None:
    model = tiny_model(DYNAMIC, 18)
    ids = random_ids(1, 200, 18)
    with small_cache(model, tmp_path) as cache:
        model(ids, past_key_values=cache)
        damage_cold(cache, 1)
        refuse(model, cache, "length of the text", {"input_ids": ids[:, :1]}, ids)


def test_damage_without_end_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 19)
    ids = random_ids(1, 200, 19)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids[:, :199], past_key_values=cache)
        attempts = 0

        def never_good(_store: ColdStore, reading: object) -> np.ndarray:
            nonlocal attempts
            attempts += 1
            return np.zeros(len(reading.slots), dtype=np.bool_)  # type: ignore[attr-defined]

        with monkeypatch.context() as patch:
            patch.setattr(ColdStore, "verify", never_good)
            with pytest.raises(CorruptPageError):
                model(ids[:, 199:], past_key_values=cache)
        assert attempts <= 2 * MOST_ATTEMPTS
        cache.manager.check()
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


# ---- a disk that is gone -------------------------------------------------------------------------------


def break_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SSD answers no read any more."""

    def fail(*_: object) -> None:
        raise TransferError("read of the SSD: Input/output error")

    monkeypatch.setattr(ColdStore, "read", fail)
    monkeypatch.setattr(ColdStore, "read_slices", fail)


def test_a_disk_that_cannot_be_read_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 20)
    ids = random_ids(1, 150, 20)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        model.generate(ids, past_key_values=cache, **GREEDY)
    with small_cache(model, tmp_path, 6, 8) as cache:
        assert cache.attach(ids) == 144
        break_reads(monkeypatch)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens == 144
        cache.manager.check()


def test_a_disk_that_is_needed_is_not_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 21)
    ids = random_ids(1, 200, 21)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids[:, :190], past_key_values=cache)
        with monkeypatch.context() as patch:
            break_reads(patch)
            with pytest.raises(TransferError, match="Input/output error"):
                model(ids[:, 190:], past_key_values=cache)
        assert cache.get_seq_length() == 190
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens == 0


def test_a_read_that_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 22)
    ids = random_ids(1, 200, 22)
    read_slices, calls = ColdStore.read_slices, 0

    def fail_sometimes(store: ColdStore, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls % 10 == 0:
            raise TransferError("read of the SSD: took too long")
        return read_slices(store, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdStore, "read_slices", fail_sometimes)
    with small_cache(model, tmp_path) as cache:
        out = model.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(out, reference(model, ids, **GREEDY))
        assert calls > 30
        assert cache.stats().computed_again_tokens == 0


def test_without_room_to_compute_again_the_call_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 23)
    ids = random_ids(1, 200, 23)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids[:, :190], past_key_values=cache)
        first = damage_cold(cache, 1)

        def full(*_: object, **__: object) -> None:
            raise OutOfPagesError("on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(cache._calls, "compute_again", full)
            with pytest.raises(OutOfPagesError):
                model(ids[:, 190:], past_key_values=cache)
        assert cache.get_seq_length() == first * PAGE_TOKENS
        assert torch.equal(
            model.generate(ids, past_key_values=cache, **GREEDY), reference(model, ids, **GREEDY)
        )
