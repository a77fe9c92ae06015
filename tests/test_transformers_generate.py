"""Hugging Face models say the same with a TieredCache as with transformers' own cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    FAMILIES,
    PAGE_TOKENS,
    WINDOW,
    left_padded,
    random_ids,
    reference,
    tiers,
    tiny_model,
)
from transformers import DynamicCache, PreTrainedModel

from tiermem.integrations.transformers import TieredCache

GREEDY = {"do_sample": False, "max_new_tokens": 24}


def small_cache(model: PreTrainedModel, path: Path, gpu_pages: int = 4) -> TieredCache:
    """Four hot pages, six warm ones, the rest on disk."""
    return TieredCache(model, tiers(model, gpu_pages, 6, path), page_tokens=PAGE_TOKENS)


@pytest.mark.parametrize(
    ("seed", "columns"), [(0, 1), (1, 15), (2, 16), (3, 17), (4, 301), (5, 448)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_the_untiered_cache(
    family: str, seed: int, columns: int, tmp_path: Path
) -> None:
    model = tiny_model(family, seed)
    ids = random_ids(1, columns, seed)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.get_seq_length() == columns + 23
        cache.manager.check()
        if columns > 300:
            tier_reads = {tier.tier: tier.reads for tier in cache.stats().tiers}
            assert all(tier_reads.values()), tier_reads


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_untiered_cache(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 7)
    ids = random_ids(2, 200, 7)
    plain = DynamicCache(config=model.config)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        for start, end in ((0, 150), (150, 151), (151, 200)):
            part = ids[:, start:end]
            expected = model(part, past_key_values=plain).logits
            logits = model(part, past_key_values=cache).logits
            assert (logits - expected).abs().max() < 2e-4 * expected.abs().max()


def test_what_comes_next_depends_on_far_away_tokens() -> None:
    model = tiny_model("llama", 4)
    ids = random_ids(1, 301, 4)
    other = ids.clone()
    other[0, 3] = ids[0, 3] % 100 + 1
    assert not torch.equal(
        reference(model, ids, **GREEDY)[:, 301:], reference(model, other, **GREEDY)[:, 301:]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_are_equal_under_the_same_seed(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 11)
    ids = random_ids(1, 133, 11)
    options = {"do_sample": True, "max_new_tokens": 30, "temperature": 0.8, "top_k": 50}
    torch.manual_seed(5)
    expected = reference(model, ids, **options)
    with small_cache(model, tmp_path) as cache:
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("lengths", [(37, 150, 1, 96), (16, 16), (200, 31)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_with_padding_on_the_left(
    family: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(family, 2)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in lengths])
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
        stored = [sequence.tokens for sequence in cache.stats().sequences]
        assert sorted(stored) == sorted(n + 23 for n in lengths), "padding is not stored"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_on_the_same_cache(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 3)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (90, 61)])
    plain = DynamicCache(config=model.config)
    with small_cache(model, tmp_path) as cache:
        for turn in range(2):
            expected = model.generate(ids, attention_mask=mask, past_key_values=plain, **GREEDY)
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
            assert torch.equal(out, expected)
            ids = torch.cat([out, random_ids(2, 19, turn)], dim=1)
            mask = torch.ones_like(ids)
            mask[1, :29] = 0


@pytest.mark.parametrize("chunk", [16, 50, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_in_chunks(family: str, chunk: int, tmp_path: Path) -> None:
    model = tiny_model(family, 4)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (230, 41)])
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY
        )
        assert torch.equal(out, expected)


def test_windows_are_kept_far_beyond_them(tmp_path: Path) -> None:
    model = tiny_model("mistral", 6)
    ids = random_ids(1, 4 * WINDOW + 5, 6)
    far, near = ids.clone(), ids.clone()
    far[0, 3] = ids[0, 3] % 100 + 1
    near[0, -WINDOW // 2] = ids[0, -WINDOW // 2] % 100 + 1
    outs = []
    for text in (ids, far, near):
        with small_cache(model, tmp_path / str(len(outs))) as cache:
            outs.append(model.generate(text, past_key_values=cache, **GREEDY)[:, ids.shape[1] :])
    # two layers see 2 * (WINDOW - 1) tokens back
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_beams_share_pages(tmp_path: Path) -> None:
    model = tiny_model("llama", 8)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (75, 40)])
    options = {"do_sample": False, "max_new_tokens": 20, "num_beams": 4}
    expected = reference(model, ids, attention_mask=mask, **options)
    with small_cache(model, tmp_path, gpu_pages=10) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(out, expected)
        assert len(cache.stats().sequences) == 8
        cache.manager.check()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_drafts_from_the_prompt_are_rolled_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 9)
    ids = random_ids(1, 20, 9).repeat(1, 6)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=5, **GREEDY)
        assert torch.equal(out, expected)


def test_drafts_of_an_assistant_model_are_rolled_back(tmp_path: Path) -> None:
    model, assistant = tiny_model("llama", 9), tiny_model("llama", 10)
    ids = random_ids(1, 100, 9)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        out = model.generate(ids, past_key_values=cache, assistant_model=assistant, **GREEDY)
        assert torch.equal(out, expected)


def test_embeddings_instead_of_ids(tmp_path: Path) -> None:
    model = tiny_model("llama", 12)
    ids = random_ids(1, 70, 12)
    embeds = model.get_input_embeddings()(ids)
    expected = reference(model, ids, **GREEDY)[:, 70:]
    with small_cache(model, tmp_path) as cache:
        out = model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
        assert cache.stats().published_pages == 0, "without ids nothing has a name"


@pytest.mark.parametrize("gpu_pages", [1, 2, 40])
def test_hot_tiers_of_any_size(gpu_pages: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3", 13)
    ids = random_ids(1, 180, 13)
    with small_cache(model, tmp_path, gpu_pages) as cache:
        out = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(out, reference(model, ids, **GREEDY))


def test_padding_on_the_right_is_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama", 14)
    ids, mask = random_ids(2, 60, 14), torch.ones((2, 60), dtype=torch.int64)
    mask[1, 35:] = 0
    plain = DynamicCache(config=model.config)
    more, more_mask = random_ids(2, 3, 15), torch.cat([mask, torch.ones_like(mask[:, :3])], dim=1)
    positions = torch.tensor([[60, 61, 62], [35, 36, 37]])
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        for caches in (plain, cache):
            first = model(ids, attention_mask=mask, past_key_values=caches).logits
            then = model(
                more, attention_mask=more_mask, position_ids=positions, past_key_values=caches
            ).logits
            if caches is plain:
                expected = (first, then)
        real = mask.bool()
        assert torch.allclose(first[real], expected[0][real], rtol=1e-3, atol=1e-3)
        assert torch.allclose(then, expected[1], rtol=1e-3, atol=1e-3)
        assert [s.tokens for s in cache.stats().sequences] == [63, 38]
