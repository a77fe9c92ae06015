"""Synthetic: K and V of realistic scale that can be made again, piece by piece, wherever they are needed.

Elements are normal; a few channels of K lie far from zero, as in real models, where the same channels stand out at
every token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.bench.long_context.model import PlainCache
from tiermem.errors import InvariantError
from tiermem.layout import MAX_LAYERS, PageLayout
from tiermem.manager import TierManager
from tiermem.sequence import Sequence

PIECE_TOKENS = 2048
"""Of one step of the fill; pieces are made by their index, so that their size must not change."""
OUTLIER_CHANNELS = 4
OUTLIER = 6.0
"""How far the mean of these channels of K is from zero, in standard deviations of the other ones."""
V_SCALE = 0.5
SEED = 20
LABEL = "filled with random K and V"

Told = Callable[[int], None]
"""Told how many tokens are stored."""


@dataclass(frozen=True, slots=True)
class SyntheticKv:
    """K and V of any layer and piece, the same whenever they are asked for on a device of one kind."""

    layout: PageLayout
    device: torch.device

    def piece(self, layer: int, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first `count` tokens of piece `index`, each (count, kv_heads, head_dim)."""
        layout = self.layout
        make = torch.Generator(self.device).manual_seed((SEED + index) * MAX_LAYERS + layer)
        shape = (PIECE_TOKENS, layout.num_kv_heads, layout.head_dim)
        k, v = (
            torch.randn(shape, generator=make, dtype=TORCH_DTYPES[layout.dtype], device=self.device)
            for _ in range(2)
        )
        step = layout.head_dim // OUTLIER_CHANNELS
        far = OUTLIER if layer % 2 else -OUTLIER
        k[:, :, layer % step :: step] += far
        return k[:count], v[:count].mul_(V_SCALE)

    def pieces(self, context: int) -> list[tuple[int, int]]:
        """(index, tokens) of the pieces of `context` tokens."""
        starts = range(0, context, PIECE_TOKENS)
        return [(i, min(PIECE_TOKENS, context - start)) for i, start in enumerate(starts)]


def fill_tiered(manager: TierManager, kv: SyntheticKv, ids: torch.Tensor, told: Told) -> Sequence:
    """A sequence of tokens `ids` (tokens,) with K and V of `kv`, stored by steps as a model would store them.

    Raises
    ------
    OutOfPagesError: the tiers have no room.
    """
    sequence = manager.open_sequence(label=LABEL)
    stored = 0
    for index, count in kv.pieces(len(ids)):
        with manager.step([sequence], count) as step:
            for layer in range(kv.layout.num_layers):
                step.append(layer, *kv.piece(layer, index, count))
        stored += count
        told(stored)
    sequence.record(ids)
    return sequence


def fill_plain(cache: PlainCache, kv: SyntheticKv, context: int, told: Told) -> None:
    """The same K and V in a cache of transformers."""
    for layer in range(kv.layout.num_layers):
        parts = [kv.piece(layer, index, count) for index, count in kv.pieces(context)]
        k, v = (torch.cat(part).transpose(0, 1)[None] for part in zip(*parts, strict=True))
        cache.update(k, v, layer)
        told(context * (layer + 1) // kv.layout.num_layers)


def check_stored(manager: TierManager, kv: SyntheticKv, ids: torch.Tensor) -> None:
    """Read pieces of several layers back and compare every byte with what was stored.

    Raises
    ------
    InvariantError: a token's K or V is another one.
    """
    layers = sorted({0, kv.layout.num_layers // 2, kv.layout.num_layers - 1})
    pieces = kv.pieces(len(ids))
    chosen = {pieces[i][0]: pieces[i][1] for i in (0, len(pieces) // 2, -1)}
    with closing(manager.open_sequence(ids)) as sequence:
        for layer in layers:
            for index, count in chosen.items():
                start = index * PIECE_TOKENS
                found = sequence.read(layer, start, start + count)
                for name, have, want in zip(
                    ("K", "V"), found, kv.piece(layer, index, count), strict=True
                ):
                    wrong = int((have != want).flatten(1).any(1).sum())
                    if wrong:
                        raise InvariantError(
                            f"{name} of layer {layer}: {wrong} of {count} tokens from {start} on are "
                            f"not what was stored"
                        )
