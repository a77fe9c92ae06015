"""On a GPU, models say the same with a TieredCache in fp32, and in fp16 up to ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damage_ssd, pages_only_in
from tiny_models import (
    FAMILIES,
    PAGE_TOKENS,
    left_padded,
    random_ids,
    reference,
    tiers,
    tiny_model,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tiermem.integrations.transformers import PromptLookup, TieredCache
from tiermem.pools import Tier

GREEDY = {"do_sample": False, "max_new_tokens": 24}
TIE = 1e-3
"""Logits closer than this may change places through rounding."""


def count_ties(model: PreTrainedModel, cache: TieredCache, ids: torch.Tensor, steps: int) -> int:
    """Walk along the tokens that transformers' own cache leads to, and compare the choice at each.

    Returns how often the two chose differently between logits that are closer than TIE; fails where they differ
    between others.
    """
    plain = DynamicCache(config=model.config)
    ties = 0
    for _ in range(steps):
        expected = model(ids, past_key_values=plain, logits_to_keep=1).logits[0, -1].float()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        ids, ours = expected.argmax()[None, None], logits.argmax()
        if ours != ids[0, 0]:
            gap = float(expected.max() - expected[ours])
            assert gap < TIE, f"chose a token whose logit is {gap} below the best"
            ties += 1
    return ties


def half_model(dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama in half precision; its logits stay below 1, where fp16 rounds them by less than TIE."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, initializer_range=0.04,
        max_position_embeddings=4096, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 0.25
    return model.to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_fp32(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 31).cuda()
    ids, mask = (part.cuda() for part in left_padded([random_ids(1, n, n)[0] for n in (301, 77)]))
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    with TieredCache(model, tiers(model, 6, 12, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        assert cache.manager.torch_device == model.device
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
        cache.reset()
        assert cache.attach(ids, mask) > 0
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
        cache.manager.check()


@pytest.mark.gpu
@torch.no_grad()
def test_greedy_tokens_in_fp16_up_to_ties(tmp_path: Path) -> None:
    model = half_model(torch.float16, "cuda")
    ids = random_ids(1, 1501, 4).cuda()
    with TieredCache(model, tiers(model, 12, 40, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        ties = count_ties(model, cache, ids, steps=200)
        reads = {tier.tier: tier.reads for tier in cache.stats().tiers}
    print(f"ties below {TIE}: {ties} of 200 tokens; pages read per tier: {reads}")  # noqa: T201
    assert ties <= 10
    assert all(reads.values())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_tokens_are_those_of_the_model(family: str) -> None:
    """Everything fits the hot tier: one graph serves all tokens of several turns, padding and a crop included."""
    model = tiny_model(family, 37).cuda()
    ids, mask = (part.cuda() for part in left_padded([random_ids(1, n, n)[0] for n in (90, 33)]))
    arguments = {"do_sample": False, "max_new_tokens": 60}
    expected = reference(model, ids, attention_mask=mask, **arguments)
    with TieredCache(model, tiers(model, 80, 0), page_tokens=PAGE_TOKENS) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        assert torch.equal(out, expected)
        assert cache._calls.decode.num_graphs == 1
        cache.crop(-40)
        grown = torch.cat([mask, mask.new_ones(2, out.shape[1] - mask.shape[1] - 40)], 1)
        again = model.generate(
            out[:, :-40], attention_mask=grown, past_key_values=cache, do_sample=False,
            max_new_tokens=40,
        )  # fmt: skip
        assert torch.equal(again, expected)
        assert cache._calls.decode.num_graphs == 1
        cache.manager.check()


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_pages", [6, 80])
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_pages_are_computed_again(family: str, gpu_pages: int, tmp_path: Path) -> None:
    """Found when slices are streamed, and at promotion, after which graphs are replayed as ever."""
    model = tiny_model(family, 37).cuda()
    ids, mask = (part.cuda() for part in left_padded([random_ids(1, n, n)[0] for n in (230, 130)]))
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 40}
    expected = reference(model, ids, **arguments)
    config = tiers(model, gpu_pages, 4, tmp_path)
    with TieredCache(model, config, page_tokens=PAGE_TOKENS) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)
    with TieredCache(model, config, page_tokens=PAGE_TOKENS) as cache:
        attached = cache.attach(ids, mask)
        assert attached > 200
        for row, number in ((0, 3), (1, 5)):
            assert damage_ssd(cache, np.array([number]), 100, row)
        assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)
        again = cache.stats().computed_again_tokens
        assert again >= attached - 48 + 130 - (230 - attached) - 80
        assert cache._calls.decode.num_graphs == (1 if gpu_pages == 80 else 0)
        cache.manager.check()
        cache.crop(-30)
        if gpu_pages == 6:
            assert damage_ssd(cache, pages_only_in(cache, Tier.SSD)[:2])
        grown = torch.cat([mask, mask.new_ones(2, 10)], dim=1)
        out = model.generate(
            expected[:, :-30], attention_mask=grown, past_key_values=cache, do_sample=False,
            max_new_tokens=30,
        )  # fmt: skip
        assert torch.equal(out, expected)
        assert (cache.stats().computed_again_tokens > again) == (gpu_pages == 6)


@pytest.mark.gpu
@torch.no_grad()
def test_results_of_replays_are_the_callers_own() -> None:
    model = tiny_model("llama", 41).cuda()
    ids = random_ids(1, 20, 5).cuda()
    with TieredCache(model, tiers(model, 40, 0), page_tokens=PAGE_TOKENS) as cache:
        model(ids, past_key_values=cache)
        results = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8)]
        assert cache._calls.decode.num_graphs == 1
    everything = model(torch.cat([ids, ids[:, :8]], 1)).logits
    for i, logits in enumerate(results):
        torch.testing.assert_close(logits[:, 0], everything[:, 20 + i], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_pages", [6, 80])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafted_tokens_in_fp32(family: str, gpu_pages: int, tmp_path: Path) -> None:
    """Streamed, and all hot: calls of several tokens run as they are, those without a draft are replayed."""
    model = tiny_model(family, 37).cuda()
    ids = random_ids(1, 25, 9).repeat(1, 6).cuda()
    arguments = {"do_sample": False, "max_new_tokens": 80}
    expected = reference(model, ids, **arguments)
    with TieredCache(
        model, tiers(model, gpu_pages, 12, tmp_path), page_tokens=PAGE_TOKENS
    ) as cache:
        lookup = PromptLookup(8)
        out = model.generate(ids, past_key_values=cache, custom_generate=lookup, **arguments)
        assert torch.equal(out, expected)
        assert lookup.acceptance.drafted_tokens > 0
        assert cache.get_seq_length() == out.shape[1] - 1
        again = {"do_sample": False, "max_new_tokens": 30, "attention_mask": torch.ones_like(out)}
        plain = reference(model, out, **again)
        for decoding in ({}, {"custom_generate": PromptLookup(31)}):
            assert torch.equal(
                model.generate(out, past_key_values=cache, **again, **decoding), plain
            )
            cache.crop(out.shape[1] - 1 - cache.get_seq_length())
        assert cache._calls.decode.num_graphs == (1 if gpu_pages == 80 else 0)
        cache.manager.check()


@pytest.mark.gpu
@torch.no_grad()
def test_drafted_tokens_in_fp16_up_to_ties(tmp_path: Path) -> None:
    """Each token is the best that transformers' own cache sees after those before it, but for ties."""
    model = half_model(torch.float16, "cuda")
    ids = random_ids(1, 300, 4).repeat(1, 4).cuda()
    lookup = PromptLookup(8)
    with TieredCache(model, tiers(model, 12, 40, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        out = model.generate(
            ids, past_key_values=cache, custom_generate=lookup, do_sample=False, max_new_tokens=200
        )
    plain = DynamicCache(config=model.config)
    ties, new = 0, ids
    for i in range(ids.shape[1], out.shape[1]):
        logits = model(new, past_key_values=plain, logits_to_keep=1).logits[0, -1].float()
        new = out[:, i : i + 1]
        gap = float(logits.max() - logits[out[0, i]])
        assert gap < TIE, f"chose a token whose logit is {gap} below the best"
        ties += gap > 0
    print(f"ties below {TIE}: {ties} of 200 tokens; {lookup.acceptance}")  # noqa: T201
    assert ties <= 10


@torch.no_grad()
def test_the_comparison_up_to_ties_works_without_a_gpu(tmp_path: Path) -> None:
    model = half_model(torch.float16, "cpu")
    with TieredCache(model, tiers(model, 3, 3, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        assert count_ties(model, cache, random_ids(1, 150, 4), steps=10) <= 1
