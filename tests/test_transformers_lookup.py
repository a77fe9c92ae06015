"""PromptLookup says what decoding one by one says, and stores the same pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, PAGE_TOKENS, left_padded, random_ids, reference, tiers, tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from tiermem import ConfigError, OutOfPagesError
from tiermem.integrations.transformers import Acceptance, PromptLookup, TieredCache
from tiermem.integrations.transformers.drafts import Drafts
from tiermem.integrations.transformers.forward import Forward

NEW = 30
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
REPEATED = random_ids(1, 20, 9).repeat(1, 6)


def small_cache(model: PreTrainedModel, path: Path, gpu_pages: int = 4) -> TieredCache:
    """Four hot pages, six warm ones, the rest on disk."""
    return TieredCache(model, tiers(model, gpu_pages, 6, path), page_tokens=PAGE_TOKENS)


def looked_up(
    model: PreTrainedModel, cache: TieredCache, ids: torch.Tensor, lookup: PromptLookup, **options: object
) -> torch.Tensor:  # fmt: skip
    tokens: torch.Tensor = model.generate(
        ids, past_key_values=cache, custom_generate=lookup, **options
    )
    assert cache.get_seq_length() == tokens.shape[1] - 1
    cache.manager.check()
    return tokens


def foresee(
    monkeypatch: pytest.MonkeyPatch, text: torch.Tensor, right: Callable[[int], int]
) -> None:
    """Drafts are the continuation `text` (1, tokens), but for the token after the first `right(pass)`."""
    tokens = text[0].tolist()
    passes = 0

    def draft(self: Drafts, num_tokens: int) -> list[int]:
        nonlocal passes
        passes += 1
        known = len(self)
        made = [*tokens[known : known + num_tokens], *[0] * num_tokens][:num_tokens]
        wrong = right(passes)
        if wrong < len(made):
            made[wrong] = made[wrong] % 100 + 1
        return made

    monkeypatch.setattr(Drafts, "draft", draft)


# ---- the same tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_without_drafts(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 9)
    expected = reference(model, REPEATED, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup()
        assert torch.equal(looked_up(model, cache, REPEATED, lookup, **GREEDY), expected)
        found = lookup.acceptance
        assert found.drafted_tokens > 0
        assert found.new_tokens == NEW - 1 == found.passes + found.accepted_tokens


@pytest.mark.parametrize(
    ("family", "most"), [("llama", 1), ("llama", 31), *((family, 8) for family in FAMILIES)]
)
def test_drafts_with_a_mistake_anywhere(
    family: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, 5)
    ids = random_ids(1, 133, 5)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda passes: passes * 7 % (most + 2))
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(most)
        assert torch.equal(looked_up(model, cache, ids, lookup, **GREEDY), expected)
        assert 0 < lookup.acceptance.accepted_tokens < lookup.acceptance.drafted_tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampled_tokens_are_those_without_drafts_after_the_same_seed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, 11)
    options = {"do_sample": True, "max_new_tokens": NEW, "temperature": 0.8, "top_k": 50}
    torch.manual_seed(5)
    expected = reference(model, REPEATED, **options)
    foresee(monkeypatch, expected, lambda passes: passes % 6)
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(8)
        torch.manual_seed(5)
        assert torch.equal(looked_up(model, cache, REPEATED, lookup, **options), expected)
        assert lookup.acceptance.accepted_tokens > NEW // 3


def test_what_processors_change_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 9)
    options = {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    expected = reference(model, REPEATED, **options)
    assert not torch.equal(expected, reference(model, REPEATED, **GREEDY))
    foresee(monkeypatch, expected, lambda passes: passes % 5)
    with small_cache(model, tmp_path) as cache:
        assert torch.equal(looked_up(model, cache, REPEATED, PromptLookup(), **options), expected)


class Calls(LogitsProcessor):
    """Notes the text that each choice was made after."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.dtype == torch.float32
        self.texts.append(input_ids[0].tolist())
        return scores


def test_processors_see_each_choice_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 3)
    ids = random_ids(1, 50, 3)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda passes: passes % 4)
    calls = Calls()
    with small_cache(model, tmp_path) as cache:
        processors = LogitsProcessorList([calls])
        looked_up(model, cache, ids, PromptLookup(), logits_processor=processors, **GREEDY)
    assert calls.texts == [expected[0, :end].tolist() for end in range(50, 50 + NEW)]


def test_nothing_accepted_costs_one_pass_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3", 2)
    ids = random_ids(1, 77, 2)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda _passes: 0)
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(8)
        assert torch.equal(looked_up(model, cache, ids, lookup, **GREEDY), expected)
    # 8, 7, ... 1, and then 1 again and again, but none where one token is left
    drafted = sum(range(1, 9)) + (NEW - 2 - 8)
    assert lookup.acceptance == Acceptance(NEW - 1, NEW - 1, drafted, 0)
    assert lookup.acceptance.tokens_per_pass == 1
    assert lookup.acceptance.share == 0


def test_everything_accepted_costs_a_pass_for_nine_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mistral", 2)
    ids = random_ids(1, 77, 2)
    options = {"do_sample": False, "max_new_tokens": 46}
    expected = reference(model, ids, **options)
    foresee(monkeypatch, expected, lambda _passes: 99)
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(8)
        assert torch.equal(looked_up(model, cache, ids, lookup, **options), expected)
    assert lookup.acceptance == Acceptance(5, 45, 40, 40)


# ---- ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2, 8, 9, 10, 11])
def test_an_end_of_text_within_a_draft_ends_the_text(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 6)
    ids = random_ids(1, 61, 6)
    unbounded = reference(model, ids, **GREEDY)
    options = {**GREEDY, "eos_token_id": int(unbounded[0, 61 + place])}
    expected = reference(model, ids, **options)
    foresee(monkeypatch, unbounded, lambda _passes: 99)
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(8)
        assert torch.equal(looked_up(model, cache, ids, lookup, **options), expected)
        assert lookup.acceptance.new_tokens == expected.shape[1] - 62
        assert cache.stats().sequences[0].tokens == expected.shape[1] - 1


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 8, 9, 10, 11, 19])
def test_no_draft_goes_beyond_the_tokens_wanted(
    new_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2", 6)
    ids = random_ids(1, 61, 6)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda _passes: 99)
    widths: list[int] = []
    handle = model.transformer.wte.register_forward_pre_hook(
        lambda _module, args: widths.append(args[0].shape[-1])
    )
    with small_cache(model, tmp_path) as cache:
        lookup = PromptLookup(8)
        options = {"do_sample": False, "max_new_tokens": new_tokens}
        out = looked_up(model, cache, ids, lookup, **options)
    handle.remove()
    assert torch.equal(out, expected[:, : 61 + new_tokens])
    assert lookup.acceptance.new_tokens == new_tokens - 1
    assert sum(widths) == 61 + new_tokens - 1, "every pass was of tokens that were kept"


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_prompts_shorter_than_any_match(columns: int, tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    ids = random_ids(1, columns, 4)
    with small_cache(model, tmp_path) as cache:
        out = looked_up(model, cache, ids, PromptLookup(), **GREEDY)
    assert torch.equal(out, reference(model, ids, **GREEDY))


# ---- the cache before and after ------------------------------------------------------------------------


def test_several_turns_with_one_cache(tmp_path: Path) -> None:
    model = tiny_model("qwen2", 3)
    ids = REPEATED
    plain = DynamicCache(config=model.config)
    with small_cache(model, tmp_path) as cache:
        for turn in range(4):
            options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
            expected = model.generate(ids, past_key_values=plain, **options)
            if turn == 2:
                out = model.generate(ids, past_key_values=cache, **options)
            else:
                out = looked_up(model, cache, ids, PromptLookup(), **options)
            assert torch.equal(out, expected)
            ids = torch.cat([out, random_ids(1, 19, turn)], dim=1)


@pytest.mark.parametrize("chunk", [16, 50, 1000])
def test_a_prompt_in_chunks(chunk: int, tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    expected = reference(model, REPEATED, **GREEDY)
    with small_cache(model, tmp_path) as cache:
        options = {**GREEDY, "prefill_chunk_size": chunk}
        assert torch.equal(looked_up(model, cache, REPEATED, PromptLookup(), **options), expected)


def test_padding_on_the_left_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 4)
    padded, masks = left_padded([random_ids(1, 70, 1)[0], random_ids(1, 41, 2)[0]])
    ids, mask = padded[1:], masks[1:]
    expected = reference(model, ids, attention_mask=mask, **GREEDY)
    foresee(monkeypatch, expected, lambda passes: passes % 4)
    with small_cache(model, tmp_path) as cache:
        out = looked_up(model, cache, ids, PromptLookup(), attention_mask=mask, **GREEDY)
        assert torch.equal(out, expected)
        assert cache.stats().sequences[0].tokens == 41 + NEW - 1


def published(cache: TieredCache) -> set[bytes]:
    """Names of all pages that can be found."""
    prefixes = cache.manager._core.prefixes
    return {name.key for name in prefixes.names_of(prefixes.pages()) if name is not None}


@pytest.mark.parametrize("closes", ["with the cache", "after a reset"])
def test_pages_on_disk_are_those_of_plain_decoding(
    closes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that are rolled back reach into the next page again and again; none is found afterwards."""
    model = tiny_model("llama", 8)
    ids = random_ids(1, 60, 8)
    with small_cache(model, tmp_path / "plain") as cache:
        expected = model.generate(ids, past_key_values=cache, **GREEDY)
    foresee(monkeypatch, expected, lambda passes: passes % 3)
    with small_cache(model, tmp_path / "lookup") as cache:
        assert torch.equal(looked_up(model, cache, ids, PromptLookup(31), **GREEDY), expected)
        assert cache.stats().published_pages == (60 + NEW - 1) // PAGE_TOKENS
        if closes == "after a reset":
            cache.reset()
    names = []
    for store in ("plain", "lookup"):
        with small_cache(model, tmp_path / store) as cache:
            names.append(published(cache))
            assert cache.attach(expected) == (60 + NEW - 1) // PAGE_TOKENS * PAGE_TOKENS
            out = looked_up(model, cache, expected, PromptLookup(), **GREEDY)
            assert torch.equal(out, reference(model, expected, **GREEDY))
    assert names[0] == names[1]
    assert len(names[0]) == (60 + NEW - 1) // PAGE_TOKENS


@pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="this transformers does not announce drafts"
)  # fmt: skip
def test_drafts_of_transformers_leave_no_pages_either(tmp_path: Path) -> None:
    model = tiny_model("llama", 9)
    with small_cache(model, tmp_path) as cache:
        options = {**GREEDY, "prompt_lookup_num_tokens": 20}
        out = model.generate(REPEATED, past_key_values=cache, **options)
        assert torch.equal(out, reference(model, REPEATED, **GREEDY))
        assert cache.stats().published_pages == (120 + NEW - 1) // PAGE_TOKENS


def test_a_pass_that_raises_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 9)
    ids = random_ids(1, 60, 8)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda _passes: 3)
    calls = 0

    def fails(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(fails)
    with small_cache(model, tmp_path) as cache:
        with pytest.raises(RuntimeError, match="on purpose"):
            looked_up(model, cache, ids, PromptLookup(8), **GREEDY)
        handle.remove()
        stored = cache.get_seq_length()
        assert 60 < stored < 60 + 3 * 9
        out = looked_up(model, cache, expected[:, : stored + 1], PromptLookup(8), **GREEDY)
        assert torch.equal(out, reference(model, expected[:, : stored + 1], **GREEDY))


def test_a_text_that_fits_fits_with_drafts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pages for a text that ends within the fourth, where drafts reach into a fifth."""
    model = tiny_model("llama", 8)
    ids = random_ids(1, 36, 8)
    unbounded = reference(model, ids, **GREEDY)
    new = unbounded[0, 36:62].tolist()
    end = max(i for i, token in enumerate(new) if token not in new[:i])
    assert 36 + end > 3 * PAGE_TOKENS
    options = {"do_sample": False, "max_new_tokens": 300, "eos_token_id": new[end]}
    expected = reference(model, ids, **options)
    foresee(monkeypatch, expected, lambda _passes: 0)
    monkeypatch.setattr(PromptLookup, "_next_limit", lambda *_: 31)
    begin, refused = Forward.begin, []

    def counted(self: Forward) -> None:
        try:
            begin(self)
        except OutOfPagesError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Forward, "begin", counted)
    with TieredCache(model, tiers(model, 4, 0), page_tokens=PAGE_TOKENS) as cache:
        assert torch.equal(looked_up(model, cache, ids, PromptLookup(31), **options), expected)
        assert refused, "no draft was too long"
        longer = torch.cat([expected, random_ids(1, 10, 1)], dim=1)
        with pytest.raises(OutOfPagesError):
            looked_up(model, cache, longer, PromptLookup(31), **options)


# ---- what it tells, what it refuses --------------------------------------------------------------------


class Heard(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_the_prompt_and_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", 9)
    ids = random_ids(1, 60, 8)
    expected = reference(model, ids, **GREEDY)
    foresee(monkeypatch, expected, lambda _passes: 3)
    heard = Heard()
    with small_cache(model, tmp_path) as cache:
        looked_up(model, cache, ids, PromptLookup(8, streamer=heard), **GREEDY)
    assert heard.pieces[0] == ids[0].tolist()
    assert [token for piece in heard.pieces for token in piece] == expected[0].tolist()
    assert max(map(len, heard.pieces[1:])) == 4
    assert heard.ended == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 2}, "PromptLookup continues one text"),
        ({"num_return_sequences": 2, "do_sample": True}, "PromptLookup continues one text"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"token_type_ids": torch.zeros(1, 30, dtype=torch.int64)}, "token_type_ids"),
        ({"attention_mask": torch.ones(1, 31, dtype=torch.int64)}, "attention_mask of 31 tokens"),
    ],
)
def test_what_it_cannot_do(options: dict[str, object], problem: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2", 1)
    ids = random_ids(1, 30, 1)
    with small_cache(model, tmp_path) as cache:
        with pytest.raises(ConfigError, match=problem):
            model.generate(
                ids, past_key_values=cache, custom_generate=PromptLookup(), **{**GREEDY, **options}
            )
        assert cache.get_seq_length() == 0
        two = random_ids(2, 30, 1)
        with pytest.raises(ConfigError, match="2 rows"):
            model.generate(two, past_key_values=cache, custom_generate=PromptLookup(), **GREEDY)


def test_wrong_caches_and_sizes(tmp_path: Path) -> None:
    model = tiny_model("llama", 1)
    ids = random_ids(1, 30, 1)
    plain = DynamicCache(config=model.config)
    with pytest.raises(ConfigError, match="needs a TieredCache, not DynamicCache"):
        model.generate(ids, past_key_values=plain, custom_generate=PromptLookup(), **GREEDY)
    with small_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ConfigError, match="the cache holds 30"):
            model.generate(ids, past_key_values=cache, custom_generate=PromptLookup(), **GREEDY)
    for wrong in (0, 32, -1):
        with pytest.raises(ValueError, match="must be 1 to 31"):
            PromptLookup(wrong)
    for kind in (True, 2.0, "8"):
        with pytest.raises(TypeError, match="must be an int"):
            PromptLookup(kind)  # type: ignore[arg-type]
