"""ContiguousCache: K and V of a fixed number of tokens and one more, in one piece a layer; attention over it.

What a captured decode step without paging would do: no copy of K and V, no mask, the same addresses each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin


class Grouping(Enum):
    """How torch is given several query heads that share one head of K and V."""

    GQA = "as heads"
    ROWS = "as rows"
    """As query rows of one head: nothing is masked, so it is the same, and some implementations need it."""


class ContiguousLayer(CacheLayerMixin):
    """One layer: (1, kv_heads, tokens + 1, head_dim); the last token is written anew by every call."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.past_tokens = keys.shape[2]
        self.keys = _with_room(keys)
        self.values = _with_room(values)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the one new token; K and V of all tokens."""
        self.keys[:, :, self.past_tokens :].copy_(key_states)
        self.values[:, :, self.past_tokens :].copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Tokens, and where they begin."""
        return self.past_tokens + 1, 0

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.past_tokens

    def get_max_length(self) -> int:
        """Tokens with the new one."""
        return self.past_tokens + 1

    def get_max_cache_shape(self) -> int:
        """The same, as older transformers 5 asks."""
        return self.past_tokens + 1


class ContiguousCache(Cache):
    """What `source` holds, with room for one token more."""

    def __init__(self, source: DynamicCache) -> None:
        layers = [ContiguousLayer(layer.keys, layer.values) for layer in source.layers]
        self.past_tokens = layers[0].past_tokens
        super().__init__(layers=layers)


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.empty_like(tensor[:, :, :1])
    return torch.cat([tensor, room], dim=2)


@contextmanager
def contiguous_attention(model: PreTrainedModel, grouping: Grouping) -> Iterator[None]:
    """Let `model` attend with torch's function and without a mask, one new token over all stored ones."""
    name = f"contiguous {grouping.value}"
    AttentionInterface.register(
        name, _attend_as_heads if grouping is Grouping.GQA else _attend_as_rows
    )
    AttentionMaskInterface.register(name, _no_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend_as_heads(
    module: torch.nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """(1, 1, q_heads, head_dim) of query (1, q_heads, 1, head_dim)."""
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _attend_as_rows(
    module: torch.nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    rows = query.view(1, key.shape[1], -1, query.shape[3])
    out = scaled_dot_product_attention(rows, key, value, scale=scaling)
    return out.reshape(1, 1, query.shape[1], query.shape[3]), None


def _no_mask(**_: object) -> None:
    return None
