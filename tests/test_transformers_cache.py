"""The life of a TieredCache beside its model: calls that fail, other caches, rolling back, closing."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tiny_models import PAGE_TOKENS, left_padded, random_ids, reference, tiers, tiny_model
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiermem import ClosedError, ConfigError, OutOfPagesError, TierMemError
from tiermem.integrations.transformers import TieredCache

GREEDY = {"do_sample": False, "max_new_tokens": 12}


class Interruption(BaseException):
    """As KeyboardInterrupt: hooks of torch do not see it."""


@pytest.fixture(name="model")
def _model() -> PreTrainedModel:
    return tiny_model("llama", 21)


@pytest.fixture(name="cache")
def _cache(model: PreTrainedModel, tmp_path: Path) -> Iterator[TieredCache]:
    with TieredCache(model, tiers(model, 4, 6, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        yield cache
        cache.manager.check()


def generate(model: PreTrainedModel, cache: TieredCache, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids, past_key_values=cache, **GREEDY)
    return tokens


def fail_once(module: torch.nn.Module, error: type[BaseException]) -> None:
    """The next call of `module` raises."""

    def hook(*_: object) -> None:
        handle.remove()
        raise error("on purpose")

    handle = module.register_forward_pre_hook(hook)


def refuse_all_use(model: PreTrainedModel, cache: TieredCache, ids: torch.Tensor) -> None:
    """Every method of a closed cache raises."""
    with pytest.raises(ClosedError):
        generate(model, cache, ids)
    with pytest.raises(ClosedError):
        cache.attach(ids)
    with pytest.raises(ClosedError):
        cache.crop(-1)
    with pytest.raises(ClosedError):
        cache.reset()


# ---- calls that fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model.layers.0.self_attn", "model.layers.1.mlp", "lm_head"])
@pytest.mark.parametrize("error", [RuntimeError, Interruption])
def test_a_call_that_raises_stores_nothing(
    model: PreTrainedModel, cache: TieredCache, place: str, error: type[BaseException]
) -> None:
    ids = random_ids(1, 150, 1)
    expected = reference(model, ids, **GREEDY)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
        fail_once(model.get_submodule(place), error)
        with pytest.raises(error):
            model(ids[:, 70:], past_key_values=cache)
    assert cache.get_seq_length() == 70
    # even an interrupted call leaves calls with other caches as they are
    assert torch.equal(reference(model, ids, **GREEDY), expected)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, cache, ids), expected)


@torch.no_grad()
def test_hooks_of_the_model_itself_come_before_and_after_its_call(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids = random_ids(1, 50, 1)
    fail_once(model, RuntimeError)
    with pytest.raises(RuntimeError):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0

    def after(*_: object) -> None:
        handle.remove()
        raise RuntimeError("on purpose")

    handle = model.register_forward_hook(after)
    with pytest.raises(RuntimeError):
        model(ids[:, :30], past_key_values=cache)
    assert cache.get_seq_length() == 30
    assert torch.equal(generate(model, cache, ids), reference(model, ids, **GREEDY))


@torch.no_grad()
def test_a_forward_that_is_called_by_itself_counts_too(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids = random_ids(1, 50, 1)
    model.forward(ids[:, :30], past_key_values=cache)
    assert cache.get_seq_length() == 30
    assert torch.equal(generate(model, cache, ids), reference(model, ids, **GREEDY))


def test_a_close_after_an_interruption(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = TieredCache(model, tiers(model, 4, 6, tmp_path), page_tokens=PAGE_TOKENS)
    fail_once(model.lm_head, Interruption)
    with pytest.raises(Interruption):
        model(random_ids(1, 20, 1), past_key_values=cache)
    cache.close()
    assert model.config._attn_implementation == "sdpa"


def test_without_room_the_call_raises_and_the_cache_stays_usable(model: PreTrainedModel) -> None:
    ids = random_ids(1, 60, 2)
    with TieredCache(model, tiers(model, 4, 0), page_tokens=PAGE_TOKENS) as cache:
        with pytest.raises(OutOfPagesError):
            generate(model, cache, ids)
        assert cache.get_seq_length() == 4 * PAGE_TOKENS
        cache.reset()
        assert torch.equal(
            generate(model, cache, ids[:, :50]), reference(model, ids[:, :50], **GREEDY)
        )


def test_rows_that_found_no_room_go_on_when_there_is_some(model: PreTrainedModel) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (45, 30)])
    options = {"do_sample": False, "attention_mask": mask}
    expected = reference(model, ids, max_new_tokens=30, **options)
    with TieredCache(model, tiers(model, 9, 0), page_tokens=PAGE_TOKENS) as cache:
        with pytest.raises(OutOfPagesError):
            model.generate(ids, past_key_values=cache, max_new_tokens=60, **options)
        stored = cache.get_seq_length()
        assert 45 < stored < 105
        assert [row.tokens for row in cache.stats().sequences] == [stored, stored - 15]
        cache.crop(44 - stored)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=30, **options)
        assert torch.equal(out, expected)
        cache.manager.check()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"softcap": 30.0}, "softcap"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "causal"),
    ],
)
def test_arguments_that_cannot_be_honoured(
    model: PreTrainedModel, cache: TieredCache, arguments: dict[str, object], problem: str
) -> None:
    ids = random_ids(2, 5, 3)
    with torch.no_grad(), pytest.raises(ValueError, match=problem):
        model(ids, past_key_values=cache, **arguments)
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache, ids), reference(model, ids, **GREEDY))


def test_rows_and_masks_must_stay_what_they_were(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (30, 20)])
    more = torch.ones((2, 4), dtype=torch.int64)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="must be given"):
            model(more, past_key_values=cache)
        with pytest.raises(ValueError, match="differs from before"):
            model(more, attention_mask=torch.ones((2, 34)), past_key_values=cache)
        with pytest.raises(ValueError, match="rows"):
            model(more[:1], attention_mask=torch.ones((1, 34)), past_key_values=cache)
        model(more, attention_mask=torch.cat([mask, more], dim=1), past_key_values=cache)
    assert cache.get_seq_length() == 34


def test_padding_between_tokens_needs_full_attention(tmp_path: Path) -> None:
    model = tiny_model("mistral", 3)
    mask = torch.tensor([[1, 1, 0, 1]])
    with (
        TieredCache(model, tiers(model, 4, 0), page_tokens=PAGE_TOKENS) as cache,
        pytest.raises(ConfigError, match="left"),
    ):
        model(random_ids(1, 4, 3), attention_mask=mask, past_key_values=cache)


# ---- gradients and modes ---------------------------------------------------------------------------------


def test_gradients_are_refused_and_results_without_them_are_right(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids = random_ids(1, 40, 4)
    logits = model(ids, past_key_values=cache).logits
    assert torch.allclose(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(TierMemError, match="inference"):
        logits.sum().backward()
    cache.reset()
    with torch.inference_mode():
        assert torch.allclose(model(ids, past_key_values=cache).logits, logits)


def test_dropout_of_attention_is_refused(model: PreTrainedModel, cache: TieredCache) -> None:
    model.train()
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="dropout"):
        model(random_ids(1, 5, 5), past_key_values=cache)


# ---- other caches ----------------------------------------------------------------------------------------


def test_caches_on_one_model_take_turns(
    model: PreTrainedModel, cache: TieredCache, tmp_path: Path
) -> None:
    ids = random_ids(1, 130, 6)
    plain = DynamicCache(config=model.config)
    options = tiers(model, 5, 5, tmp_path / "second")
    with TieredCache(model, options, page_tokens=PAGE_TOKENS) as second, torch.no_grad():
        for start in range(0, 130, 26):
            part = ids[:, start : start + 26]
            expected = model(part, past_key_values=plain).logits
            for other in (cache, second):
                logits = model(part, past_key_values=other).logits
                assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
            assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)


def test_a_cache_serves_its_own_model_only(model: PreTrainedModel, cache: TieredCache) -> None:
    with pytest.raises(ConfigError, match="model that it was made for"):
        generate(tiny_model("llama", 22), cache, random_ids(1, 5, 7))
    assert generate(model, cache, random_ids(1, 5, 7)).shape == (1, 17)


def test_the_name_falls_back_for_calls_without_a_tiered_cache(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (30, 20)])
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    assert "tiermem" in ALL_ATTENTION_FUNCTIONS
    model.set_attn_implementation("tiermem")
    try:
        assert torch.equal(reference(model, ids, attention_mask=mask, **GREEDY), expected)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, expected)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_comes_back(
    model: PreTrainedModel, cache: TieredCache, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    ids = random_ids(1, 50, 8)
    assert torch.equal(generate(model, cache, ids), reference(model, ids, **GREEDY))
    assert model.config._attn_implementation == implementation


# ---- rolling back and choosing rows ----------------------------------------------------------------------


def test_crop_forgets_columns_of_every_row(model: PreTrainedModel, cache: TieredCache) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (50, 20)])
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    cache.crop(0)
    cache.crop(-(11 + 25))
    assert cache.get_seq_length() == 25
    assert [row.tokens for row in cache.stats().sequences] == [25, 0]
    again = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(again, out)
    cache.crop(70)
    assert cache.get_seq_length() == 61
    cache.crop(60)
    assert cache.get_seq_length() == 60
    with pytest.raises(ValueError, match="must be 0 to 60"):
        cache.crop(-61)


def test_rows_are_reordered_repeated_and_dropped(
    model: PreTrainedModel, cache: TieredCache
) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (50, 20, 33)])
    plain = DynamicCache(config=model.config)
    more = random_ids(4, 3, 9)
    with torch.no_grad():
        for both in (plain, cache):
            model(ids, attention_mask=mask, past_key_values=both)
            both.reorder_cache(torch.tensor([1, 1, 0]))
            both.batch_select_indices(torch.tensor([2, 0]))
            both.batch_repeat_interleave(2)
        rows = mask[[0, 0, 1, 1]]
        full = torch.cat([rows, torch.ones_like(more)], dim=1)
        positions = rows.sum(dim=1, keepdim=True) + torch.arange(3)
        expected, logits = (
            model(more, attention_mask=full, position_ids=positions, past_key_values=both).logits
            for both in (plain, cache)
        )
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    assert [row.tokens for row in cache.stats().sequences] == [53, 53, 23, 23]
    for wrong in ([], [4], [-1]):
        with pytest.raises(ValueError, match="rows"):
            cache.reorder_cache(torch.tensor(wrong, dtype=torch.int64))


def test_reset_takes_another_batch(model: PreTrainedModel, cache: TieredCache) -> None:
    for rows in (1, 3, 2):
        cache.reset()
        ids = random_ids(rows, 30, rows)
        assert torch.equal(generate(model, cache, ids), reference(model, ids, **GREEDY))


# ---- the end ---------------------------------------------------------------------------------------------


def test_a_closed_cache_is_refused_and_leaves_no_trace(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    ids = random_ids(1, 30, 10)
    expected = reference(model, ids, **GREEDY)
    cache = TieredCache(model, tiers(model, 4, 6, tmp_path), page_tokens=PAGE_TOKENS)
    generate(model, cache, ids)
    cache.close()
    cache.close()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    refuse_all_use(model, cache, ids)
    assert torch.equal(reference(model, ids, **GREEDY), expected)
    manager = weakref.ref(cache.manager)
    del cache
    gc.collect()
    assert manager() is None


def test_a_cache_that_was_dropped_leaves_the_model_alone(model: PreTrainedModel) -> None:
    cache = TieredCache(model, tiers(model, 4, 0), page_tokens=PAGE_TOKENS)
    generate(model, cache, random_ids(1, 10, 11))
    manager = weakref.ref(cache.manager)
    del cache
    gc.collect()
    assert manager() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_tiermem_does_not_import_transformers() -> None:
    code = (
        "import sys, tiermem, tiermem.manager, tiermem.integrations;"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_calls_may_change_between_inference_mode_and_no_grad(
    first: Callable[[], AbstractContextManager[None]],
) -> None:
    """Memory that was made in inference mode is written in calls outside of it, and the other way round."""
    model, ids = tiny_model("llama", 3), random_ids(1, 40, 1)
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with first():
        cache = TieredCache(model, tiers(model, 20, 10), page_tokens=PAGE_TOKENS)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    results = []
    for mode in (second, first, second):
        with mode():
            results.append(model(ids[:, :1], past_key_values=cache).logits[0, 0].clone())
    cache.close()
    with torch.no_grad():
        everything = model(torch.cat([ids, ids[:, :1].expand(1, 4)], 1)).logits[0, -3:]
    torch.testing.assert_close(torch.stack(results), everything, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_within_the_model_see_every_call() -> None:
    """What could be replayed runs as it is while someone listens within the model."""
    model, ids = tiny_model("llama", 3), random_ids(1, 20, 1)
    seen = []
    with TieredCache(model, tiers(model, 20, 0), page_tokens=PAGE_TOKENS) as cache:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert not cache._calls.hooks.others_listen()
        layer = model.model.layers[0]
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        assert cache._calls.hooks.others_listen()
        for _ in range(4):
            model(ids[:, :1], past_key_values=cache)
        assert len(seen) == 4
        handle.remove()
