"""A TieredCache after an interruption anywhere in its code: the call stored nothing, and the next is right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from damage import damage_ssd, pages_only_in
from tiny_models import PAGE_TOKENS, left_padded, random_ids, tiers, tiny_model
from transformers import PreTrainedModel

import tiermem.integrations.transformers
from tiermem.integrations.transformers import TieredCache
from tiermem.pools import Tier

OURS = str(Path(tiermem.integrations.transformers.__file__).parent)
TRIES = int(os.environ.get("TIERMEM_INTERRUPTS", "12"))
"""At how many of the lines of a call it is interrupted; which, a random number decides."""


class Interrupter:
    """Counts the lines of the integration that run, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at_line: int) -> None:
        self.at_line = at_line
        self.count = 0
        self.place = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> Interrupter | None:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at_line:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


@contextmanager
def interrupted(at_line: int) -> Iterator[Interrupter]:
    """The body, up to that line of it."""
    interrupter, before = Interrupter(at_line), sys.gettrace()
    sys.settrace(interrupter)
    try:
        yield interrupter
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def try_every_line(body: Callable[[], object], check: Callable[[], None]) -> None:
    """Interrupt `body` at TRIES of its lines and `check` after each."""
    with interrupted(0) as counter:
        body()
    check()
    seed = np.random.SeedSequence().entropy
    sys.stdout.write(f"seed {seed}\n")  # shown when the test fails
    rng = np.random.default_rng(seed)
    count = min(TRIES, counter.count - 1)
    for line in np.sort(rng.choice(np.arange(1, counter.count), count, replace=False)).tolist():
        interrupter = interrupt(line, body, check)
        while not interrupter.place:
            # Which pages lie where, and so how many lines run, is another matter each time.
            another = int(rng.integers(1, interrupter.count + 1))
            interrupter = interrupt(another, body, check)


def interrupt(line: int, body: Callable[[], object], check: Callable[[], None]) -> Interrupter:
    """Interrupt `body` at that line, where it has so many, and `check`."""
    with interrupted(line) as interrupter:
        body()
    place = interrupter.place or f"ended after {interrupter.count}"
    sys.stdout.write(f"line {line}: {place}\n")
    check()
    return interrupter


@pytest.fixture(name="model")
def _model() -> PreTrainedModel:
    return tiny_model("llama", 21)


def is_close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((logits - expected).abs().max() < 2e-4 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("gpu_pages", [4, 30])
def test_calls_of_rows_with_padding(model: PreTrainedModel, gpu_pages: int, tmp_path: Path) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (85, 50)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 80:]

    def call(columns: slice) -> torch.Tensor:
        logits: torch.Tensor = model(
            ids[:, columns], attention_mask=mask[:, : columns.stop],
            position_ids=positions[:, columns], past_key_values=cache,
        ).logits  # fmt: skip
        return logits

    def check() -> None:
        assert cache.get_seq_length() in {80, 85}
        cache.crop(80 - cache.get_seq_length())
        assert [len(s.pages) for s in cache._rows.sequences] == [5, 3]
        assert model.config._attn_implementation == "sdpa"
        cache.manager.check()
        assert is_close(call(slice(80, 85)), expected)
        cache.crop(-5)

    config = tiers(model, gpu_pages, 6, tmp_path)
    with TieredCache(model, config, page_tokens=PAGE_TOKENS) as cache:
        call(slice(0, 80))
        try_every_line(lambda: call(slice(80, 85)), check)


@torch.no_grad()
def test_calls_without_the_cache_are_themselves_at_once(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    ids = random_ids(1, 30, 1)
    expected = model(ids).logits

    def check() -> None:
        assert torch.equal(model(ids).logits, expected)
        cache.reset()

    with TieredCache(model, tiers(model, 4, 6, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        try_every_line(lambda: model(ids, past_key_values=cache), check)


@torch.no_grad()
def test_recoveries(model: PreTrainedModel, tmp_path: Path) -> None:
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (150, 120)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 145:]
    again = 0

    def body() -> None:
        nonlocal again
        before = cache.stats().computed_again_tokens
        for row in (0, 1):
            cold = cache._rows.sequences[row].pages[pages_only_in(cache, Tier.SSD, row)[1:2]]
            damage_ssd(
                cache, np.flatnonzero(np.isin(cache._rows.sequences[row].pages, cold)), 0, row
            )
        call(145)
        again += cache.stats().computed_again_tokens > before

    def call(start: int) -> torch.Tensor:
        logits: torch.Tensor = model(
            ids[:, start:], attention_mask=mask, position_ids=positions[:, start:],
            past_key_values=cache,
        ).logits  # fmt: skip
        return logits[:, 145 - start :]

    def check() -> None:
        columns = cache.get_seq_length()
        assert columns <= 150
        cache.manager.check()
        cache.crop(min(145 - columns, 0))
        assert is_close(call(cache.get_seq_length()), expected)
        cache.crop(-5)

    with TieredCache(model, tiers(model, 4, 4, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        call(0)
        cache.crop(-5)
        try_every_line(body, check)
        assert again


@torch.no_grad()
def test_reset_in_the_middle_of_choosing_rows_and_cropping(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    ids = random_ids(2, 40, 3)
    expected = model(ids).logits

    def body() -> None:
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.crop(-13)
        cache.batch_select_indices(torch.tensor([0]))
        cache.reset()
        cache.attach(ids)

    def check() -> None:
        cache.reset()
        assert cache.stats().sequences == () or cache.get_seq_length() == 0
        assert is_close(model(ids, past_key_values=cache).logits, expected)
        cache.manager.check()

    with TieredCache(model, tiers(model, 12, 6, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        model(ids, past_key_values=cache)
        try_every_line(body, check)
