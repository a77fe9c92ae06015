"""Pages that are damaged while a model writes are computed again: the text is that of an undisturbed run."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damage, damage_cold, damage_ram, disturbed, pages_only_in, small_cache
from tiny_models import (
    FAMILIES,
    PAGE_TOKENS,
    left_padded,
    random_ids,
    reference,
    tiers,
    tiny_model,
)
from transformers import DynamicCache

from tiermem.integrations.transformers import PromptLookup, TieredCache
from tiermem.pools import Tier

GREEDY = {"do_sample": False, "max_new_tokens": 16}
EVERYWHERE = np.arange(1000)


# ---- the same text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_at_random_moments(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(family, 1)
    ids = random_ids(1, 230, 1)
    rng = np.random.default_rng(7)
    expected = reference(model, ids, **GREEDY)
    moments = sorted(rng.choice(14, 4, replace=False).tolist())
    with small_cache(model, tmp_path) as cache, caplog.at_level(logging.WARNING, "tiermem"):

        def act(count: int) -> None:
            if count in moments:
                cold = pages_only_in(cache, Tier.SSD)
                where = int(rng.integers(cache.layout.page_bytes))
                damage(cache, rng.choice(cold, 2, replace=False), where)

        assert torch.equal(disturbed(model, cache, ids, act, **GREEDY), expected)
        stats = cache.stats()
        assert stats.computed_again_tokens > 4 * PAGE_TOKENS
        assert stats.corrupt_pages >= 4
        assert cache.get_seq_length() == 245
        told = [text for text in caplog.messages if "computed again" in text]
        assert 1 <= len(told) <= 4
        assert sum(int(text.split()[0]) for text in told) == stats.computed_again_tokens


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"verify_ram": "always"}),
        ("llama", {"cpu_share": 0.0}),
        ("qwen2", {"verify_ram": "always"}),
    ],
)
def test_damage_in_ram(family: str, settings: dict[str, object], tmp_path: Path) -> None:
    """Of pages that are attended where they lie, and of pages that are streamed; some have a copy on the SSD."""
    model = tiny_model(family, 8)
    ids = random_ids(1, 230, 8)
    rng = np.random.default_rng(3)
    expected = reference(model, ids, **GREEDY)
    config = tiers(model, 4, 8, tmp_path, **settings)
    with TieredCache(model, config, page_tokens=PAGE_TOKENS) as cache:

        def act(count: int) -> None:
            if count in {2, 9, 10}:
                chosen = rng.choice(pages_only_in(cache, Tier.RAM), 2, replace=False)
                assert damage_ram(cache, chosen, int(rng.integers(cache.layout.page_bytes))) == 2

        assert torch.equal(disturbed(model, cache, ids, act, **GREEDY), expected)
        stats = cache.stats()
        assert stats.corrupt_pages > 0
        assert stats.computed_again_tokens > 0


def test_another_copy_is_taken_where_there_is_one(tmp_path: Path) -> None:
    model = tiny_model("llama", 8)
    ids = random_ids(1, 100, 8)
    expected = reference(model, ids, **GREEDY)
    config = tiers(model, 4, 8, tmp_path, verify_ram="always")
    with TieredCache(model, config, page_tokens=PAGE_TOKENS) as cache:

        def act(count: int) -> None:
            if count == 3:
                cache.manager.flush()
                assert damage_ram(cache, pages_only_in(cache, Tier.RAM)) >= 2

        assert torch.equal(disturbed(model, cache, ids, act, **GREEDY), expected)
        assert cache.stats().corrupt_pages > 0
        assert cache.stats().computed_again_tokens == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_logits_after_damage_are_those_without(layer: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3", 2)
    ids = random_ids(1, 300, 2)
    plain = DynamicCache(config=model.config)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        for start, end in ((0, 200), (200, 230), (230, 231), (231, 300)):
            expected = model(ids[:, start:end], past_key_values=plain).logits
            if start:
                damage_cold(cache, 2, where=layer * cache.layout.layer_bytes)
            logits = model(ids[:, start:end], past_key_values=cache).logits
            assert (logits - expected).abs().max() < 2e-4 * expected.abs().max()
        assert cache.stats().computed_again_tokens > 300


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_with_padding_that_lose_different_pages(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 3)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (150, 61, 130)])
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    with small_cache(model, tmp_path) as cache:

        def act(count: int) -> None:
            for row, when in ((0, 2), (2, 2), (1, 7)):
                cold = pages_only_in(cache, Tier.SSD, row)
                if count == when and len(cold):
                    damage(cache, cold[row : row + 2], 5, row)

        out = disturbed(model, cache, ids, act, attention_mask=mask, **GREEDY)
        assert torch.equal(out, expected)
        assert cache.stats().computed_again_tokens > 0
        assert sorted(s.tokens for s in cache.stats().sequences) == [76, 145, 165]


def test_everything_is_damaged_again_and_again(tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    ids = random_ids(1, 200, 4)
    with small_cache(model, tmp_path) as cache:

        def act(count: int) -> None:
            if count % 4 == 1:
                damage(cache, EVERYWHERE)

        assert torch.equal(
            disturbed(model, cache, ids, act, **GREEDY), reference(model, ids, **GREEDY)
        )
        assert cache.stats().computed_again_tokens > 400


def test_the_last_page_is_damaged_while_the_cache_rests(tmp_path: Path) -> None:
    model = tiny_model("llama", 5)
    ids = random_ids(1, 83, 5)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path, ram_pages=0) as cache, torch.no_grad():
        model(ids[:, :75], past_key_values=cache)
        cache._rows.sequences[0].suspend()
        damage(cache, np.array([4]))
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens == 75 - 64
        cache.manager.check()


def test_beams_share_what_was_computed_again(tmp_path: Path) -> None:
    model = tiny_model("llama", 6)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (125, 90)])
    options = {"do_sample": False, "max_new_tokens": 12, "num_beams": 3}
    expected = reference(model, ids, attention_mask=mask, **options)
    with small_cache(model, tmp_path, gpu_pages=10) as cache:

        def act(count: int) -> None:
            if count == 5:
                damage(cache, EVERYWHERE)

        out = disturbed(model, cache, ids, act, attention_mask=mask, **options)
        assert torch.equal(out, expected)
        # one beam of each prompt computes it, the others what is their own
        assert 0 < cache.stats().computed_again_tokens < 125 + 90 + 6 * 2 * PAGE_TOKENS


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lookup_goes_on(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 9)
    ids = random_ids(1, 25, 9).repeat(1, 8)
    with small_cache(model, tmp_path) as cache:

        def act(count: int) -> None:
            if count in {3, 9}:
                damage_cold(cache, 1, 2)

        lookup = PromptLookup(8)
        out = disturbed(model, cache, ids, act, custom_generate=lookup, **GREEDY)
        assert torch.equal(out, reference(model, ids, **GREEDY))
        assert lookup.acceptance.drafted_tokens > 0
        assert cache.stats().computed_again_tokens > 0


def test_drafts_of_transformers_go_on(tmp_path: Path) -> None:
    model = tiny_model("llama", 9)
    ids = random_ids(1, 25, 9).repeat(1, 8)
    with small_cache(model, tmp_path) as cache:

        def act(_: int) -> None:
            if cache.get_seq_length() > 203 and not cache.stats().corrupt_pages:
                damage_cold(cache, 1, 2)

        out = disturbed(model, cache, ids, act, prompt_lookup_num_tokens=5, **GREEDY)
        assert torch.equal(out, reference(model, ids, **GREEDY))
        assert cache.stats().computed_again_tokens > 0


# ---- what was stored before ----------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[0], [2, 8], list(range(9))])
def test_an_attached_prompt_that_turns_out_damaged(numbers: list[int], tmp_path: Path) -> None:
    model = tiny_model("llama", 10)
    ids = random_ids(1, 150, 10)
    expected = reference(model, ids, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        model.generate(ids, past_key_values=cache, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        assert cache.attach(ids) == 144
        damage(cache, np.array(numbers))
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens >= 144 - numbers[0] * PAGE_TOKENS
        cache.manager.check()
        cache.reset()
        assert cache.attach(ids) == 144, "what was computed again has its names"
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    with small_cache(model, tmp_path) as cache:
        assert cache.attach(ids) == 144
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens == 0


def test_rows_attached_to_one_damaged_prompt_compute_it_once(tmp_path: Path) -> None:
    model = tiny_model("llama", 11)
    common = random_ids(1, 96, 11)[0]
    ids, mask = left_padded([torch.cat([common, random_ids(1, n, n)[0]]) for n in (20, 5)])
    with small_cache(model, tmp_path, gpu_pages=30) as cache:
        model.generate(common[None], past_key_values=cache, **GREEDY)
    with small_cache(model, tmp_path, gpu_pages=30) as cache:
        assert cache.attach(ids, mask) == 96
        damage(cache, np.array([1, 2]), row=1)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, reference(model, ids, attention_mask=mask, **GREEDY))
        assert cache.stats().computed_again_tokens == 80 + 1  # the second row ends at 81 of 96


# ---- positions -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_keep_positions_that_are_not_their_index(tmp_path: Path) -> None:
    model = tiny_model("llama", 12)
    ids, positions = random_ids(1, 200, 12), torch.arange(300, 500)[None]
    plain = DynamicCache(config=model.config)
    with small_cache(model, tmp_path) as cache:
        for part in (slice(0, 180), slice(180, 200)):
            arguments = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
            expected = model(**arguments, past_key_values=plain).logits
            if part.start:
                first = damage_cold(cache, 1, 3)
            logits = model(**arguments, past_key_values=cache).logits
            assert (logits - expected).abs().max() < 2e-4 * expected.abs().max()
        assert cache.stats().computed_again_tokens == 180 - first * PAGE_TOKENS
        assert cache.stats().published_pages == 0, "as before, they have no names"


@torch.no_grad()
def test_padding_between_tokens_is_left_out_again(tmp_path: Path) -> None:
    model = tiny_model("llama", 13)
    ids, mask = random_ids(2, 180, 13), torch.ones((2, 180), dtype=torch.int64)
    mask[1, 100:] = 0
    more, more_mask = random_ids(2, 40, 14), torch.cat([mask, mask[:, :40]], dim=1)
    last, last_mask = random_ids(2, 3, 15), torch.cat([more_mask, mask[:, :3]], dim=1)
    count = torch.arange(180).expand(2, -1)
    starts = torch.tensor([[180], [100]])
    plain = DynamicCache(config=model.config)
    results = []
    with small_cache(model, tmp_path) as cache:
        for either in (plain, cache):
            model(ids, attention_mask=mask, position_ids=count, past_key_values=either)
            places = starts + torch.arange(40)
            model(more, attention_mask=more_mask, position_ids=places, past_key_values=either)
            if either is cache:
                first = damage_cold(cache, 1, 2, row=1)
            places = starts + 40 + torch.arange(3)
            results.append(
                model(last, attention_mask=last_mask, position_ids=places, past_key_values=either)
            )
        expected, logits = (result.logits for result in results)
        assert (logits - expected).abs().max() < 2e-4 * expected.abs().max()
        assert cache.stats().computed_again_tokens == 140 - first * PAGE_TOKENS
