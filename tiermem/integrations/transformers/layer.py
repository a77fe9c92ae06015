"""TieredLayer: one layer of a TieredCache, as transformers looks at it."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers.cache_utils import CacheLayerMixin


class LayerOwner(Protocol):
    """The cache, as its layers see it."""

    def get_seq_length(self, layer_idx: int = 0) -> int: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class TieredLayer(CacheLayerMixin):
    """A view of one layer: it has no tensors of its own, because all layers of a page live together."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: LayerOwner, layer: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.sliding_window = window
        self._owner = owner
        self._layer = layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the manager allocated everything when it was made."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As TieredCache.update, for this layer."""
        return self._owner.update(key_states, value_states, self._layer)

    def get_seq_length(self) -> int:
        """Columns stored, padding included."""
        return self._owner.get_seq_length()

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of K that a mask would have; TieredCache needs no mask.

        query_length: new columns; early transformers 5 gives their positions (columns,).
        """
        columns = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + columns, 0

    def get_max_length(self) -> int:
        """-1: no length is the most."""
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return -1
