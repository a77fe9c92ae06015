"""Models whose parts are compiled by torch decode the same with a TieredCache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import PAGE_TOKENS, random_ids, reference, tiers, tiny_model

from tiermem.integrations.transformers import TieredCache


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
