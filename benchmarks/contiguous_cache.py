"""ContiguousCache: K and V of a fixed number of tokens and one more, each layer's in one piece.

What a captured decode step without paging would read: no copy of K and V, no mask, the same addresses each time.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin


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
