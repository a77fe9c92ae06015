"""What one TieredCache has named, the next finds: same tokens, fewer of them computed; never a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    DYNAMIC,
    FAMILIES,
    PAGE_TOKENS,
    left_padded,
    random_ids,
    reference,
    tiers,
    tiny_model,
)
from transformers import PreTrainedModel

from tiermem import TierMemError
from tiermem.integrations.transformers import TieredCache

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def open_cache(model: PreTrainedModel, path: Path, **options: object) -> TieredCache:
    return TieredCache(model, tiers(model, 8, 8, path), page_tokens=PAGE_TOKENS, **options)


def generate(model: PreTrainedModel, cache: TieredCache, ids: torch.Tensor) -> torch.Tensor:
    """What the model says after `ids`, computing what the cache does not hold."""
    tokens: torch.Tensor = model.generate(ids, past_key_values=cache, **GREEDY)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_cache_on_the_same_store_reuses_whole_pages(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 1)
    ids = random_ids(1, 150, 1)
    expected = reference(model, ids, **GREEDY)
    with open_cache(model, tmp_path) as cache:
        assert cache.attach(ids) == 0
        assert torch.equal(generate(model, cache, ids), expected)
        assert cache.stats().published_pages == (150 + 11) // PAGE_TOKENS
    with open_cache(model, tmp_path) as cache:
        assert cache.attach(ids) == 9 * PAGE_TOKENS == cache.get_seq_length()
        assert cache.stats().attached_tokens == 9 * PAGE_TOKENS
        assert torch.equal(generate(model, cache, ids), expected)
        cache.reset()
        longer = torch.cat([expected, random_ids(1, 20, 2)], dim=1)
        assert cache.attach(longer) == 10 * PAGE_TOKENS, "what was generated was named too"
        assert torch.equal(generate(model, cache, longer), reference(model, longer, **GREEDY))


@pytest.mark.parametrize("columns", [16, 17, 160])
def test_one_token_is_left_to_compute(columns: int, tmp_path: Path) -> None:
    model = tiny_model("llama", 2)
    ids = random_ids(1, columns, 2)
    with open_cache(model, tmp_path) as cache:
        expected = generate(model, cache, ids)
        cache.reset()
        attached = cache.attach(ids)
        assert attached == (columns - 1 if columns % PAGE_TOKENS == 0 else 16)
        assert torch.equal(generate(model, cache, ids), expected)
        cache.manager.check()


def test_a_different_token_ends_what_is_reused(tmp_path: Path) -> None:
    model = tiny_model("llama", 3)
    ids = random_ids(1, 100, 3)
    with open_cache(model, tmp_path) as cache:
        generate(model, cache, ids)
        for place, attached in ((0, 0), (15, 0), (16, 16), (79, 64), (80, 80)):
            other = ids.clone()
            other[0, place] = ids[0, place] % 100 + 1
            cache.reset()
            assert cache.attach(other) == attached
            assert torch.equal(generate(model, cache, other), reference(model, other, **GREEDY))


def test_rows_reuse_as_many_columns_as_all_of_them_find(tmp_path: Path) -> None:
    model = tiny_model("qwen3", 4)
    texts = [random_ids(1, n, n)[0] for n in (120, 85, 30)]
    ids, mask = left_padded(texts)
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    with open_cache(model, tmp_path) as cache:
        for text in texts:
            cache.reset()
            generate(model, cache, text[None])
        cache.reset()
        # 112 of 120; 80 of 85 after 35 columns of padding; 16 of 30 after 90
        assert cache.attach(ids, mask) == min(112, 35 + 80, 90 + 16)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
        cache.manager.check()


def test_a_row_that_is_padding_as_far_as_is_reused(tmp_path: Path) -> None:
    model = tiny_model("llama", 5)
    long, short = random_ids(1, 60, 5)[0], random_ids(1, 3, 6)[0]
    ids, mask = left_padded([long, short])
    with open_cache(model, tmp_path) as cache:
        generate(model, cache, long[None])
        cache.reset()
        assert cache.attach(ids, mask) == 48
        assert [row.tokens for row in cache.stats().sequences] == [48, 0]
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, reference(model, ids, attention_mask=mask, **GREEDY))


def test_beams_after_attach(tmp_path: Path) -> None:
    model = tiny_model("llama", 6)
    ids = random_ids(1, 70, 6)
    options = {"do_sample": False, "max_new_tokens": 10, "num_beams": 3}
    with open_cache(model, tmp_path) as cache:
        generate(model, cache, ids)
        cache.reset()
        assert cache.attach(ids) == 64
        with pytest.raises(ValueError, match="batch_repeat_interleave"):
            model.generate(ids, past_key_values=cache, **options)
        cache.batch_repeat_interleave(3)
        out = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, reference(model, ids, **options))
        cache.manager.check()


def test_attach_needs_an_empty_cache_and_sound_ids(tmp_path: Path) -> None:
    model = tiny_model("llama", 7)
    with open_cache(model, tmp_path) as cache:
        for wrong, error in (
            (torch.zeros(0, dtype=torch.int64), ValueError),
            (torch.zeros((1, 2, 3), dtype=torch.int64), ValueError),
            (torch.tensor([[1.0, 2.0]]), TypeError),
            (torch.tensor([[1, -2]]), ValueError),
        ):
            with pytest.raises(error):
                cache.attach(wrong)
        with pytest.raises(ValueError, match="left"):
            cache.attach(torch.tensor([[1, 2]]), torch.tensor([[1, 0]]))
        with pytest.raises(ValueError, match="attention_mask"):
            cache.attach(torch.tensor([[1, 2]]), torch.tensor([[1, 1, 1]]))
        assert cache.stats().sequences == ()
        assert cache.attach([1, 2, 3]) == 0
        generate(model, cache, torch.tensor([[1, 2, 3]]))
        with pytest.raises(TierMemError, match="reset"):
            cache.attach([1, 2, 3])


# ---- never a wrong page ------------------------------------------------------------------------------


def test_other_weights_salts_and_page_sizes_find_nothing(tmp_path: Path) -> None:
    model, other = tiny_model("llama", 8), tiny_model("llama", 9)
    ids = random_ids(1, 64, 8)
    with open_cache(model, tmp_path) as cache:
        generate(model, cache, ids)
    with open_cache(other, tmp_path) as cache:
        assert cache.attach(ids) == 0
    with open_cache(model, tmp_path, salt=b"tenant") as cache:
        assert cache.attach(ids) == 0
    with open_cache(model, tmp_path, model_id="mine") as cache:
        assert cache.attach(ids) == 0
    with open_cache(model, tmp_path) as cache:
        assert cache.attach(ids) == 63


def test_tokens_at_other_positions_get_no_name(tmp_path: Path) -> None:
    model = tiny_model("llama", 10)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (64, 40)])
    with open_cache(model, tmp_path) as cache, torch.no_grad():
        # without position_ids the model counts padding: K of the second row are rotated further
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.stats().published_pages == 4
        cache.reset()
        model(ids[:1], position_ids=torch.arange(100, 164)[None], past_key_values=cache)
        cache.reset()
        assert cache.attach(ids[1:, 24:]) == 0
        assert cache.attach(ids[:1]) == 63


def test_tokens_after_unnamed_ones_get_no_name(tmp_path: Path) -> None:
    model = tiny_model("llama", 11)
    ids = random_ids(1, 96, 11)
    embeds = model.get_input_embeddings()(ids)
    with open_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids[:, :32], past_key_values=cache)
        model(inputs_embeds=embeds[:, 32:48] + 1, past_key_values=cache)
        model(ids[:, 48:], past_key_values=cache)
        assert cache.get_seq_length() == 96
        assert cache.stats().published_pages == 2
        cache.crop(-64)
        model(ids[:, 32:], past_key_values=cache)
        assert cache.stats().published_pages == 6


def test_tokens_of_other_types_get_no_name(tmp_path: Path) -> None:
    model = tiny_model("gpt2", 12)
    ids = random_ids(1, 64, 12)
    with open_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids, token_type_ids=torch.ones_like(ids), past_key_values=cache)
        assert cache.stats().published_pages == 0
        cache.reset()
        model(ids, past_key_values=cache)
        assert cache.stats().published_pages == 4


def test_rotations_that_depend_on_the_length_are_never_reused(tmp_path: Path) -> None:
    model = tiny_model(DYNAMIC, 13)
    ids = random_ids(1, 100, 13)
    expected = reference(model, ids, **GREEDY)
    with open_cache(model, tmp_path) as cache:
        assert torch.equal(generate(model, cache, ids), expected)
        assert cache.stats().published_pages == 0
        cache.reset()
        assert cache.attach(ids) == 0
        assert torch.equal(generate(model, cache, ids), expected)
