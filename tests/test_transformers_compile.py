"""Models whose parts are compiled by torch decode the same with a TieredCache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage_ssd, pages_only_in
from tiny_models import PAGE_TOKENS, random_ids, reference, tiers, tiny_model

from tiermem.integrations.transformers import TieredCache
from tiermem.pools import Tier

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_layers_give_the_same_tokens(family: str) -> None:
    """torch's compiler steps around what tiermem does in the middle of a layer."""
    model, ids = tiny_model(family, 3), random_ids(1, 40, 1)
    expected = reference(model, ids, do_sample=False, max_new_tokens=24)
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=False)
    with TieredCache(model, tiers(model, 40, 10), page_tokens=PAGE_TOKENS) as cache:
        output = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=24)
        assert torch.equal(output, expected)
        cache.manager.check()


class Counting:
    """A backend of torch's compiler that changes nothing and counts the graphs that run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.runs += 1
            return module.forward(*arguments)

        return run


def test_compiled_parts_stay_so_and_lost_pages_are_computed_by_them(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", 3), random_ids(1, 150, 1)
    expected = reference(model, ids, **GREEDY)
    backend = Counting()
    for layer in model.model.layers:
        layer.mlp.compile(backend=backend, dynamic=True)
    with TieredCache(model, tiers(model, 4, 4, tmp_path), page_tokens=PAGE_TOKENS) as cache:
        with torch.no_grad():
            model(ids[:, :140], past_key_values=cache)
        assert damage_ssd(cache, pages_only_in(cache, Tier.SSD)[:1])
        before = backend.runs
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert cache.stats().computed_again_tokens > 0
        assert backend.runs - before >= 2 * (12 + 1)


@pytest.mark.parametrize("how", ["model.compile", "torch.compile"])
def test_a_model_that_is_compiled_as_a_whole_is_computed_as_it_is(how: str) -> None:
    model, ids = tiny_model("llama", 4), random_ids(1, 40, 1)
    expected, backend = reference(model, ids, **GREEDY), Counting()
    called = model
    with TieredCache(model, tiers(model, 40, 0), page_tokens=PAGE_TOKENS) as cache:
        if how == "model.compile":
            model.compile(backend=backend)
        else:
            called = torch.compile(model, backend=backend)
        with torch.no_grad():
            first = called(ids, past_key_values=cache).logits[0, -1].argmax()
        assert first == expected[0, 40]
        assert (backend.runs > 0) == (how == "forward"), (
            "what was compiled before is the model's own"
        )
        cache.reset()
        assert torch.equal(called.generate(ids, past_key_values=cache, **GREEDY), expected)


def test_a_model_that_others_wrapped_before_and_after() -> None:
    model, ids = tiny_model("llama", 5), random_ids(1, 40, 1)
    expected, seen = reference(model, ids, **GREEDY), []

    def wrapped(name: str) -> Callable[..., Any]:
        within = model.forward

        @functools.wraps(within)
        def forward(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return within(*arguments, **options)

        return forward

    model.forward = wrapped("before")
    with TieredCache(model, tiers(model, 40, 0), page_tokens=PAGE_TOKENS) as cache:
        model.forward = wrapped("after")
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert seen.count("before") == seen.count("after") == 12
        assert torch.equal(reference(model, ids, **GREEDY), expected)
    assert torch.equal(reference(model, ids, **GREEDY), expected)
    assert seen.count("before") == seen.count("after") == 36
