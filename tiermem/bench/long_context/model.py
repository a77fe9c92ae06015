"""Model: what the benchmark asks of a model of transformers and of its caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from tiermem.config import TierConfig
from tiermem.device.protocol import Progress
from tiermem.model_shape import ModelShape

if TYPE_CHECKING:
    from tiermem.integrations.transformers import TieredCache


class PlainCache(Protocol):
    """A cache of transformers."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> object:
        """Store K and V, (1, kv_heads, tokens, head_dim), of one layer."""


class Model(Protocol):
    """A decoder with its weights on a device."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, K and V."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one token reads."""

    def open_tiered(
        self, config: TierConfig, page_tokens: int, progress: Progress | None
    ) -> TieredCache:
        """A cache of tiermem, which the caller closes.

        Raises
        ------
        ConfigError: sizes that cannot be had.
        """

    def open_offloaded(self) -> PlainCache:
        """transformers' offloaded cache; needs a GPU."""

    def feed(self, cache: object, ids: torch.Tensor) -> torch.Tensor:
        """Give the model tokens (tokens,) behind what `cache` holds; logits (vocabulary,) behind the last."""
